"""A learned replacement of what is found, for everything that was read behind it (KVEraser).

After KVEraser (arXiv 2606.17034): the KV of an erased span gives way to learned steering states,
the rest of the cache stays as it is, and the states are trained so that what the receiver answers
is what it would answer had the context been read again. What is ours: where the spans come from (a
detector), that the states are a function of the cache without the span's own entries, of few
directions beside a constant, and that answers on the twin's KV are the only objective (theirs is
trained in two stages). The paper knows no attacker; it is here to be measured by some.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lcguard.guards.base import KVShape, register
from lcguard.guards.single_pass import Found, SinglePassGuard


@register("kveraser")
class KVEraserGuard(SinglePassGuard):
    claim = (
        "What its detector finds gives way to states that steer the receiver as if it had not been "
        "read. Later tokens keep what they took from it: nothing is claimed against who reads them."
    )

    def __init__(self, shape: KVShape, n_categories: int, config: Any = None) -> None:
        super().__init__(shape, n_categories, config)
        width = shape.kv_heads * shape.head_dim
        self.constant = nn.Parameter(torch.zeros(shape.layers, 2, width))
        start = torch.randn(shape.layers, 2, self.config.rank, width) * width**-0.5
        self.directions = nn.Parameter(start)

    @torch.no_grad()
    def start_at(self, constant: Tensor) -> None:
        """``[L, 2, W]``: what its states are before it is fitted."""
        self.constant.copy_(constant)

    def replaced(self, z: Tensor, valid: Tensor, found: Found) -> Tensor:
        # the span's own entries are not read: its states may tell where it stood, not what
        around = self.features(z).masked_fill(found.hidden[..., None], 0.0)
        written = self.reader(around, found.hidden, valid, self.twin.detector.reach)
        states = self.constant + torch.einsum("btlkr,lkrw->btlkw", written, self.directions)
        return torch.where(found.hidden[:, :, None, None, None], states, z)
