"""Rank profile: how many directions of a token's entry a guard lets through.

Singular values of ``d g(z) / d z_t``, the derivative of all that is sent by the raw entry of one
token, in standardised units. A bijective guard has full rank: it is an encoding, not an erasure
(the point of arXiv 2605.13470 turned on guards), whatever it looks like on the wire. Under noise of
standard deviation sigma, a direction with singular value below sigma is drowned for one token of
ordinary size; rank says nothing of that, ``above_noise`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import KVBatch, Mask


@dataclass(frozen=True)
class RankProfile:
    """Of K tokens of a segment."""

    singular: Tensor
    """``[K, n]``, descending; n = L * 2 * H * D."""
    noise: float
    """Of the guard, in the same units."""

    @property
    def rank(self) -> list[int]:
        """Singular values above 1e-3 of the largest; 0 where nothing passes."""
        top = self.singular[:, :1]
        return ((self.singular > 1e-3 * top) & (self.singular > 1e-6)).sum(1).tolist()

    @property
    def above_noise(self) -> list[int]:
        """Directions that one token of ordinary size is not drowned in."""
        floor = max(self.noise, 1e-6)
        return (self.singular > floor).sum(1).tolist()


def rank_profile(
    guard: FrozenGuard, kv: KVBatch, mask: Mask, tokens: Sequence[int], batch: int = 64
) -> RankProfile:
    """Of the guard's mean on one segment (B = 1), at the given token positions.

    Raises ``ValueError`` for several segments or a position outside.
    """
    if len(kv) != 1:
        raise ValueError(f"{len(kv)} segments: give one")
    kv, module = kv.trim(), guard.module
    n_tokens, n = kv.valid.shape[1], module.shape.channels
    z = module.standardise(kv).float()
    out = []
    for token in tokens:
        if not 0 <= token < n_tokens:
            raise ValueError(f"token {token} is not in a segment of {n_tokens}")
        columns = []
        for some in torch.eye(n, device=z.device).split(batch):
            size = len(some)
            row = torch.zeros(size, dtype=torch.long)
            push = torch.zeros(size, *z.shape[1:], device=z.device)
            push[:, token] = some.view(size, *z.shape[2:])

            def sent(x: Tensor, valid: Tensor = kv.valid[row], wanted: Mask = mask[row]) -> Tensor:
                return module.rewrite(x, valid, wanted).mean

            with sdpa_kernel(SDPBackend.MATH):  # the kernel that has every derivative
                moved = jvp(sent, (z.repeat(size, 1, 1, 1, 1),), (push,))[1]
            columns.append(moved.detach().flatten(1).double())
        jacobian = torch.cat(columns)  # [n, T * n], transposed
        gram = jacobian @ jacobian.T
        out.append(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0).float())
    return RankProfile(torch.stack(out), float(module.config.noise))
