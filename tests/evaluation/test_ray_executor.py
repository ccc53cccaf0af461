"""``--executor ray``: the bytes of the local one, also where a worker is killed, and nothing of it
that others could reach or read."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import pytest

from lcguard.commands.script import resumable
from lcguard.evaluation.executors import executor
from lcguard.evaluation.folder import RunFolder
from lcguard.evaluation.parallel import Executor
from lcguard.evaluation.plan import AttackSpec, DataConfig, EvalConfig, GuardSpec
from lcguard.evaluation.ray_executor import ray_executor
from lcguard.evaluation.run import evaluate, load

TINY = EvalConfig(
    title="tiny",
    data=DataConfig(seed=31, train_records=24, test_records=8),
    guards=(GuardSpec("identity", guard="identity"), GuardSpec("gate", path="nano:gate")),
    attacks=(
        AttackSpec("probe", "probe", {"fit": {"steps": 5}}),
        AttackSpec("decoder", options={"width": 16, "fit": {"steps": 3}}),
    ),
    injection=False,
    broken_at=None,
    explain=0,
)


# Not by importing it, which has to wait for its settings.
HAS_RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="pip install 'lcguard[ray]'"
)


@pytest.fixture(scope="module")
def on_ray() -> Iterator[Executor]:
    with ray_executor(workers=2) as found:
        yield found
    with warnings.catch_warnings():  # Ray leaves processes to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def processes() -> list[psutil.Process]:
    """All of this Ray, and this process, which speaks to it."""
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def busy_workers() -> list[psutil.Process]:
    found = []
    for process in processes():
        try:
            if process.name().startswith("ray::_run"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def stop_one(killed: list[int]) -> None:
    """Kills a worker in the middle of a unit, as soon as there is one."""
    while not killed:
        for process in busy_workers()[:1]:
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
        time.sleep(0.01)


def figures(out: Path) -> dict[str, Any]:
    """A report without when and by which command it was made, and how long guarding took."""
    report = json.loads((out / "report.json").read_text())
    for name in ("created", "command", "resumed"):
        report.pop(name, None)
    for row in report["results"]:
        row["latency_ms"] = None
    return report


@pytest.mark.slow
@HAS_RAY
def test_a_killed_worker_changes_no_byte(
    on_ray: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what Ray writes down holds none of the values that were attacked."""
    evaluate(TINY, tmp_path / "local", "test")
    killed: list[int] = []
    killer = threading.Thread(target=stop_one, args=(killed,), daemon=True)
    killer.start()

    monkeypatch.setattr("lcguard.evaluation.run.executor_of", lambda name: _given(on_ray))
    evaluate(TINY, tmp_path / "ray", "test", executor="ray")
    killer.join()
    assert killed
    local, ray = (RunFolder(tmp_path / name) for name in ("local", "ray"))
    assert ray.journal_file.read_bytes() == local.journal_file.read_bytes()
    assert figures(ray.path) == figures(local.path)

    written = b"".join(p.read_bytes() for p in logs())
    assert len(written) > 1000
    made = load(TINY)
    assert made.hop is not None
    values = {
        made.setup.model.decode(s.ids).strip()
        for side in made.hop.sides
        for r in side
        for s in r.secrets()
    }
    assert not [v for v in values if len(v) > 5 and v.encode() in written]


class _given:
    """The executor that runs already, as a context."""

    def __init__(self, found: Executor) -> None:
        self.found = found

    def __enter__(self) -> Executor:
        return self.found

    def __exit__(self, *error: object) -> None:
        pass


def logs() -> list[Path]:
    import ray

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    (folder,) = (p for p in session.parents if p.parent == Path("/tmp"))
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
    return [p for p in folder.rglob("*") if p.is_file()]


@HAS_RAY
def test_ray_listens_on_the_loopback_alone_and_asks_for_its_token(on_ray: Executor) -> None:
    assert dict(on_ray([lambda: 7])) == {0: 7}
    listening = {
        (process.name(), c.laddr.ip)
        for process in processes()
        for c in process.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    }
    assert any(name == "raylet" for name, _ in listening)
    assert {ip for _, ip in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

    import ray

    address = ray.get_runtime_context().gcs_address
    with socket.create_connection(address.rsplit(":", 1)):
        pass  # in reach of every user of this machine
    stranger = f"import ray; ray.init({address!r}, logging_level='CRITICAL')"
    environ = os.environ | {"RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run([sys.executable, "-c", stranger], env=environ, capture_output=True)
    assert done.returncode
    assert b"token" in done.stderr.lower()


@HAS_RAY
def test_a_job_that_always_loses_its_worker_costs_itself_alone(
    on_ray: Executor, capsys: pytest.CaptureFixture[str]
) -> None:
    def fatal() -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    found = list[tuple[int, int]]()
    with pytest.raises(SystemExit) as ended, resumable("lcguard eval resume run"):
        found.extend(on_ray([lambda: 1, fatal, lambda: 3]))
    assert found == [(0, 1), (2, 3)]
    assert ended.value.code == 1
    assert isinstance(ended.value.__context__, BrokenProcessPool)
    assert capsys.readouterr().err.endswith("resume with: lcguard eval resume run\n")


@HAS_RAY
def test_an_exception_of_a_job_is_raised_as_it_is(on_ray: Executor) -> None:
    def wrong() -> int:
        raise ValueError("lr is -1: give one above 0")

    with pytest.raises(ValueError, match=r"^lr is -1: give one above 0$"):
        list(on_ray([lambda: 1, wrong]))
    with pytest.raises(ValueError, match="not cuda: use the executor local"):
        list(on_ray([lambda: 1], "cuda"))


def test_what_is_unknown_or_absent_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="'slurm' is unknown: use one of local, ray"):
        evaluate(TINY, tmp_path / "run", "test", executor="slurm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with (
        pytest.raises(ValueError, match=r"needs Ray: pip install 'lcguard\[ray\]'"),
        executor("ray"),
    ):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@HAS_RAY
def test_ctrl_c_ends_ray_too(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text(
        "title: long\nmodel: nano\nseeds: [0]\n"
        "data: {source: generator, train_records: 64, test_records: 16}\n"
        "guards: [{name: redact, guard: redact}]\n"
        "attacks: [{name: probe, attack: probe, options: {fit: {steps: 100000000}}}]\n"
    )
    words = ["eval", "run", "long.yaml", "--out", "run", "--executor", "ray"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lcguard.cli", *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    ray = psutil.Process(process.pid)
    while not any(p.name().startswith("ray::_run") for p in ray.children(recursive=True)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    children = ray.children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    again = "lcguard eval resume run --executor ray"
    assert said.splitlines()[-1] == f"lcguard: stopped; resume with: {again}"
    assert "Traceback" not in said
    psutil.wait_procs(children, timeout=60)
    assert not [p for p in children if p.is_running()]
