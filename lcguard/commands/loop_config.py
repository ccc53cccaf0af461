"""What the loop from a leak to a retrained guard does; one YAML file, unknown keys refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcguard.commands.loop_screen import ScreenConfig
from lcguard.commands.train import TrainRun
from lcguard.config import load_config
from lcguard.evaluation.plan import AttackSpec, DataConfig, EvalConfig
from lcguard.evaluation.verdict import UTILITY_SHARE
from lcguard.training.config import AdversaryConfig, PolicyMix, TrainConfig


def _training() -> TrainRun:
    """As the shipped gate's later stages, with what the canaries read in the loop."""
    return TrainRun(
        data=DataConfig(seed=5000, train_records=3000, test_records=500),
        train=TrainConfig(
            steps=300,
            hard_steps=100,
            batch=32,
            optimizer="muon",
            lr=0.0015,
            muon_lr=0.01,
            questions=10,
            leak_ramp=1,
            ce_weight=5.0,
            kl_weight=5.0,
            pair_weight=0.6,
            leak_scale_nats=4.0,
            label_weight=1.0,
            open_weight=1.0,
            gate_weight=0.02,
            band_weight=2.0,
            policies=PolicyMix(all_rate=0.4, none_rate=0.02, derive_rate=0.3),
            adversary=AdversaryConfig(count=1, weight=0.1, objective="kl_prior", attack="probe"),
        ),
    )


def _judge() -> EvalConfig:
    """The attacks of the demo's report; the guards are put in for each judgement."""
    long: dict[str, Any] = {"fit": {"steps": 480, "batch": 24, "lr": 0.005, "muon_lr": 0.03}}
    return EvalConfig(
        title="Judgement of a candidate",
        data=DataConfig(train_records=900, test_records=160),
        attacks=(
            AttackSpec("probe", "probe", {"fit": {"steps": 260, "batch": 2048}}),
            AttackSpec(
                "decoder-warm",
                options={"fit": {"steps": 120, "batch": 32}},
                warm=True,
                clean_fit={"steps": 320, "batch": 32, "lr": 0.005, "muon_lr": 0.03},
            ),
            AttackSpec("decoder-long", options=long),
            AttackSpec("likelihood", "likelihood", {"lists": [10, 100], "max_records": 24}),
        ),
        injection=False,
        explain=0,
    )


@dataclass(frozen=True)
class LoopConfig:
    """One round."""

    model: str = "nano"
    limit: float = 0.2
    """Success rate above which something leaks, as ``canaries.threshold``: an edge closes where a
    screening's lower bound is above it, and a candidate has to keep every category below it."""
    budget: float = 1.25
    """Strength of the attacker in the training, as a multiple of the measured one's: its steps. At
    the measured attack's or a little above, as arXiv 2605.15249 found for perturbations: a stronger
    one costs utility, a weaker one is passed by the next canary."""
    hard_records: int = 300
    """Generated ones with values of what leaked, beside your own: the first to be trained on."""
    utility_share: float = UTILITY_SHARE
    """Least share of the unguarded receiver's right answers that a candidate keeps."""
    certificate_pairs: int = 400
    seed: int = 0
    screen: ScreenConfig = field(default_factory=ScreenConfig)
    train: TrainRun = field(default_factory=_training)
    """``model``, ``init``, ``hard``, the guard and its options are those of the round."""
    judge: EvalConfig = field(default_factory=_judge)
    """``guards`` and ``data.seed`` are those of the round."""

    def __post_init__(self) -> None:
        if not 0 < self.limit < 1:
            raise ValueError(f"limit={self.limit}: give a success rate between 0 and 1")
        if self.budget < 1:
            raise ValueError(
                f"budget={self.budget}: an attacker weaker than the one measured trains a guard "
                "for another leak; give 1 or a little more"
            )
        if self.hard_records < 0 or not 0 <= self.utility_share <= 1:
            raise ValueError(
                f"hard_records={self.hard_records}, utility_share={self.utility_share}: give 0 or "
                "more records and a share within 0..1"
            )
        if all(a.lists for a in self.judge.attacks):
            raise ValueError("judge.attacks names none that writes values: give at least one")
        if self.judge.guards or self.judge.policies:
            raise ValueError("judge.guards and judge.policies are the loop's own: leave them out")


def load_loop(path: Path | None, sets: Sequence[str] = ()) -> LoopConfig:
    """A file's options over the loop's own, part by part. Raises ``ConfigError``."""
    return load_config(LoopConfig, path, sets, base=LoopConfig())
