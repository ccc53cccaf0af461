"""Back to the last good weights where a game of guard and attackers gets worse (arXiv 2605.15959).

Alternating steps of two players need not lower any loss. Every so many steps the guard's own loss,
without the attackers' term, is taken on records held back from training, always the same with the
same policies, counterfactuals and noise. Where it is no higher than ever before, guard, attackers
and optimisers are written down as they are; where it is higher by more than the slack, all are set
back to what was written, to the last bit. The steps after that see other records.

What was written lies beside the checkpoint, which is written right after: a run that is killed
between the two finds the same loss again, and goes on to the same weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lcguard.guards.base import GuardModule
from lcguard.training.checkpoint import load_checkpoint, read_meta, save_checkpoint
from lcguard.training.objective import Objective
from lcguard.training.steps import Steps

SNAPSHOT = "snapshot.safetensors"


@dataclass(frozen=True)
class HeldBack:
    """The loss on records that no step sees."""

    steps: Steps
    """Its records are those held back, its batch all of them."""
    objective: Objective

    @torch.no_grad()
    def loss(self, module: GuardModule) -> float:
        """As it is at the end of a run. All processes ask together."""
        config = self.steps.config
        rng = random.Random(f"{config.seed}/held back")
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        data = self.steps.draw(rng, module, generator, config.steps)
        total = self.objective.losses(module, data, generator, config.steps).total
        return self.objective.shards.total({"loss": float(total)})["loss"]


def keep_or_go_back(
    path: Path,
    loss: float,
    slack: float,
    modules: dict[str, nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    writes: bool = True,
    wait: Callable[[], Any] = lambda: None,
) -> bool:
    """Writes everything to ``path`` or restores it from there; True where it was restored.

    ``writes``: whether this is the process that writes; ``wait`` lets it finish.
    """
    lowest = float(read_meta(path)["loss"]) if path.exists() else float("inf")
    if loss > lowest * (1 + slack):
        load_checkpoint(path, modules, optimizers)
        return True
    wait()  # all have read before one writes
    if loss <= lowest and writes:
        save_checkpoint(path, modules, optimizers, {"loss": loss})
    wait()
    return False
