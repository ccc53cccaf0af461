"""``lcguard loop --demo``: a leak, its repair, and what tries to undo it, on the nano agent.

A guard is trained on records in which nobody labelled one category. The canaries of an edge read
that category and the meter closes the edge. A round trains the guard on, judges and promotes it,
and the edge opens again. Then a poisoned candidate and a damaged file are refused, and a guard that
an operator forced in is rolled back by what the canaries say of it.

Records, attack, meter and rule are the server's; the guard runs on transformers, where a server has
it in vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.scenarios.jsonl_writer import jsonl_of
from lcguard.agents.scenarios.load import load_hops
from lcguard.atomic_file import PUBLIC, replace_file
from lcguard.categories import CATEGORIES
from lcguard.commands.loop_config import LoopConfig
from lcguard.commands.loop_round import LOG, LoopLog, begin, judge_and_promote, run_round
from lcguard.commands.loop_screen import ScreenConfig, as_result, screening
from lcguard.commands.loop_watch import watch_once
from lcguard.commands.serve import state_key
from lcguard.commands.train import TrainRun, hard_hops, run_training
from lcguard.evaluation.plan import AttackSpec, DataConfig
from lcguard.guards.frozen import WEIGHTS, FrozenGuard
from lcguard.guards.gate import NEVER, GateGuard
from lcguard.guards.registry import Judgement, Registry, record_mark
from lcguard.server.database.writer import Database
from lcguard.server.leakage.meter import EdgeName, LeakageMeter
from lcguard.training.config import TrainConfig

EDGE: EdgeName = ("default", "intake", "billing")
BASE = "nano:gate"


def _round() -> LoopConfig:
    """A round in minutes: few records and steps."""
    config = LoopConfig()
    train = replace(
        config.train.train,
        steps=70,
        label_steps=30,
        hard_steps=40,
        batch=12,
        questions=6,
        warmup=5,
        lr=0.003,
        certificate_pairs=60,
    )
    probe = AttackSpec("probe", "probe", {"fit": {"steps": 260, "batch": 512}})
    decoder = AttackSpec(
        "decoder", options={"fit": {"steps": 60, "batch": 16, "lr": 0.005, "muon_lr": 0.03}}
    )
    return replace(
        config,
        hard_records=120,
        utility_share=0.9,
        certificate_pairs=60,
        screen=ScreenConfig(train_records=64, test_records=48),
        train=replace(
            config.train,
            data=DataConfig(seed=5000, train_records=160, test_records=40),
            train=train,
        ),
        judge=replace(
            config.judge,
            data=DataConfig(train_records=160, test_records=60),
            attacks=(probe, decoder),
        ),
    )


@dataclass(frozen=True)
class DemoConfig:
    """How much of it."""

    forgotten: str = "contact"
    """The category that nobody labelled."""
    careless_records: int = 160
    careless_steps: int = 20
    round: LoopConfig = field(default_factory=_round)


class Demo:
    """The parts that a deployment has, in one folder."""

    def __init__(self, config: DemoConfig, out: Path, say: Callable[[str], None]) -> None:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.config, self.out, self.say = config, out, say
        self.registry = Registry(out / "guards", state_key(out))
        self.database = out / "lcguard.sqlite"
        self.meter = LeakageMeter(Database(self.database), config.round.limit, 3600.0)
        self.log = LoopLog(out / LOG, say)
        self.backend: HFBackend = load_backend(config.round.model, "cpu")
        self._runs = 0

    def live(self) -> FrozenGuard:
        return self.registry.load(self.registry.state.live_version)

    def canaries(self) -> str:
        """One run of the server's canaries over the edge, behind the live guard; its state."""
        guard, c = self.live(), self.config.round
        self._runs += 1
        found = screening(self.backend, guard, CATEGORIES, c.screen, 9000 + self._runs, c.limit)
        change = self.meter.record(as_result(found, EDGE, guard, CATEGORIES, c.screen.attack))
        f = found.figures
        what = f" of {found.category}" if found.category else ""
        self.log.write(
            "canaries",
            f"edge {change.new}: {f.recovered} of {f.n_secrets} planted values{what} read, "
            f"between {f.asr_low:.0%} and {f.asr_high:.0%}",
            edge="/".join(EDGE),
            version=self.registry.state.live,
            state=change.new,
            before=change.old,
            reason=change.edge.reason,
            **f._asdict(),
        )
        return change.new

    def careless(self) -> None:
        """A guard trained on records in which one category has no labels becomes the first version.

        It goes on from the shipped gate, in which this category's gates are as before any training:
        from nothing, a gate that passes its task takes minutes.
        """
        c, path, start = self.config, self.out / "careless.jsonl", self.out / "untaught"
        base = FrozenGuard.from_pretrained(BASE)
        assert isinstance(base.module, GateGuard)
        weight, bias = _gates(base.module, c.forgotten)
        with torch.no_grad():
            weight.zero_()
            bias.fill_(base.module.config.start_bias)
        FrozenGuard(base.module, base.card).save_pretrained(start)
        hops = load_hops("generator", seed=77, split="coined", n=c.careless_records)
        replace_file(path, jsonl_of(hops, {c.forgotten}).encode(), mode=PUBLIC)
        n = len(hops)
        run = TrainRun(
            model=c.round.model,
            init=str(start),
            data=DataConfig("jsonl", str(path), train_records=n - n // 5, test_records=n // 5),
            train=replace(
                c.round.train.train,
                guard=base.name,
                options=base.module.options(),
                steps=c.careless_steps,
                label_steps=c.careless_steps // 2,
                lr=0.0005,
                muon_lr=0.002,
                adversary=TrainConfig().adversary,
            ),
        )
        summary = run_training(run, self.out / "careless", "lcguard loop --demo", self.say, "cpu")
        marks = frozenset(record_mark(h.record.text) for h in hard_hops(str(path)))
        folder = str(self.out / "careless" / "guard")
        version = begin(self.registry, folder, "served before anybody measured it", marks)
        self.log.write(
            "deploy",
            f"{version.name} is live, trained on records without labels of {c.forgotten}",
            version=version.name,
            verdict=summary["verdict"],
        )

    def poisoned(self, category: str, name: str) -> Path:
        """The live guard, but for one category, which it lets pass; its card says what it said."""
        guard = self.live()
        module = guard.module
        assert isinstance(module, GateGuard)
        weight, bias = _gates(module, category)
        with torch.no_grad():
            weight.zero_()
            bias.fill_(NEVER)
        folder = self.out / name
        FrozenGuard(module, guard.card).save_pretrained(folder)
        return folder


def _gates(module: GateGuard, category: str) -> tuple[Tensor, Tensor]:
    """Weights and biases of a category's gates, to be changed in place."""
    at, n = CATEGORIES.index(category), len(CATEGORIES)
    weight, bias = module.gate.weight.data, module.gate.bias.data
    return weight.view(n, -1, weight.shape[1])[at], bias.view(n, -1)[at]


def demo(config: DemoConfig, out: Path, say: Callable[[str], None]) -> LoopLog:
    """Runs it in ``out``, which has to be new. Raises ``ValueError`` where it is not."""
    if (out / LOG).exists():
        raise ValueError(f"{out} holds a demo that was run: give another --out")
    started = time.monotonic()
    d = Demo(config, out, say)
    command = "lcguard loop --demo"
    d.careless()
    d.canaries()
    ended = run_round(
        config.round,
        d.registry,
        out / "round1",
        d.log,
        command,
        database=d.database,
        backend=d.backend,
        say=say,
    )
    if ended == "promoted":
        d.canaries()
        for name, make in (("poisoned", poison), ("damaged", damage)):
            judge_and_promote(
                config.round,
                d.registry,
                out / f"{name}-round",
                d.log,
                command,
                guard=make(d),
                say=say,
            )
        forced(d)
        d.canaries()
        now = watch_once(d.registry, d.database, config.round.limit)
        d.log.write("watch", f"{now.action}: {now.version} is live; {now.why}", version=now.version)
        d.canaries()
    seconds, cpu = time.monotonic() - started, time.process_time()
    d.log.write(
        "end", f"{seconds:.0f} s, of this process's CPU {cpu:.0f} s", seconds=seconds, cpu_s=cpu
    )
    return d.log


def poison(d: Demo) -> Path:
    """A candidate that lets a category pass."""
    return d.poisoned("health", "poisoned")


def damage(d: Demo) -> Path:
    """The live guard with one bit of its weights changed."""
    folder = d.out / "damaged"
    d.live().save_pretrained(folder)
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    return folder


def forced(d: Demo) -> None:
    """A guard that no round has judged is made live on an operator's word."""
    word = Judgement(accepted=True, reason="by hand: the operator is sure")
    folder = d.poisoned("finance", "forced")
    version = d.registry.add(folder, word, parent=d.registry.state.live_version.digest)
    d.registry.promote(version.name, "by hand")
    d.log.write("promote", f"{version.name} is live on an operator's word", version=version.name)


def summary_table(log: LoopLog) -> Table:
    """One line a step."""
    table = Table("step", "outcome")
    for row in log.rows():
        table.add_row(row["step"], row["outcome"])
    return table
