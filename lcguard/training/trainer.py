"""The training loop of every guard, through accelerate: CPU, one GPU or many.

Batches, policies, counterfactuals and noise are functions of ``(seed, step)``, so a run that was
killed resumes from its last checkpoint to the same weights. Of several processes each takes its
rows of every batch (``shards``), and all together make the step of one.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import Progress, TextColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lcguard.atomic_file import PUBLIC, replace_file
from lcguard.categories import CATEGORIES
from lcguard.guards.base import GuardModule, KVShape, guard_class
from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import AttackData, KVBatch
from lcguard.records import TokenRecord
from lcguard.source import ModelSource
from lcguard.tokens import Special
from lcguard.training.adversary import AdversaryFactory, Ensemble
from lcguard.training.category_adversary import CategoryAdversary
from lcguard.training.checkpoint import load_checkpoint, read_meta, save_checkpoint
from lcguard.training.config import TrainConfig
from lcguard.training.joint import observed
from lcguard.training.label_loss import label_loss
from lcguard.training.objective import Objective
from lcguard.training.prepare import prepare, split_held, traces_of
from lcguard.training.rare_categories import category_shares
from lcguard.training.rollback import SNAPSHOT, HeldBack, keep_or_go_back
from lcguard.training.schedule import phase_at
from lcguard.training.shards import Shards
from lcguard.training.steps import StepData, Steps, draw_batch
from lcguard.training.twins import ValuePool


@dataclass
class Run:
    """A finished training run."""

    guard: FrozenGuard
    ensemble: Ensemble
    metrics: list[dict[str, Any]]
    seconds: float
    processes: int = 1
    """That its batches were divided among, in the end."""


def make_module(config: TrainConfig, source: ModelSource) -> GuardModule:
    """The untrained guard for the source's model."""
    torch.manual_seed(config.seed)
    return guard_class(config.guard).build(
        KVShape(*source.shape), len(CATEGORIES), dict(config.options)
    )


def check_trained(name: str) -> None:
    """Raises ``ValueError`` for a guard without parameters, or one that is not known."""
    if not guard_class(name).trained:
        raise ValueError(f"guard {name!r} has nothing to train; use it as it is")


def train_guard(
    config: TrainConfig,
    records: Sequence[TokenRecord],
    source: ModelSource,
    special: Special,
    out: Path,
    factory: AdversaryFactory | None = None,
    init: FrozenGuard | None = None,
    progress: bool | None = None,
    hard: Sequence[TokenRecord] = (),
    written: Callable[[Sequence[dict[str, Any]]], None] = lambda rows: None,
) -> Run:
    """Trains on ``records`` and returns the frozen guard; ``hard`` are records beside them that
    the first ``config.hard_steps`` see alone. ``written`` is told what ``metrics.jsonl`` holds,
    once the checkpoint that goes with it is on the disk.

    ``out`` gets ``metrics.jsonl`` and, while the run lasts, ``checkpoint.safetensors``. Raises
    ``ValueError`` for a guard without parameters, an adversary without factory, or a loss that is
    not finite.
    """
    check_trained(config.guard)
    if config.adversary.count and factory is None:
        raise ValueError("config.adversary.count > 0 needs a factory for the attackers")
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, records, source, special, factory or _no_adversary, init, hard)
    state = out / "checkpoint.safetensors"
    first, spent = trainer.resume(state)
    metrics = _kept_metrics(out / "metrics.jsonl", first)
    started = time.monotonic() - spent
    is_main = trainer.accelerator.is_main_process
    with _bar(progress, is_main) as bar:
        task = bar.add_task(f"train {config.guard}", total=config.steps, completed=first, note="")
        for step in range(first, config.steps):
            row, done = trainer.step(step), step + 1
            settles = bool(config.rollback_every) and done % config.rollback_every == 0
            if settles:
                row |= trainer.settle(out)
            metrics.append({"step": step, **row})
            bar.update(task, advance=1, note=_note(row))
            saves = settles or done % config.checkpoint_every == 0 or done == config.steps
            if is_main and saves:
                _write_metrics(out / "metrics.jsonl", metrics)
                trainer.save(state, done, time.monotonic() - started)
                written(metrics)
    guard = FrozenGuard(trainer.finished())
    seconds = time.monotonic() - started
    return Run(guard, trainer.ensemble, metrics, seconds, trainer.shards.count)


class Trainer:
    """The guard, its attackers and their optimisers, step by step."""

    def __init__(
        self,
        config: TrainConfig,
        records: Sequence[TokenRecord],
        source: ModelSource,
        special: Special,
        factory: AdversaryFactory,
        init: FrozenGuard | None = None,
        hard: Sequence[TokenRecord] = (),
    ) -> None:
        records = [*hard, *records]
        self.config, self.special = config, special
        records, held = split_held(records, config)
        self.accelerator = Accelerator(cpu=source.device.type == "cpu")
        self.shards = Shards(self.accelerator)
        self.module = make_module(config, source)
        self.module.to(source.device)
        self._own = self.module.config
        pool = ValuePool(records)
        pairs = prepare(self.module, records, source, special, pool, config.path_hops)
        traces = traces_of(self.module, records, source, pool, config)
        if init is not None:  # weights and statistics of a trained guard
            self.module.load_state_dict(init.module.state_dict())
        self.ensemble = Ensemble(config.adversary, factory, pairs, config.seed)
        self.names: CategoryAdversary | None = None
        if config.category_weight:
            with torch.random.fork_rng([]):
                torch.manual_seed(config.seed + 1)
                self.names = CategoryAdversary(KVShape(*source.shape).channels).to(source.device)
        self.optimizers = make_optimizers(self.module, config, self.names)
        self.average: AveragedModel | None = None
        if config.averages:
            decayed = get_ema_multi_avg_fn(config.ema) if config.ema else None
            self.average = AveragedModel(self.module, multi_avg_fn=decayed)
        by_length, hard = (sorted(rows, key=lambda r: len(r.ids)) for rows in (records, hard))
        self.steps = Steps(by_length, pool, source, config, special.neutral_id, hard, self.shards)
        shares = category_shares(records) if config.rare_strength else {}
        self.objective = Objective(config, source, pool, self.shards, shares, traces, self.names)
        self.held: HeldBack | None = None
        if held:
            apart = replace(config, batch=len(held))
            steps = Steps(held, pool, source, apart, special.neutral_id, (), self.shards)
            self.held = HeldBack(steps, self.objective)

    def step(self, step: int) -> dict[str, float]:
        """One step of guard and attackers; returns its figures."""
        rng = random.Random(f"{self.config.seed}/{step}/0")  # of one process among many, once
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        self.module.train()
        self._set_noise(step)
        label = step < self.config.label_steps
        row = self._label(rng, step) if label else self._guard(rng, generator, step)
        if self.average is not None and self.config.averages_at(step):
            self.average.update_parameters(self.module)
        return row

    def _set_noise(self, step: int) -> None:
        """What the phase says; the guard is finished with what holds after the last step."""
        phase = phase_at(self.config.schedule, step, self.config.steps)
        if phase is not None and phase.noise is not None:
            self.module.config = replace(self.module.config, noise=phase.noise)
        elif phase is not None:
            self.module.config = self._own

    def _label(self, rng: random.Random, step: int) -> dict[str, float]:
        chosen = draw_batch(rng, self.steps.seen_at(step), self.config.batch)
        chosen = [chosen[i] for i in self.shards.rows(len(chosen))]
        raw = self.steps.source.prefill([r.ids for r in chosen], batch=len(chosen))
        loss = label_loss(self.module, chosen, raw, self.steps.pool, self.shards)
        self._descend(loss, step)
        return self.shards.total({"loss": float(loss.detach())})

    def _guard(self, rng: random.Random, generator: torch.Generator, step: int) -> dict[str, float]:
        data = self.steps.draw(rng, self.module, generator, step)
        total, metrics, guarded = self.objective.losses(self.module, data, generator, step)
        loss = float(total.detach())
        if not self.ensemble.members:
            self._descend(total, step)
            return self.shards.total({"loss": loss, **metrics})
        # attackers read the whole batch in every process, and so are the same in all of them
        whole = self.shards.whole(guarded, data.n_paths, data.hops)
        term = self.ensemble.guard_term(self._observed(data, whole))
        self._descend(total + term, step)
        row = self.shards.total(
            {"loss": loss + float(term.detach()) / self.shards.count, **metrics}
        )
        stale = KVBatch(whole.keys.detach(), whole.values.detach(), whole.valid)
        return row | self.ensemble.learn(self._observed(data, stale), step)

    def _observed(self, data: StepData, kv: KVBatch) -> AttackData:
        return observed(data.everyone, kv, self.special, self.config.path_hops)

    def _descend(self, loss: Tensor, step: int) -> None:
        """Gradients are added over processes by hand: the guard is small, and its passes (raw,
        pair, labels) do not all go through one forward, which a wrapper would expect."""
        config = self.config.at(step)
        if not math.isfinite(float(loss.detach())):
            raise ValueError(f"loss is {float(loss.detach())} at step {step}; lower lr={config.lr}")
        for optimizer, base in zip(self.optimizers, (config.lr, config.muon_lr), strict=False):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = base * _rate(step, config)
        self.accelerator.backward(loss)
        beside = () if self.names is None else tuple(self.names.parameters())
        self.shards.add_gradients([*self.module.parameters(), *beside])
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()

    def resume(self, state: Path) -> tuple[int, float]:
        """The step to go on with and the seconds spent before; 0 where there is no checkpoint."""
        if not state.exists():
            return 0, 0.0
        # before the weights: those of another configuration need not even fit
        if read_meta(state).get("config") != json.loads(json.dumps(asdict(self.config))):
            raise ValueError(
                f"{state} belongs to another configuration; delete it or use another out"
            )
        meta = load_checkpoint(state, *self._kept())
        return meta["step"], meta["seconds"]

    def save(self, state: Path, step: int, seconds: float) -> None:
        meta = {"step": step, "seconds": seconds, "config": asdict(self.config)}
        save_checkpoint(state, *self._kept(), meta)

    def settle(self, folder: Path) -> dict[str, float]:
        """Keeps what the run has come to, or goes back; figures of the step. See ``rollback``."""
        assert self.held is not None
        loss = self.held.loss(self.module)
        back = keep_or_go_back(
            folder / SNAPSHOT,
            loss,
            self.config.rollback_slack,
            *self._kept(),
            writes=self.accelerator.is_main_process,
            wait=self.accelerator.wait_for_everyone,
        )
        return {"held_back": loss, "went_back": float(back)}

    def _kept(self) -> tuple[dict[str, nn.Module], list[torch.optim.Optimizer]]:
        """What a checkpoint holds."""
        modules: dict[str, nn.Module] = {"guard": self.module, **self.ensemble.modules()}
        if self.average is not None:
            modules["average"] = self.average
        if self.names is not None:
            modules["names"] = self.names
        return modules, [*self.optimizers, *self.ensemble.optimizers]

    def finished(self) -> GuardModule:
        """The guard that the run ends with."""
        if self.average is not None and int(self.average.n_averaged):
            self.module.load_state_dict(self.average.module.state_dict())
        self._set_noise(self.config.steps)
        return self.module


def make_optimizers(
    module: nn.Module, config: TrainConfig, beside: nn.Module | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the context network's matrices and AdamW for the rest, and for what is
    trained ``beside`` the guard."""
    wants = config.optimizer == "muon"
    named = list(module.named_parameters())
    matrices = [p for n, p in named if wants and p.ndim == 2 and n.startswith("context.")]
    rest = [p for _, p in named if not any(p is m for m in matrices)]
    rest += [] if beside is None else list(beside.parameters())
    out: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=config.lr, weight_decay=0.01)]
    if matrices:
        out.append(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=0.01))
    return out


def _rate(step: int, config: TrainConfig) -> float:
    """Warm-up, flat, and linear to a tenth over the last third."""
    left = (config.steps - step) / (config.steps / 3)
    return min(1.0, (step + 1) / max(1, config.warmup), 0.1 + 0.9 * max(0.0, left))


def _no_adversary(options: dict[str, Any]) -> Any:
    raise ValueError("no adversary configured")


def _bar(progress: bool | None, main: bool) -> Progress:
    shown = sys.stderr.isatty() if progress is None else progress
    return Progress(
        *Progress.get_default_columns(),
        TextColumn("{task.fields[note]}"),
        disable=not (shown and main),
    )


def _note(row: dict[str, float]) -> str:
    return "  ".join(f"{k} {v:.3g}" for k, v in row.items())


def _write_metrics(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    replace_file(path, "".join(json.dumps(r) + "\n" for r in rows).encode(), mode=PUBLIC)


def _kept_metrics(path: Path, steps: int) -> list[dict[str, Any]]:
    if not steps or not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:steps]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it") from error
