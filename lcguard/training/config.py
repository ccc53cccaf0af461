"""Everything that determines a training run; one YAML file, unknown keys refused."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lcguard.training.schedule import Phase, check_schedule, phase_at


@dataclass(frozen=True)
class AdversaryConfig:
    """Attackers inside the training loop."""

    count: int = 0
    """How many; 0 trains without."""
    weight: float = 0.0
    """beta: weight of the adversarial term in the guard's loss."""
    objective: Literal["ce", "kl_prior", "least_squares"] = "ce"
    """``ce`` maximises the attacker's cross-entropy (the paper's minus L_rec), which has no end;
    ``kl_prior`` pulls the attacker's prediction to the prior of the field; ``least_squares`` pulls
    the probability of the true token there, by the square of the distance."""
    steps_per_guard_step: int = 1
    lag: int = 1
    """The attackers learn only every ``lag``-th guard step."""
    reset_every: int = 0
    """Re-initialise one attacker in turn every so many steps; 0 never."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the attack that serves as adversary."""
    attack: str = "decoder"


@dataclass(frozen=True)
class PolicyMix:
    """Which policies the guard sees in training."""

    all_rate: float = 0.4
    """Share of records under which everything is forbidden."""
    none_rate: float = 0.05
    """Share under which nothing is; under the rest, a random subset of a random size."""
    derive_rate: float = 0.25
    """Probability that a forbidden derivable category keeps its derived value."""


@dataclass(frozen=True)
class TrainConfig:
    guard: str = "gate"
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the guard, such as ``width`` or ``bottleneck``."""
    seed: int = 0
    steps: int = 500
    """0: only the average with another guard, and its certificate."""
    batch: int = 32
    lr: float = 2e-3
    warmup: int = 30
    questions: int = 6
    """Most questions a record and step."""
    kl_weight: float = 1.0
    """Receiver on guarded KV against receiver on raw KV."""
    ce_weight: float = 1.0
    """Receiver on guarded KV against the true answers."""
    band_weight: float = 3.0
    """Weight of allowed derived answers to forbidden values, beside 1 of task answers."""
    allowed_weight: float = 1.0
    """Weight of answers with values of secret categories that the policy allows."""
    pair_weight: float = 0.2
    """Weight of log1p(pair leak / leak_scale_nats)."""
    leak_scale_nats: float = 1.0
    """Leaks well below it cost little: the receiver is not starved for tenths of a nat while the
    certificate's mean is made by the worst few contexts."""
    tail_weight: float = 0.0
    """Weight of the mean of log1p(leak / leak_scale_nats) over the worst ``tail_share`` of a batch,
    each record paired with itself with one forbidden secret, drawn at random, resampled: the
    conditional value at risk (CVaR) of what a segment tells about one secret."""
    tail_share: float = 0.25
    twin_weight: float = 0.0
    """Weight of the mean squared distance to the twin's KV."""
    teacher: Literal["raw", "twin"] = "raw"
    """Whose receiver the KL term distils: the one on raw KV, or on the twin's, with forbidden
    values masked. The latter says nothing of derived answers, which are then left to the CE term.
    """
    uncertain_nats: float = 0.0
    """Distance from which the teacher grows less certain, token by token; 0 never. See
    ``lcguard.training.uncertain_teacher``."""
    rare_strength: float = 0.0
    """0..1: how far leaks of rare categories weigh more than those of frequent ones. See
    ``lcguard.training.rare_categories``."""
    rare_warmup: float = 0.25
    """Share of the steps over which that grows."""
    trace_weight: float = 0.0
    """Weight of log1p of the nats by which a guarded segment tells a displacement along the traces
    that secrets leave. See ``lcguard.training.secret_traces``."""
    trace_directions: int = 0
    """Of each layer's keys and values, so many, the largest; 0 takes all."""
    trace_noise: float = 0.0
    """How much more noise the guard starts with along those directions, in units of the variance of
    a trace; for guards with full maps."""
    category_weight: float = 0.0
    """Weight of an adversary that names the category of what was withheld. See
    ``lcguard.training.category_adversary``."""
    rollback_every: int = 0
    """Steps after which the loss is taken on records held back, and a guard that got worse is set
    back, attackers and all; 0 never. See ``lcguard.training.rollback``."""
    rollback_slack: float = 0.05
    """Share by which that loss may exceed the lowest."""
    label_steps: int = 0
    """First so many steps teach a gate where the values of each category stand, from the spans
    alone: cheap, and the counterfactuals then only have to say what else to withhold."""
    label_weight: float = 0.0
    """Weight of the spans' labels in the steps after that."""
    hard_steps: int = 0
    """First so many steps, those on labels included, see the records alone that a guard before has
    failed on; what they teach is then kept among all others. Without such records it says nothing.
    """
    open_weight: float = 0.0
    """Share of the labels for opening each category's gates on the values of the others: numbers
    that are allowed look like numbers that are not."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon``: the hidden matrices by Muon, the rest by AdamW."""
    muon_lr: float = 0.02
    ema: float = 0.0
    """Decay a step of the running average of the weights that the run ends with; 0 ends with the
    last weights, or with the equal average of phases that say ``average``."""
    schedule: tuple[Phase, ...] = ()
    """Parts of the run in which other settings hold."""
    gate_weight: float = 0.05
    """Weight of the mean withheld share, for guards that withhold."""
    leak_ramp: int = 60
    """Steps over which the leak terms grow to full weight."""
    temperature: float = 1.0
    """Of the teacher in the KL term."""
    policies: PolicyMix = field(default_factory=PolicyMix)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    checkpoint_every: int = 50
    path_hops: int = 1
    """1: Per-Agent, every segment on its own. More: Full-System, paths of so many agents, each
    segment made on top of the guarded one before, attackers reading all of a path together."""
    merge_rate: float = 0.0
    """Share of the Full-System steps whose receiver reads a segment behind the one before it."""
    certificate_pairs: int = 400
    """Held-out records, of which one secret a scenario is looked at by itself."""
    certificate_references: int = 32
    """Contexts with other values that each of these secrets is compared with: more make the ceiling
    tighter, and the certificate takes longer."""
    certificate_level: float = 0.95

    def at(self, step: int) -> TrainConfig:
        """The settings that hold in a step."""
        phase = phase_at(self.schedule, step, self.steps)
        return self if phase is None else replace(self, **phase.changes())

    @property
    def averages(self) -> bool:
        """Whether the run ends with an average of its weights."""
        return bool(self.ema) or any(p.average for p in self.schedule)

    def averages_at(self, step: int) -> bool:
        """Whether the weights after a step count in it: where no phase says so, all do."""
        phase = phase_at(self.schedule, step, self.steps)
        chosen = any(p.average for p in self.schedule)
        return self.averages and (phase is not None and phase.average if chosen else True)

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} must be at least 0")
        for name in ("hard_steps", "rollback_every", "uncertain_nats", "trace_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        for name in (
            "batch",
            "questions",
            "checkpoint_every",
            "path_hops",
            "certificate_references",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch % self.path_hops:
            raise ValueError(
                f"batch={self.batch} must be a multiple of path_hops={self.path_hops}: "
                "a step holds whole paths"
            )
        if not 0 < self.tail_share <= 1:
            raise ValueError(f"tail_share={self.tail_share} must be above 0 and at most 1")
        for name in ("merge_rate", "rare_strength", "rare_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be within 0..1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must be at least 0 and below 1")
        if self.adversary.weight and not self.adversary.count:
            raise ValueError(
                f"adversary.weight={self.adversary.weight} without attackers: set adversary.count"
            )
