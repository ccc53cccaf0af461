"""Planted records, the attack that reads them, and the worker that plants them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.scenarios.load import load_hops
from lcguard.categories import CATEGORIES
from lcguard.commands.canary import Job, open_canaries
from lcguard.commands.canary_plant import _layers
from lcguard.commands.canary_records import Words, fitting_records, screening_records
from lcguard.commands.canary_screen import screen
from lcguard.evaluation.intervals import wilson
from lcguard.guards import FrozenGuard, KVShape, guard_class
from lcguard.guards.gate import NEVER, GateGuard
from lcguard.handoff.grants import new_handle
from lcguard.handoff.keys import KEY_VARIABLE
from lcguard.protocols import AttackData
from lcguard.records import IGNORE, TokenRecord, mask_of
from lcguard.rule import Rule
from lcguard.segment import KVSegment
from lcguard.server.database.writer import Database
from lcguard.server.leakage.meter import LeakageMeter
from lcguard.store import open_store
from lcguard.training.dataset import attack_data, guard_all
from tests.server.leakage.canary_edges import KEY, edge

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def agent() -> HFBackend:
    return load_backend("nano", "cpu")


@pytest.fixture(scope="module")
def guards(agent: HFBackend) -> dict[str, FrozenGuard]:
    shape = KVShape(*agent.source.shape)
    return {
        "identity": FrozenGuard(guard_class("identity").build(shape, len(CATEGORIES), {})),
        "gate": FrozenGuard.from_pretrained("nano:gate"),
    }


# -- the screening


def test_records_hold_what_is_forbidden_and_share_no_name(agent: HFBackend) -> None:
    forbid = ("person", "government_id")
    train = fitting_records(agent.encoder, forbid, 16, 3)
    test = screening_records(agent.encoder, forbid, 24, 4)
    assert (len(train), len(test)) == (16, 24)
    for record in (*train, *test):
        assert {s.category for s in record.secrets()} <= set(forbid)
        assert record.secrets()

    def names(records: list[TokenRecord]) -> set[str]:
        return {agent.decode(s.ids).strip() for r in records for s in r.secrets()}

    assert not names(train) & names(test)
    assert names(train) != names(fitting_records(agent.encoder, forbid, 16, 5))
    # a pair is one text: the values are where the spans say
    first = train[0]
    half = [s.positions[0] for s in first.secrets()]
    assert max(half) > len(first.ids) / 2 > min(half)


def test_chosen_records_teach_more_words(agent: HFBackend) -> None:
    """More values that the attack can name than from as many records as they come."""
    chosen = fitting_records(agent.encoder, CATEGORIES, 32, 3)
    hops = load_hops("generator", seed=3, split="coined", n=64, min_fields=7)[:64]
    test = screening_records(agent.encoder, CATEGORIES, 64, 11)

    def nameable(records: list[TokenRecord]) -> float:
        words = {t for r in records for t in r.ids}
        values = [set(s.ids) for r in test for s in r.secrets()]
        return sum(v <= words for v in values) / len(values)

    assert nameable(chosen) > nameable(agent.encoder.encode(hops)) + 0.03


def test_words_are_renamed_and_back(agent: HFBackend) -> None:
    train, test = (
        attack_data(r, agent.source.prefill([x.ids for x in r]), agent.special)
        for r in (
            fitting_records(agent.encoder, ("health",), 2, 1),
            screening_records(agent.encoder, ("health",), 8, 2),
        )
    )
    words = Words.of(train)
    renamed = words.rename(train)
    assert renamed.special.vocab == len(words.ids) + 1 < agent.special.vocab
    for old, new in zip(train.secrets, renamed.secrets, strict=True):
        assert [words.back(s.ids) for s in new] == [s.ids for s in old]
    kept = renamed.context_ids != IGNORE
    assert bool((kept == (train.context_ids != IGNORE)).all())
    assert words.back(renamed.context_ids[kept].tolist()) == tuple(train.context_ids[kept].tolist())
    unseen = words.rename(test).context_ids == len(words.ids)
    assert bool(unseen.any())
    assert words.back([len(words.ids)]) == (-1,)


def test_an_open_guard_is_read_and_the_gate_is_not(
    agent: HFBackend, guards: dict[str, FrozenGuard]
) -> None:
    train = fitting_records(agent.encoder, CATEGORIES, 96, 21)
    test = screening_records(agent.encoder, CATEGORIES, 64, 22)
    raw = [agent.source.prefill([r.ids for r in rs], batch=16) for rs in (train, test)]

    open_one = FrozenGuard(copy.deepcopy(guards["gate"].module))
    module, at, n = open_one.module, CATEGORIES.index("contact"), len(CATEGORIES)
    assert isinstance(module, GateGuard)
    module.gate.weight.view(n, -1, module.config.width)[at] = 0.0
    module.gate.bias.view(n, -1)[at] = NEVER

    def pairs(name: str) -> list[AttackData]:
        guard = open_one if name == "open one" else guards[name]
        return [
            attack_data(
                rs,
                guard_all(guard, rs, kv, agent.source, agent.special, seed=i, batch=32),
                agent.special,
            )
            for i, (rs, kv) in enumerate(zip((train, test), raw, strict=True))
        ]

    leak = screen(*pairs("identity"), seed=5).figures
    assert leak.asr >= 0.9
    assert leak.asr_low < leak.asr == leak.recovered / leak.n_secrets < leak.asr_high
    assert leak.floor <= 0.05
    hidden = screen(*pairs("gate"), seed=5).figures
    assert hidden.n_secrets == leak.n_secrets > 150
    assert hidden.asr_high < 0.1
    # together they would stay below the limit
    alone = screen(*pairs("open one"), seed=5)
    assert alone.category == "contact"
    assert alone.figures == alone.by_category["contact"]
    assert alone.figures.asr_low > 0.2
    others = [s for c, s in alone.by_category.items() if c != "contact"]
    everything = [alone.figures, *others]
    assert sum(s.recovered for s in others) / sum(s.n_secrets for s in others) < 0.05
    won, tried = (sum(getattr(s, k) for s in everything) for k in ("recovered", "n_secrets"))
    assert wilson(won, tried)[0] < 0.2
    with pytest.raises(ValueError, match="attack='trigger': for canaries there are probe"):
        screen(*pairs("gate"), "trigger")


@pytest.mark.parametrize(
    ("n", "channels", "kept"),
    [(4, 128, [0, 1, 2, 3]), (32, 2048, [0, 10, 21, 31]), (8, 9000, [0]), (3, 4096, [0, 2])],
)
def test_of_large_models_some_layers_are_kept(n: int, channels: int, kept: list[int]) -> None:
    assert _layers(n, channels) == kept


# -- the worker, before a stand-in for proxy and engine that guards and stores as they do


class Site(ThreadingHTTPServer):
    """Publishes what is planted, under the guard that is the audience's name."""

    def __init__(self, agent: HFBackend, guards: dict[str, FrozenGuard], store: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.agent, self.guards = agent, guards
        self.url, self.store = f"http://127.0.0.1:{self.server_port}", f"file://{store}"
        self.bodies: list[dict[str, Any]] = []
        self.refusals = 1  # of a proxy that is busy at first
        self.lock = threading.Lock()

    def answer(self, token: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        publish = body["lcguard"]["publish"]
        guard = self.guards.get(publish["audience"])
        if token != "Bearer planted" or guard is None:
            return 403, {"error": {"message": f"not for\n{publish['audience']}"}}
        if self.refusals:
            self.refusals -= 1
            return 503, {"error": {"message": "busy"}}
        self.bodies.append(body)
        kv = guard(self.agent.source.prefill([body["prompt"]]), mask_of([Rule(CATEGORIES)])).kv
        handle = new_handle()
        segment = KVSegment.create(
            kv.keys[0],
            kv.values[0],
            self.agent.source.config,
            model_id="nano",
            source_agent="t/a",
            guard_digest=guard.digest,
            policy_digest="0" * 64,
            handle=handle,
        )
        open_store(self.store).put(segment.sign(bytes.fromhex(KEY)))
        made = {"handle": handle, "guard": guard.name, "forbid": list(CATEGORIES), "derive": []}
        return 200, {"lcguard": {"published": made}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/v1/completions"
        with self.server.lock:
            status, said = self.server.answer(self.headers["authorization"], body)
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site(agent: HFBackend, guards: dict[str, FrozenGuard], tmp_path: Path) -> Iterator[Site]:
    made = Site(agent, {**guards, "leaky": guards["identity"]}, tmp_path / "store")
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


def work(job: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {KEY_VARIABLE: KEY, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "lcguard.commands.canary"],
        input=json.dumps(job),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_worker_plants_screens_and_cleans_up(site: Site, tmp_path: Path) -> None:
    forbid = ("government_id", "health")
    job = {
        "base_url": site.url,
        "token": "planted",
        "model": "nano",
        "served_model": "served",
        "store": site.store,
        "train_records": 40,
        "test_records": 24,
        "seed": 7,
        "edges": [
            edge("identity", *forbid),
            edge("leaky", *forbid),
            edge("open"),
            edge("nobody", *forbid),
            edge("gate", *forbid, guard="redact"),
        ],
    }
    done = work(job)
    assert done.returncode == 0, done.stderr
    *lines, last = map(json.loads, done.stdout.splitlines())
    results = last["results"]
    assert [line["result"] for line in lines] == results
    assert [r["audience"] for r in results] == ["identity", "leaky", "open", "nobody", "gate"]
    leak, shared, skipped, refused, wrong = results
    assert leak["asr"] > 0.5 > leak["floor"]
    assert leak["n_secrets"] >= 24
    assert "shared_with" not in leak
    assert shared["shared_with"] == "t/a/identity"
    assert {k: shared[k] for k in ("asr", "guard_digest")} == {
        k: leak[k] for k in ("asr", "guard_digest")
    }
    assert skipped["skipped"] == "forbids nothing"
    assert refused["error"] == "the proxy answered 403: not for nobody"
    assert "published under guard 'gate', the job says 'redact'" in wrong["error"]
    # each is what the meter takes
    with Database(tmp_path / "lcguard.sqlite") as database:
        meter = LeakageMeter(database, 0.2, 60)
        assert [meter.record(r).new for r in results[:3]] == ["closed", "closed", "open"]
    assert len(site.bodies) == 40 + 24 + 2
    first = site.bodies[0]
    assert (first["model"], first["max_tokens"]) == ("served", 1)
    text = "".join(site.agent.tokenizer.decode([i]) for i in first["prompt"])
    assert first["lcguard"]["publish"]["secrets"]
    assert all(s in text for s in first["lcguard"]["publish"]["secrets"])
    assert open_store(site.store).handles() == []
    assert "planted" not in done.stdout.replace("records planted", "")


def test_jobs_that_cannot_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    good = {
        "base_url": "http://127.0.0.1:9",
        "token": "planted",
        "model": "nano",
        "store": f"file://{tmp_path}",
        "served_model": "nano",
        "edges": [],
    }
    assert open_canaries(Job.model_validate(good)).results() == []
    for changed, message in (
        ({"store": "memory://x"}, "the store is within one process"),
        ({"base_url": "9"}, "base_url='9': write http://"),
        ({"model": str(tmp_path / "none")}, "the tokenizer of .* cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            open_canaries(Job.model_validate(good | changed))
    done = work(good | {"edgs": []})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "job: edgs: Extra inputs are not permitted"
