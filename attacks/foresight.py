"""What an attacker who holds the guard expects of a token, and how far an observation is from it.

A guard sends ``finish(m(z) + sigma n)``. He computes m, and takes what he observed back through
``finish`` (affine in every guard here), so that the noise that is left is white: squared distance
is then the log-likelihood under N(m, sigma^2) but for constants. A guard with an inverse at hand,
such as a cloak whose key he holds, is undone. Without a guard, channels weigh as they vary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcguard.guards.base import GuardModule
from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import Guard, KVBatch, Mask


class Foresight:
    """Of one guard; ``own`` are raw segments of the attacker's, ``layer`` the one compared (None:
    all), ``undo`` whether an inverse at hand is used. Raises ``ValueError`` for a guard whose mean
    cannot be computed."""

    def __init__(
        self, guard: Guard | None, own: KVBatch, layer: int | None = None, undo: bool = True
    ) -> None:
        if guard is not None and not isinstance(guard, FrozenGuard):
            raise ValueError(f"guard {guard.name!r} shows no weights: give a FrozenGuard")
        module = None if guard is None else guard.module
        self.layers = slice(None) if layer is None else slice(layer, layer + 1 or None)
        locked = undo and module is not None and module.locks
        self._locked = module if locked else None
        self.module: GuardModule | None = None if locked else module
        z = _channels(own)[own.valid]  # [N, L, 2, C]
        self._center, self._scale = z.mean(0), z.std(0).clamp_min(1e-4)
        self._cached: tuple[bytes, Tensor, Tensor] | None = None
        self.local = self.module is None or _position_wise(self.module, own)
        """True where a token's output depends on that token's entry alone."""

    def undone(self, kv: KVBatch) -> KVBatch:
        """The segment without what can simply be inverted."""
        return kv if self._locked is None else self._locked.unlock(kv)

    def observed(self, kv: KVBatch, mask: Mask) -> Tensor:
        """One segment (B = 1), undone, in units of the guard's noise: ``[T, L', 2, C]``."""
        if self.module is None:
            return ((_channels(kv)[0] - self._center) / self._scale)[:, self.layers]
        base, inverse = self._unfinish(mask)
        z = self.module.standardise(kv)[0].float() - base
        return torch.einsum("tlkc,lkcd->tlkd", z, inverse)[:, self.layers]

    def expected(
        self,
        tokens: KVBatch,
        mask: Mask,
        before: KVBatch | None = None,
        after: KVBatch | None = None,
    ) -> Tensor:
        """The mean of what each of N single entries becomes: ``[N, L', 2, C]``.

        Args:
            tokens: ``[N, L, H, 1, D]``, raw.
            before: raw entries that stand before all of them, B = 1.
            after: what was observed behind them: the best stand-in for raw entries still unknown,
                for guards that look at the whole segment.
        """
        if self.module is None:
            return ((_channels(tokens)[:, 0] - self._center) / self._scale)[:, self.layers]
        at = 0
        if not self.local:
            parts = [p for p in (before, tokens, after) if p is not None and p.valid.shape[1]]
            at = 0 if before is None else before.valid.shape[1]
            tokens = _beside(parts, len(tokens))
        z = self.module.standardise(tokens).float()
        return self.module.rewrite(z, tokens.valid, _repeat(mask, len(z))).mean[:, at, self.layers]

    def segment(self, kv: KVBatch, mask: Mask) -> Tensor:
        """The mean of what a raw segment (B = 1) becomes: ``[T, L', 2, C]``; differentiable."""
        return self.segments(kv, mask)[0]

    def segments(self, kv: KVBatch, mask: Mask) -> Tensor:
        """The same of N raw segments: ``[N, T, L', 2, C]``."""
        if self.module is None:
            return ((_channels(kv) - self._center) / self._scale)[:, :, self.layers]
        z = self.module.standardise(kv).float()
        return self.module.rewrite(z, kv.valid, mask).mean[:, :, self.layers]

    def _unfinish(self, mask: Mask) -> tuple[Tensor, Tensor]:
        """Offset ``[L, 2, C]`` and inverse matrices ``[L, 2, C, C]`` of ``finish``."""
        assert self.module is not None
        key = mask.vector().cpu().numpy().tobytes()
        if self._cached is None or self._cached[0] != key:
            shape, n = self.module.shape, self.module.shape.kv_heads * self.module.shape.head_dim
            size = (n + 1, 1, shape.layers, 2, n)
            probe = torch.zeros(size, device=self.module.center.device)
            probe[1:] += torch.eye(n, device=probe.device)[:, None, None, None]
            out = self.module.finish(probe, _repeat(mask, n + 1))[:, 0]
            matrix = (out[1:] - out[0]).permute(1, 2, 0, 3)  # [L, 2, C in, C out]
            self._cached = key, out[0], torch.linalg.pinv(matrix)
        return self._cached[1:]


def _channels(kv: KVBatch) -> Tensor:
    """float32 ``[B, T, L, 2, H * D]``."""
    both = torch.stack((kv.keys, kv.values), 2)
    return both.permute(0, 4, 1, 2, 3, 5).flatten(4).float()


def _repeat(mask: Mask, n: int) -> Mask:
    return mask[torch.zeros(n, dtype=torch.long, device=mask.forbid.device)]


def _beside(parts: list[KVBatch], n: int) -> KVBatch:
    """Entries side by side, those of one row given to all N."""

    def cat(tensors: list[Tensor], dim: int) -> Tensor:
        return torch.cat([t.expand(n, *t.shape[1:]) for t in tensors], dim)

    return KVBatch(
        cat([p.keys for p in parts], 3),
        cat([p.values for p in parts], 3),
        cat([p.valid for p in parts], 1),
    )


@torch.no_grad()
def _position_wise(module: GuardModule, own: KVBatch) -> bool:
    """Tried on a segment: its entries together and each alone."""
    some = own[:1].trim()
    z = module.standardise(some).float()
    n = module.n_categories
    everything = torch.ones(1, n, dtype=torch.bool, device=z.device)
    mask = Mask(everything, ~everything)
    together = module.rewrite(z, some.valid, mask).mean[0]
    alone = module.rewrite(z[0][:, None], some.valid[0][:, None], _repeat(mask, z.shape[1])).mean[
        :, 0
    ]
    return torch.allclose(together, alone, atol=1e-3, rtol=1e-3)
