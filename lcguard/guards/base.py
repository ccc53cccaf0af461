"""What every guard is: a module while it is fitted, a frozen ``FrozenGuard`` when it is applied.

A guard rewrites standardised KV, ``z = (kv - mean) / std`` per channel, so that one noise scale
fits keys and values of every layer. Modules are registered by name; a frozen guard is a folder
with ``lcguard_config.json`` (the card) and ``guard.safetensors``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from lcguard.discrete_gaussian import STEPS
from lcguard.grid import SMALLEST, noisy, to_grid
from lcguard.nearest import unknown
from lcguard.noise import new_noise_key, segment_noise
from lcguard.protocols import KVBatch, Mask


class GuardError(ValueError):
    """A guard that cannot be loaded, or does not belong to the model or data at hand."""


class KVShape(NamedTuple):
    """Shape of a model's KV."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def channels(self) -> int:
        """Numbers that one token contributes: L * 2 * H * D."""
        return self.layers * 2 * self.kv_heads * self.head_dim


Placeholder = Literal["neutral", "fixed_length", "typed", "surrogate"]


@dataclass(frozen=True)
class RowsOf:
    """A generator that draws for ``total`` rows, of which only some are here."""

    generator: torch.Generator
    rows: list[int]
    total: int


Draws = torch.Generator | RowsOf | Sequence[bytes] | None
"""Where noise comes from: a generator in training, a key for each record on a hop, fresh secrets
where None."""


TILE_BYTES = 1 << 20
"""Of a segment in float32, rewritten at a time: it stays in a processor's cache."""
TILE_TOKENS = 32
"""And so many tokens at least: a matrix is read once for all of them."""


class Rewrite(NamedTuple):
    """Standardised output of a guard before and after noise."""

    mean: Tensor
    """``[B, T, L, 2, H * D]``: what the noise is added to; the certificate's m(.)."""
    withheld: Tensor
    """``[B, T]`` in 0..1."""
    by_category: Tensor | None = None
    """Logits of withholding an entry, for guards that decide by entry, for every category on its
    own, forbidden or not: ``[B, T, C, 2, L, 2]``, first hiding the value, then hiding all but what
    is derived from it."""
    words: Tensor | None = None
    """Logits ``[B, T, C, W]`` of the words that stand for derived values, where there are any."""


class GuardModule(nn.Module):
    """Base of all guards. Subclasses define ``Config`` and ``rewrite``."""

    name: ClassVar[str] = ""
    needs_twin: ClassVar[bool] = False
    trained: ClassVar[bool] = True
    reads_policy: ClassVar[bool] = False
    """True where a record under a policy that forbids nothing passes without noise."""
    finds_secrets: ClassVar[bool] = False
    """True where ``marks`` finds what to hide; otherwise the guard is told, or hides all alike."""
    keeps_later: ClassVar[bool] = False
    """True for a guard with ``needs_twin`` that sends raw entries of the other tokens."""
    locks: ClassVar[bool] = False
    """True for a guard of the wire alone, which the receiver undoes with a key by ``unlock``; its
    tokens change places."""
    by_token: ClassVar[bool] = False
    """True where a token's output depends on its own entries, and on what ``look`` saw, alone. Each
    class says so itself: one that inherits from it may do more."""
    passes: ClassVar[bool] = False
    """True where the mean is what was read: without noise it is sent as it is. Each class says so
    itself, as of ``by_token``."""
    looks: ClassVar[bool] = False
    """True where ``look`` reads other tokens' entries."""
    placeholder: Placeholder = "neutral"
    """What stands for a replaced value, for guards that send a twin: a neutral token for each of
    its own, a run of fixed length, its category's name in brackets, or another value like it."""
    claim: ClassVar[str] = ""
    """What the guard claims, and against whom; printed on its card."""

    @dataclass(frozen=True)
    class Config:
        noise: float = 0.0
        """Standard deviation of the noise, in units of each channel's own: 0 or 1e-4 and more."""

    def __init__(self, shape: KVShape, n_categories: int, config: Any = None) -> None:
        super().__init__()
        self.shape, self.n_categories = shape, n_categories
        self.config: Any = config if config is not None else self.Config()
        if not 0 <= self.config.noise < math.inf:  # NaN too: it would switch the noise off
            raise ValueError(f"noise {self.config.noise} must be a finite number, 0 or more")
        if 0 < self.config.noise < SMALLEST:
            raise ValueError(f"noise {self.config.noise} is too fine: use 0 or {SMALLEST} and more")
        width = shape.kv_heads * shape.head_dim
        self.register_buffer("center", torch.zeros(shape.layers, 2, width))
        self.register_buffer("scale", torch.ones(shape.layers, 2, width))

    center: Tensor
    scale: Tensor

    @classmethod
    def build(cls, shape: KVShape, n_categories: int, options: dict[str, Any]) -> Self:
        """From plain options. Raises ``ValueError`` naming an unknown option and the known ones."""
        known = [f.name for f in fields(cls.Config)]
        for key in options:
            if key not in known:
                raise ValueError(
                    f"guard {cls.name!r} has no option {key!r}; it has: {', '.join(known)}"
                )
        return cls(shape, n_categories, cls.Config(**options))

    def options(self) -> dict[str, Any]:
        return asdict(self.config)

    def unlock(self, kv: KVBatch) -> KVBatch:
        """What an entitled receiver reads of a segment."""
        return kv

    @torch.no_grad()
    def fit_statistics(self, kv: KVBatch) -> None:
        """Mean and standard deviation of every channel over the valid tokens of raw KV."""
        z = self.channels(kv)[kv.valid]  # [N, L, 2, H * D]
        self.center.copy_(z.mean(0))
        self.scale.copy_(z.std(0).clamp_min(1e-3))

    def channels(self, kv: KVBatch) -> Tensor:
        """``[B, T, L, 2, H * D]`` from keys and values."""
        by_token = (x.permute(0, 3, 1, 2, 4) for x in (kv.keys, kv.values))  # [B, T, L, H, D]
        return torch.stack((*by_token,), 3).flatten(4)

    def standardise(self, kv: KVBatch) -> Tensor:
        """z-scores ``[B, T, L, 2, H * D]``."""
        z = self.channels(kv) - self.center
        z /= self.scale
        return z

    def restore(self, z: Tensor, like: KVBatch) -> KVBatch:
        """Back from z-scores; padding becomes zero."""
        x = z * self.scale
        x += self.center
        x *= like.valid[:, :, None, None, None]
        x = x.unflatten(4, (self.shape.kv_heads, self.shape.head_dim))
        x = x.permute(0, 2, 3, 4, 1, 5).to(like.keys.dtype)  # [B, L, 2, H, T, D]
        return KVBatch(x[:, :, 0], x[:, :, 1], like.valid)

    def start(self, kv: KVBatch, twin: KVBatch) -> KVBatch:
        """For a guard with ``needs_twin``: what it rewrites, from raw KV and the twin's."""
        return twin

    def rewrite(self, z: Tensor, valid: Tensor, mask: Mask) -> Rewrite:
        """The deterministic part: ``z [B, T, L, 2, H * D]`` to the mean of the output."""
        raise NotImplementedError(f"guard {self.name!r} does not rewrite KV")

    def marks(self, kv: KVBatch, mask: Mask) -> Tensor | None:
        """What the guard itself finds in raw KV, to be replaced before the context is prefilled
        again: ``[B, T]``, the index of a token's category, -1 where it stays. None for a guard that
        is told the values, or replaces none."""
        return None

    @property
    def marks_layers(self) -> tuple[int, ...] | None:
        """Layers whose entries ``marks_in`` takes; None: all."""
        return None

    def marks_in(self, tiles: Iterable[KVBatch], mask: Mask) -> Tensor | None:
        """The same of one segment's raw KV that comes in tiles, in order, of ``marks_layers``."""
        parts = list(tiles)
        keys, values = (
            torch.cat(x, 3) for x in zip(*((p.keys, p.values) for p in parts), strict=True)
        )
        return self.marks(KVBatch(keys, values, torch.cat([p.valid for p in parts], 1)), mask)

    def finish(self, noisy: Tensor, mask: Mask) -> Tensor:
        """What happens to the noisy output before it is sent; can reveal nothing more."""
        return noisy

    def unfinish(self, sent: Tensor, mask: Mask) -> Tensor:
        """The opposite of ``finish``, for one who attacks, in the precision of ``sent``."""
        return sent

    def add_noise(self, mean: Tensor, draws: Draws, first_token: int = 0) -> Tensor:
        """``mean [B, T, L, 2, H * D]`` with noise that is the same on every device.

        A hop sends grid points (``lcguard.grid``), drawn from the records' keys, whatever batch
        and padding they come in. Training adds real numbers from a generator, which gradients pass:
        nobody receives them.
        """
        if isinstance(draws, torch.Generator | RowsOf):
            if isinstance(draws, RowsOf):
                shape = (draws.total, *mean.shape[1:])
                noise = torch.randn(shape, generator=draws.generator, dtype=torch.float32)
                noise = noise[draws.rows]
            else:
                noise = torch.randn(mean.shape, generator=draws, dtype=torch.float32)
            return mean + float(self.config.noise) * noise.to(mean.device, mean.dtype)
        keys = [new_noise_key() for _ in mean] if draws is None else draws
        if len(keys) != len(mean):
            raise ValueError(f"{len(keys)} noise keys for {len(mean)} segments")
        rows = [segment_noise(key, self.shape, mean.shape[1], first_token) for key in keys]
        return noisy(mean, self.config.noise, torch.stack(rows))

    def forward(self, kv: KVBatch, mask: Mask, generator: Draws = None) -> tuple[KVBatch, Rewrite]:
        """Guarded KV and what it was made of."""
        raw = self.standardise(kv)
        out = self.rewrite(raw, kv.valid, mask)
        return self._sent(kv, raw, out.mean, mask, generator, 0), out

    def tile_tokens(self, n_tokens: int, layers: Sequence[int] | None = None) -> int:
        """How many tokens of a segment of ``n_tokens`` are rewritten, or of ``layers`` alone read,
        at a time."""
        read = self.shape.layers if layers is None else len(layers)
        channels = self.shape.channels * read // self.shape.layers
        few = max(TILE_TOKENS, TILE_BYTES // (4 * channels))
        return few if self.in_tiles() else max(1, n_tokens)

    @property
    def sends_as_is(self) -> bool:
        """Whether what a hop sends is what was read, or the twin's, without a change."""
        passes = bool(vars(type(self)).get("passes")) and not self.config.noise
        return passes and self.in_tiles() and type(self).start is GuardModule.start

    def in_tiles(self) -> bool:
        """Whether a segment is rewritten some tokens at a time, and not whole."""
        return bool(vars(type(self)).get("by_token"))

    def look(self, tiles: Iterable[KVBatch], mask: Mask) -> Iterator[Any]:
        """What rewriting a tile needs of the rest of the segment, for every tile of one segment's
        raw KV, in order; it may lag behind them."""
        for _ in tiles:
            yield None

    def rewrite_seen(self, z: Tensor, valid: Tensor, mask: Mask, seen: Any) -> Rewrite:
        """``rewrite`` for a tile, with what ``look`` said of it."""
        return self.rewrite(z, valid, mask)

    def rewrite_tile(
        self, kv: KVBatch, mask: Mask, key: bytes, first_token: int, seen: Any
    ) -> KVBatch:
        """Guarded KV of a tile of one segment, with the noise of ``key`` that lies there.

        See ``lcguard.guards.passage``.
        """
        if not self.in_tiles():
            return self(kv, mask, [key])[0]  # type: ignore[no-any-return]
        if self.sends_as_is:
            return _alive(kv)
        raw = self.standardise(kv)
        mean = self.rewrite_seen(raw, kv.valid, mask, seen).mean
        if mean is not raw:
            nothing = kv.keys[:, :, :, :0]
            del raw  # what is not needed any more is half of what a tile would take
            kv = KVBatch(nothing, nothing, kv.valid)
            return self._sent(kv, None, mean, mask, [key], first_token)
        return self._sent(kv, raw, mean, mask, [key], first_token)

    def _sent(
        self,
        kv: KVBatch,
        raw: Tensor | None,
        mean: Tensor,
        mask: Mask,
        draws: Draws,
        first_token: int,
    ) -> KVBatch:
        """The output for ``mean``, with noise from ``first_token`` on. Where there is none and
        ``mean`` is ``raw``, the z-scores of ``kv``, that is ``kv`` itself."""
        if mean is raw and not self.config.noise:  # nothing changed: no rounding either
            return _alive(kv)
        z = mean
        if self.config.noise > 0 and (not self.reads_policy or bool(mask.forbid.any())):
            z = self.add_noise(mean, draws, first_token)
            if self.reads_policy and not bool(mask.forbid.any(1).all()):
                hides = mask.forbid.any(1).to(z.device)[:, None, None, None, None]
                z = torch.where(hides, z, mean)
        del mean
        return self.restore(self.finish(z, mask), kv)

    @torch.no_grad()
    def grid_mean(self, kv: KVBatch, mask: Mask) -> Tensor:
        """Of raw KV, the grid points int32 ``[B, T, L, 2, H * D]`` that noise is added to: all of
        the content that a receiver's observation depends on.

        Rows whose policy forbids nothing have no noise where the guard ``reads_policy``. Raises
        ``ValueError`` for a guard without noise of its own.
        """
        noise = self._own_noise()
        return to_grid(self.rewrite(self.standardise(kv), kv.valid, mask).mean, noise)

    @torch.no_grad()
    def grid_points(self, kv: KVBatch, mask: Mask) -> Tensor:
        """Of guarded KV, what was drawn: float64 ``[B, T, L, 2, H * D]`` in steps of the grid.

        Whole numbers but for the rounding of ``kv``: of float32 some hundredths, to be rounded
        away; of 16-bit KV many steps, still small beside the noise's 1024: use them as they are.
        See ``lcguard.grid.log_likelihood``. Raises as ``grid_mean``.
        """
        noise = self._own_noise()
        z = (self.channels(kv).double() - self.center.double()) / self.scale.double()
        return self.unfinish(z, mask) * (STEPS / noise)

    def _own_noise(self) -> float:
        if not self.config.noise:
            raise ValueError(f"guard {self.name!r} adds no noise of its own: it has no grid")
        return float(self.config.noise)


def _alive(kv: KVBatch) -> KVBatch:
    """Padding becomes zero."""
    live = kv.valid[:, None, None, :, None]
    return KVBatch(kv.keys * live, kv.values * live, kv.valid)


_REGISTRY: dict[str, type[GuardModule]] = {}
M = TypeVar("M", bound=type[GuardModule])


def register(name: str) -> Callable[[M], M]:
    """Class decorator: makes a guard known by name."""

    def wrap(cls: M) -> M:
        if name in _REGISTRY:
            raise ValueError(f"guard name {name!r} is taken by {_REGISTRY[name].__qualname__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return wrap


def guard_class(name: str) -> type[GuardModule]:
    """Raises ``ValueError`` naming the registered guards."""
    if name not in _REGISTRY:
        raise ValueError(unknown("guard", name, names()))
    return _REGISTRY[name]


def names() -> list[str]:
    return sorted(_REGISTRY)
