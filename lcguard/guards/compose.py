"""Several guards one after the other: ``g = g_n ... g_2 g_1``.

Every part sees what the part before it let through, under the same policy, and adds its own noise;
a share b withheld of what was left of 1 - a makes ``1 - (1 - a)(1 - b)`` withheld in all. Part i
of a hop draws from SHA-256 of the segment's key and i: one stream for two parts would let a
receiver subtract the one from the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcguard.guards.base import (
    Draws,
    GuardModule,
    KVShape,
    Rewrite,
    RowsOf,
    guard_class,
    register,
)
from lcguard.protocols import KVBatch, Mask

_KEYS = {"guard", "options"}


def part_key(key: bytes, index: int) -> bytes:
    """The key of a part's noise; parts of a part can be keyed alike."""
    return hashlib.sha256(b"lcguard compose\0" + index.to_bytes(4, "little") + key).digest()


@register("compose")
class ComposeGuard(GuardModule):
    trained = False
    by_token = True
    claim = "What its parts claim, each about what the parts before it let through."

    @dataclass(frozen=True)
    class Config(GuardModule.Config):
        parts: Sequence[Mapping[str, Any]] = ()
        """``{guard: NAME, options: {...}}`` each, in the order in which they are applied."""

    def __init__(self, shape: KVShape, n_categories: int, config: Config | None = None) -> None:
        super().__init__(shape, n_categories, config)
        if self.config.noise:
            raise ValueError(f"noise {self.config.noise}: 'compose' has none; give it to a part")
        if isinstance(self.config.parts, (str, Mapping)) or not self.config.parts:
            raise ValueError(f"parts {self.config.parts!r}: give a list of one guard or more")
        made = [_part(shape, n_categories, i, p) for i, p in enumerate(self.config.parts)]
        for i, part in enumerate(made):
            if i and part.needs_twin:
                raise ValueError(
                    f"parts[{i}]: {part.name!r} sends the twin's KV and would undo the parts "
                    "before it; put it first"
                )
            if part.keeps_later:
                raise ValueError(f"parts[{i}]: {part.name!r} is measured alone, as a yardstick")
        self.parts = nn.ModuleList(made)
        # of this guard, not of all composed ones
        self.needs_twin = made[0].needs_twin  # type: ignore[misc]

    def chain(self) -> list[GuardModule]:
        """The parts in order."""
        return [p for p in self.parts if isinstance(p, GuardModule)]

    def options(self) -> dict[str, Any]:
        """Every option of every part, as JSON gives them back."""
        parts = [{"guard": p.name, "options": p.options()} for p in self.chain()]
        return {"noise": 0.0, "parts": parts}

    @torch.no_grad()
    def fit_statistics(self, kv: KVBatch) -> None:
        """Of raw KV, for all parts without weights: their noise is in units of raw channels.

        Raises ``ValueError`` for a part that was to be trained and has not been.
        """
        super().fit_statistics(kv)
        for i, part in enumerate(self.chain()):
            if not part.trained:
                part.fit_statistics(kv)
            elif bool((part.scale == 1).all()) and not bool(part.center.any()):
                raise ValueError(
                    f"parts[{i}]: {part.name!r} is not trained; compose trained guards with "
                    "ComposeGuard.of and save them"
                )

    @classmethod
    def of(cls, parts: Sequence[GuardModule]) -> ComposeGuard:
        """From guards that are fitted already; their weights are copied."""
        if not parts:
            raise ValueError("parts []: give a list of one guard or more")
        chosen = [{"guard": p.name, "options": p.options()} for p in parts]
        first = parts[0]
        made = cls.build(first.shape, first.n_categories, {"parts": chosen})
        for mine, theirs in zip(made.parts, parts, strict=True):
            mine.load_state_dict(theirs.state_dict())
        return made

    def rewrite(self, z: Tensor, valid: Tensor, mask: Mask) -> Rewrite:
        """The parts' deterministic chain, each without its noise; not the mean of the output where
        a part behind noise is not linear."""
        like = self._batch(z, valid)
        kv, withheld = like, torch.zeros(valid.shape, device=z.device)
        for part in self.chain():
            raw = part.standardise(kv)
            out = part.rewrite(raw, valid, mask)
            if out.mean is not raw:  # what passes is not rounded
                kv = part.restore(part.finish(out.mean, mask), kv)
            withheld = 1 - (1 - withheld) * (1 - out.withheld)
        return Rewrite(z if kv is like else self.standardise(kv), withheld)

    def in_tiles(self) -> bool:
        """A part behind the first that looks around would look at what it does not know yet."""
        parts = self.chain()
        whole = not super().in_tiles() or not all(p.in_tiles() for p in parts)
        return not whole and not any(p.looks for p in parts[1:])

    def look(self, tiles: Iterable[KVBatch], mask: Mask) -> Iterator[Any]:
        return self.chain()[0].look(tiles, mask) if self.in_tiles() else super().look(tiles, mask)

    def rewrite_tile(
        self, kv: KVBatch, mask: Mask, key: bytes, first_token: int, seen: Any
    ) -> KVBatch:
        if not self.in_tiles():
            return super().rewrite_tile(kv, mask, key, first_token, seen)
        for i, part in enumerate(self.chain()):
            own = seen if i == 0 else None
            kv = part.rewrite_tile(kv, mask, part_key(key, i), first_token, own)
        return kv

    def _batch(self, z: Tensor, valid: Tensor) -> KVBatch:
        """Raw KV from this guard's z-scores, in their precision."""
        empty = torch.empty(0, dtype=z.dtype, device=z.device)
        return self.restore(z, KVBatch(empty, empty, valid))

    def forward(self, kv: KVBatch, mask: Mask, generator: Draws = None) -> tuple[KVBatch, Rewrite]:
        """Guarded KV; ``mean`` is what came out, noise included."""
        dtype = kv.keys.dtype
        kv = kv.to(torch.promote_types(dtype, torch.float32))  # rounded once, at the end
        withheld = torch.zeros(kv.valid.shape, device=kv.keys.device)
        for i, part in enumerate(self.chain()):
            draws = generator
            if draws is not None and not isinstance(draws, torch.Generator | RowsOf):
                draws = [part_key(key, i) for key in draws]
            kv, out = part(kv, mask, draws)
            withheld = 1 - (1 - withheld) * (1 - out.withheld)
        return kv.to(dtype), Rewrite(self.standardise(kv), withheld)


def _part(shape: KVShape, n_categories: int, index: int, spec: Any) -> GuardModule:
    """Raises ``ValueError`` naming the part and what is wrong with it."""
    where = f"parts[{index}]"
    if not isinstance(spec, Mapping) or "guard" not in spec or not set(spec) <= _KEYS:
        raise ValueError(f"{where}: {spec!r} is no part; give {{guard: NAME, options: {{...}}}}")
    cls = guard_class(str(spec["guard"]))
    if cls is ComposeGuard:
        raise ValueError(f"{where}: 'compose' cannot be part of another; list its parts here")
    try:
        return cls.build(shape, n_categories, dict(spec.get("options") or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
