"""Rounds of a detector's training against attackers: what they recover, it then learns.

A detector misses almost nothing of the records that it was fitted on, so attackers are asked about
others: the training records of every source are divided by scenario, and each round attacks a part
that no fit has seen. Values that are recovered from its twins weigh more in all fits that follow,
and the part joins the training records. What else a round may do is in
``lcguard.training.hard_examples``; a round after which the validation records cost more may be
taken back (after arXiv 2605.15959): the weights are, what attackers found stays known.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lcguard.agents.backends.hf import HFBackend
from lcguard.attacks.base import attack_class
from lcguard.evaluation.attacked_twins import AT_ONCE, RECOVERED, Attackers
from lcguard.evaluation.fresh_attacks import check_fresh
from lcguard.evaluation.plan import AttackSpec, Plan
from lcguard.guards.frozen import weights_digest
from lcguard.guards.twin import TwinGuard
from lcguard.tokens import TokenRecord, TokenSpan
from lcguard.training.fit_detector import DetectorConfig, ReadRecords, fit_detector
from lcguard.training.hard_examples import NOTHING, Emphasis, divided, recovery_budgets
from lcguard.training.kept_tensors import KeptTensors

CHOSEN_LATER = ("touch_cost", "thresholds", "peaks")
"""Settings of what is chosen once the detector is fitted."""


@dataclass(frozen=True)
class RoundsConfig:
    """Rounds after a detector's first fit, which then sees one part of the records alone."""

    count: int = 0
    """How many; 0: one fit on all records."""
    steps: int = 150
    """Of each round's fit."""
    lr: float | None = None
    """Of each round's fit; none: the first one's."""
    records: int = 96
    """Attacked in each round, at most; as many teach an attacker that is fitted."""
    attacks: tuple[AttackSpec, ...] = (AttackSpec("inversion", "inversion"),)
    hard_weight: float = 3.0
    """Of a recovered value's tokens against those of other values."""
    budget_strength: float = 0.0
    """0..1: how much more the values of categories weigh of which more were recovered in the
    round, and those of others less."""
    uncertain_nats: float = 0.0
    """Distance of detector and label from which on a round's labels are less certain; 0: never."""
    rollback_slack: float | None = None
    """A round whose validation cost is above the lowest so far by more than this share of it is
    taken back; none: no round is."""

    def __post_init__(self) -> None:
        for name, low, high, fix in (
            ("count", 0, None, "0 or more"),
            ("steps", 1, None, "1 or more"),
            ("records", 1, None, "1 or more"),
            ("budget_strength", 0, 1, "0 to 1"),
            ("uncertain_nats", 0, None, "0 (off) or more"),
            ("rollback_slack", 0, None, "0 or more, or null"),
        ):
            value = getattr(self, name)
            if value is not None and not (low <= value and (high is None or value <= high)):
                raise ValueError(f"rounds.{name} = {value}: use {fix}")
        for name in ("hard_weight", "lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"rounds.{name} = {value}: use a number above 0")

    def check_attacks(self) -> None:
        """Raises ``ValueError`` for no attack, an unknown one, or one that is not fresh."""
        if not self.attacks:
            raise ValueError("rounds.attacks is empty: name one, such as inversion")
        for spec in self.attacks:
            attack_class(spec.attack).build({k: v for k, v in spec.options.items() if k != "fit"})
            if spec.warm:
                raise ValueError(f"rounds.attacks: {spec.name!r} starts warm: leave out warm")
        check_fresh(Plan(attacks=self.attacks))


@dataclass(frozen=True)
class Stage:
    """What the rounds act on."""

    backend: HFBackend
    module: TwinGuard
    """Fitted in place."""
    config: DetectorConfig
    kept: KeptTensors
    """Of fits and attacks that are done."""
    choose: Callable[[], TwinGuard]
    """The guard that the detector now makes, with what is chosen on validation records."""
    cost: Callable[[TwinGuard], float]
    """On these, the mean of the sources."""
    by_reply: bool = False
    """Whether an attacker's reply counts by what it says."""
    say: Callable[[str], None] = lambda text: None
    advance: Callable[[int], None] = lambda steps: None

    def fit(
        self, data: Sequence[ReadRecords], config: DetectorConfig, emphasis: Emphasis, began: str
    ) -> None:
        """Or takes what was kept of the same fit; ``began``: what it goes on from."""
        key = self._key(data, config, emphasis, began)
        if (fitted := self.kept.get(key)) is not None:
            self.module.detector.load_state_dict(fitted)
            self.advance(config.steps)
            return
        fit_detector(self.module, data, config, lambda step, loss: self.advance(1), emphasis)
        self.kept.put(key, self.module.detector.state_dict())

    def _key(
        self, data: Sequence[ReadRecords], config: DetectorConfig, emphasis: Emphasis, began: str
    ) -> list[Any]:
        """All that a fitted detector depends on; thresholds come after it."""
        own = {k: v for k, v in asdict(config).items() if k not in CHOSEN_LATER}
        options = self.module.options()
        shape = {k: options[k] for k in ("layers", "width", "blocks", "reach_tokens")}
        key = ["detector", began, own, shape, [[r.ids for r in d.records] for d in data]]
        if emphasis == NOTHING:
            return key
        hard = [[[_place(s) for s in d.hard_of(i)] for i in range(len(d.records))] for d in data]
        return [*key, asdict(emphasis), hard, [_labels(d.records) for d in data]]


def play(
    rounds: RoundsConfig, stage: Stage, train: Sequence[ReadRecords], began: str = ""
) -> tuple[TwinGuard, list[dict[str, Any]]]:
    """Fits the stage's detector; returns the guard and, of each round, what came of it. The first
    entry is that of the fit before the rounds.

    ``train``: one entry a source. ``began``: digest of the weights gone on from, empty for fresh
    ones. Raises ``ValueError`` for a source with fewer scenarios than parts.
    """
    if not rounds.count:
        stage.fit(train, stage.config, NOTHING, began)
        return stage.choose(), []
    parts = [_parts(source, rounds.count + 1, stage.config.seed) for source in train]
    seen = [part[0] for part in parts]
    stage.fit(seen, stage.config, NOTHING, began)
    guard = stage.choose()
    lowest, best = stage.cost(guard), copy.deepcopy(stage.module.detector.state_dict())
    done: list[dict[str, Any]] = [_entry(0, Counter(), Counter(), lowest)]
    stage.say(_line(done[0]))
    for n in range(1, rounds.count + 1):
        fresh, asked, recovered = _mined(rounds, stage, guard, seen, [p[n] for p in parts])
        seen = [a + b for a, b in zip(seen, fresh, strict=True)]
        budgets = recovery_budgets(
            [d.records for d in seen], asked, recovered, rounds.budget_strength
        )
        emphasis = Emphasis(rounds.hard_weight, budgets, rounds.uncertain_nats)
        stage.fit(seen, _later(stage.config, rounds, n), emphasis, weights_digest(stage.module))
        guard = stage.choose()
        cost = stage.cost(guard)
        entry = _entry(n, asked, recovered, cost)
        if budgets:
            entry["budgets"] = budgets
        slack = rounds.rollback_slack
        if slack is not None and cost > lowest * (1 + slack):
            stage.module.detector.load_state_dict(best)
            guard, entry["rolled_back"] = stage.choose(), True
        elif cost <= lowest:
            lowest, best = cost, copy.deepcopy(stage.module.detector.state_dict())
        done.append(entry)
        stage.say(_line(entry))
    return guard, done


def _mined(
    rounds: RoundsConfig,
    stage: Stage,
    guard: TwinGuard,
    seen: Sequence[ReadRecords],
    fresh: Sequence[ReadRecords],
) -> tuple[list[ReadRecords], Counter[str], Counter[str]]:
    """The fresh records with what attackers recovered of them; how many values of each category
    they were asked about, and recovered."""
    seed = stage.config.seed
    fits = any(attack_class(spec.attack).fitted for spec in rounds.attacks)
    pairs = _sample(seen, rounds.records if fits else min(AT_ONCE, rounds.records), seed)
    chosen = _sample(fresh, rounds.records, seed)
    known, victims = _together(seen, pairs), _together(fresh, chosen)
    attackers = Attackers(stage.backend, rounds.attacks, seed, stage.by_reply)
    found = _kept_attack(attackers, stage, guard, known, victims) if victims.records else []
    hard: list[list[tuple[TokenSpan, ...]]] = [[() for _ in d.records] for d in fresh]
    asked, recovered = Counter[str](), Counter[str]()
    for (source, i), record, codes in zip(chosen, victims.records, found, strict=True):
        spans = [s for s in record.spans if s.secret and s.category is not None]
        asked.update(str(s.category) for s, c in zip(spans, codes, strict=True) if c)
        won = tuple(s for s, c in zip(spans, codes, strict=True) if c == RECOVERED)
        recovered.update(str(s.category) for s in won)
        hard[source][i] = won
    return [replace(d, hard=tuple(h)) for d, h in zip(fresh, hard, strict=True)], asked, recovered


def _kept_attack(
    attackers: Attackers,
    stage: Stage,
    guard: TwinGuard,
    known: ReadRecords,
    victims: ReadRecords,
) -> list[list[int]]:
    """What the attackers recover, or what was kept of it."""
    own = {**guard.options(), "weights": weights_digest(guard)}
    told = [asdict(spec) for spec in attackers.attacks], attackers.seed, attackers.by_reply
    rows = [[[r.record_id, r.ids] for r in d.records] for d in (known, victims)]
    key = ["attacked", own, *told, rows, _labels(known.records), _labels(victims.records)]
    if (kept := stage.kept.get(key)) is not None:
        flat = iter(kept["found"].tolist())
        return [[next(flat) for _ in r.secrets()] for r in victims.records]
    found = attackers.recovered(guard, known, victims)
    codes = torch.tensor([code for row in found for code in row], dtype=torch.uint8)
    stage.kept.put(key, {"found": codes})
    return found


def _parts(source: ReadRecords, n: int, seed: int) -> list[ReadRecords]:
    return [source.part(at) for at in divided(source.records, n, seed)]


def _sample(sources: Sequence[ReadRecords], n: int, seed: int) -> list[tuple[int, int]]:
    """At most ``n`` records with secrets, of each source as many: source and place."""
    out: list[tuple[int, int]] = []
    names: set[str] = set()
    for k, source in enumerate(sources):
        rng = random.Random(f"rounds/{seed}/{k}")
        at = [i for i, r in enumerate(source.records) if r.secrets()]
        rng.shuffle(at)
        share = n // len(sources) + (k < n % len(sources))
        # guesses name their record
        for i in [i for i in at if source.records[i].record_id not in names][:share]:
            names.add(source.records[i].record_id)
            out.append((k, i))
    return out


def _together(sources: Sequence[ReadRecords], at: Sequence[tuple[int, int]]) -> ReadRecords:
    records = tuple(sources[k].records[i] for k, i in at)
    return ReadRecords(records, tuple(sources[k].features[i] for k, i in at))


def _later(config: DetectorConfig, rounds: RoundsConfig, n: int) -> DetectorConfig:
    """Of the fit in round ``n``, which draws other records than those before it."""
    return replace(
        config,
        steps=rounds.steps,
        lr=config.lr if rounds.lr is None else rounds.lr,
        warmup=max(1, min(config.warmup, rounds.steps // 4)),
        seed=config.seed + n,
    )


def _place(span: TokenSpan) -> tuple[int, int, str | None]:
    return span.start, span.end, span.category


def _labels(records: Sequence[TokenRecord]) -> list[list[Any]]:
    """What of the records a fit and an attack read beside their tokens."""
    return [[r.forbid, [[*_place(s), s.secret] for s in r.spans]] for r in records]


def _entry(n: int, asked: Counter[str], recovered: Counter[str], cost: float) -> dict[str, Any]:
    return {
        "round": n,
        "asked": asked.total(),
        "recovered": recovered.total(),
        "categories": {c: {"asked": asked[c], "recovered": recovered[c]} for c in sorted(asked)},
        "validation_cost": cost,
        "rolled_back": False,
    }


def _line(entry: dict[str, Any]) -> str:
    cost = f"validation cost {entry['validation_cost']:.4f}"
    if not entry["round"]:
        return f"before the rounds: {cost}"
    back = ", taken back" if entry["rolled_back"] else ""
    return (
        f"round {entry['round']}: {entry['recovered']} of {entry['asked']} recovered, {cost}{back}"
    )
