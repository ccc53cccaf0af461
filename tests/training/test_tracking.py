"""``--mlflow``: what a real MLflow server has of a run afterwards, and what it never gets."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from lcguard import mlflow_server
from lcguard.cli import app
from lcguard.commands.train import TrainRun, run_training
from lcguard.config import load_config
from lcguard.deployment_key import KEY_VARIABLE
from lcguard.evaluation.load import hops_for
from lcguard.evaluation.plan import EvalConfig
from lcguard.evaluation.run import evaluate
from lcguard.guards.shipped import guard_folder
from lcguard.mlflow_server import MlflowServer
from lcguard.tracking import Tracker, flat
from lcguard.training.trainer import Trainer
from tests.matrix import GUARDS
from tests.paths import ROOT, TESTS

PYTHON = ROOT / "build" / "mlflow" / "bin" / "python"
needs_mlflow = pytest.mark.skipif(not PYTHON.exists(), reason="mlflow is not there: make mlflow")
DATA = {"seed": 5000, "train_records": 24, "test_records": 8}
TRAIN = {
    "guard": "gate",
    "options": GUARDS["gate"],
    "steps": 4,
    "questions": 2,
    "batch": 6,
    "checkpoint_every": 2,
    "label_steps": 1,
    "certificate_pairs": 8,
    "adversary": {"count": 0},
}
EVAL = {
    "data": {"train_records": 20, "test_records": 6},
    "guards": [{"name": "noise", "guard": "gaussian", "options": {"noise": 0.5}}],
    "attacks": [{"name": "probe", "attack": "probe", "options": {"fit": {"steps": 5}}}],
    "injection": False,
    "policy_guard": "noise",
    "explain": 2,
}


class Server:
    """An MLflow server in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self.start()

    def start(self) -> None:
        """On the same port as before, with the same store."""
        words = [PYTHON, TESTS / "training" / "mlflow_serve.py", self.folder, self.port]
        self.process = subprocess.Popen(
            [str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def runs(self) -> list[dict[str, Any]]:
        """Those of the experiment, the newest first."""
        rest = MlflowServer(self.uri)
        found = rest.get("experiments/get-by-name", experiment_name="lcguard")["experiment"]
        made = rest.post("runs/search", experiment_ids=[found["experiment_id"]])
        return list(made.get("runs", []))

    def history(self, run: dict[str, Any], key: str) -> list[tuple[int, float]]:
        found = MlflowServer(self.uri).get(
            "metrics/get-history", run_id=run["info"]["run_id"], metric_key=key
        )
        return [(m["step"], m["value"]) for m in found["metrics"]]

    def artefacts(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (self.folder / "artifacts").rglob("*.json")}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "mlflow"
    folder.mkdir()
    found = Server(folder)
    yield found
    found.stop()


def read(run: dict[str, Any], kind: str) -> dict[str, Any]:
    return {x["key"]: x["value"] for x in run["data"].get(kind, [])}


def plan(tmp_path: Path, kind: type[Any], found: dict[str, Any]) -> Any:
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(found))
    return load_config(kind, path)


def journal(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def secrets(data: Any) -> set[str]:
    """Values of the records, and the records themselves; what is short stands in any file."""
    records = [h.record for side in hops_for(data) for h in side]
    values = {s.value for r in records for s in r.spans} | {r.text for r in records}
    return {v for v in values if len(v) >= 8}


@needs_mlflow
def test_a_training_that_was_killed_goes_on_in_its_run_and_no_step_stands_twice(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = plan(tmp_path, TrainRun, {"data": DATA, "train": TRAIN}), tmp_path / "out"
    step = Trainer.step

    def killed(self: Trainer, at: int) -> dict[str, float]:
        if at == 3:
            raise KeyboardInterrupt
        return step(self, at)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            run_training(run, out, "a test", tracker=Tracker.open(server.uri))
    (before,) = server.runs()
    assert before["info"]["status"] == "KILLED"
    assert [s for s, _ in server.history(before, "step/loss")] == [0, 1]
    summary = run_training(run, out, "a test", tracker=Tracker.open(server.uri))
    (found,) = server.runs()
    assert found["info"]["run_id"] == before["info"]["run_id"]
    assert found["info"]["status"] == "FINISHED"
    rows = journal(out)
    assert server.history(found, "step/loss") == [(r["step"], r["loss"]) for r in rows]
    assert len(rows) == TRAIN["steps"]
    params, tags, metrics = (read(found, k) for k in ("params", "tags", "metrics"))
    assert params["train.steps"] == "4"
    assert params["train.guard"] == "gate"
    assert params["data.seed"] == "5000"
    assert metrics["utility"] == summary["utility"]
    assert metrics["certificate.mean_nats"] == summary["certificate"]["mean_nats"]
    assert tags["lcguard.verdict"] == summary["verdict"]
    sent = server.artefacts()
    assert set(sent) == {"lcguard_config.json", "summary.json"}
    assert json.loads(sent["summary.json"])["guard"] == "gate"
    assert not any(b"a test" in data for data in sent.values())  # the command line stays here


@needs_mlflow
def test_a_server_that_fails_costs_a_warning_and_gets_the_rest_later(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = plan(tmp_path, TrainRun, {"data": DATA, "train": TRAIN}), tmp_path / "out"
    step = Trainer.step

    def fails(self: Trainer, at: int) -> dict[str, float]:
        if at == 2:
            server.stop()
        return step(self, at)

    said: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", fails)
        run_training(run, out, "a test", said.append, tracker=Tracker.open(server.uri))
    assert (out / "guard").is_dir()
    (warning,) = [line for line in said if "not tracked" in line]
    assert "cannot be reached" in warning
    assert "\n" not in warning
    server.start()
    (found,) = server.runs()
    assert [s for s, _ in server.history(found, "step/loss")] == [0, 1]
    run_training(run, out, "a test", tracker=Tracker.open(server.uri))
    (found,) = server.runs()
    assert [s for s, _ in server.history(found, "step/loss")] == [0, 1, 2, 3]


@needs_mlflow
def test_an_evaluations_figures_arrive_and_nothing_of_its_records(
    server: Server, tmp_path: Path
) -> None:
    made = plan(tmp_path, EvalConfig, EVAL)
    report = evaluate(made, tmp_path / "out", "a test", tracker=Tracker.open(server.uri))
    assert report["explained"]  # there is something to keep back
    (found,) = server.runs()
    metrics, tags = read(found, "metrics"), read(found, "tags")
    (row,) = report["results"]
    assert metrics["noise/asr_fresh"] == row["asr_fresh"]
    assert metrics["noise/utility"] == row["utility"]
    assert tags["lcguard.guard_digest.noise"] == report["hashes"]["guards"]["noise"]
    assert tags["lcguard.verdict.noise"]
    sent = json.loads(server.artefacts()["report.json"])
    assert sent["results"] == json.loads((tmp_path / "out" / "report.json").read_text())["results"]
    values = secrets(made.data)
    assert len(values) > 20
    kept = [p.read_bytes() for p in server.folder.rglob("*") if p.is_file()]
    assert len(kept) >= 2
    texts = [data.decode("utf-8", "replace") for data in kept]
    assert not [v for v in values if any(v in text for text in texts)]
    assert "explained" not in sent
    assert "command" not in sent


@needs_mlflow
def test_a_judgement_stands_beside_its_evaluation(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line, with the address from the environment."""
    monkeypatch.setenv(KEY_VARIABLE, "ab" * 32)
    monkeypatch.setenv("LCGUARD_MLFLOW", server.uri)
    state, config = tmp_path / "state", tmp_path / "loop.yaml"
    judge = {"data": EVAL["data"], "attacks": EVAL["attacks"]}
    config.write_text(json.dumps({"judge": judge, "certificate_pairs": 4}))
    begun = CliRunner().invoke(app, ["loop", "init", "nano:gate", "--dir", str(state)])
    assert begun.exit_code == 0, begun.output
    candidate = tmp_path / "candidate"  # a copy: the judgement is written onto its card
    shutil.copytree(guard_folder("nano:gate-full"), candidate)
    words = ["loop", "judge", "--guard", str(candidate), "--dir", str(state)]
    words += ["--out", str(tmp_path / "round"), "--config", str(config)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 3, done.output  # five steps of a probe judge nothing
    (found,) = server.runs()
    tags, metrics = read(found, "tags"), read(found, "metrics")
    assert tags["lcguard.judgement"] == "refused"
    assert "they judge nothing" in tags["lcguard.reason"]
    assert metrics["candidate/asr_fresh"] == metrics["asr_fresh"]
    assert found["info"]["status"] == "FINISHED"


def test_a_server_that_is_not_there_ends_it_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as taken:
        port = taken.server_address[1]  # and nobody listens once it is closed
    with pytest.raises(ValueError, match=f"MLflow server .*:{port} cannot be reached") as error:
        Tracker.open(f"http://127.0.0.1:{port}")
    assert "\n" not in str(error.value)
    done = CliRunner().invoke(
        app, ["train", "gate", "--out", "run", "--mlflow", f"http://127.0.0.1:{port}"]
    )
    assert done.exit_code != 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "mlruns", "http://", "file:///tmp/x"])
def test_an_address_that_is_none_is_named(uri: str) -> None:
    with pytest.raises(ValueError, match="is not a server's address: give one such as"):
        Tracker.open(uri)


def test_credentials_are_sent_where_they_belong_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An address that sends its callers elsewhere is not followed."""
    asked: list[tuple[str, str | None]] = []

    class Redirects(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(307)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_address[1]}/else")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    monkeypatch.setenv(mlflow_server.TOKEN, "t0ken")
    with ThreadingHTTPServer(("127.0.0.1", 0), Redirects) as made:
        Thread(target=made.serve_forever, daemon=True).start()
        with pytest.raises(ValueError, match="answers 307") as error:
            Tracker.open(f"http://127.0.0.1:{made.server_address[1]}/under")
        made.shutdown()
    ((path, sent),) = asked
    assert path.startswith("/under/api/2.0/mlflow/experiments/get-by-name")
    assert sent == "Bearer t0ken"
    assert "t0ken" not in str(error.value)
    with pytest.raises(ValueError, match="without credentials") as error:
        Tracker.open("https://me:s3cret@mlflow.example")
    assert "s3cret" not in str(error.value)


def test_parts_are_named_by_where_they_stand() -> None:
    found = flat({"a": {"b": 1, "c": {}}, "d": [1, 2], "e": [{"f": None}, {"f": "x"}]})
    assert found == {"a.b": 1, "a.c": {}, "d": [1, 2], "e.0.f": None, "e.1.f": "x"}
