"""Collision: rebuild the text token by token until the model's own KV collides with the segment.

For t = 1 .. T candidates v are run through the real model behind the tokens recovered so far, most
likely first, and

    token_t = the first v with ||g(KV(prefix, v))_t - observed_t|| < tau, else the nearest of all,

at any layer. From *Shadow in the Cache* (arXiv 2508.09442). Unlike there, g is the guard (see
``foresight``: a likelihood test where it adds noise), tau comes from the attacker's own contexts
instead of from each batch, candidates are also weighed by how often his own contexts use them, and
a batch shares one cache: candidates are siblings that see the prefix and themselves.

A record costs up to T times V token forwards. Records beyond ``max_records``, and those whose last
secret ends beyond ``max_tokens``, are not attempted: they get no guesses and are in no score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lcguard.attacks.base import BaseAttack, register
from lcguard.attacks.foresight import Foresight
from lcguard.attacks.inversion import guesses
from lcguard.attacks.siblings import Siblings
from lcguard.noise import noise_key
from lcguard.protocols import AttackData, Guess, KVBatch, Mask
from lcguard.records import IGNORE


@register("collision")
class CollisionAttack(BaseAttack):
    goal = "find the text whose guarded segment is the one observed"
    reference = "arXiv 2508.09442, through the guard"
    fitted: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Config:
        layer: int | None = -1
        """Compared; None: all layers, the stronger test where a guard adds noise."""
        batch: int = 256
        """Candidates a forward pass."""
        max_records: int | None = 16
        max_tokens: int | None = None
        max_candidates: int | None = None
        """Tried at each position; None: the whole vocabulary."""
        calibration: int = 8
        """Contexts of the attacker's own, from which the threshold is taken."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        self._foresight: Foresight | None = None
        self.threshold = 0.0
        """Root mean square distance below which a candidate is taken at once; 0: never."""

    @torch.no_grad()
    def fit(self, pairs: AttackData, *, seed: int = 0) -> CollisionAttack:
        """Sets the threshold between true tokens and their nearest neighbours.

        The attacker guards contexts of his own; random ones where none are known. Raises
        ``ValueError`` for options that cannot be, or a guard that shows no weights.
        """
        source, c = self.known.source, self.config
        if c.layer is not None and not -source.shape[0] <= c.layer < source.shape[0]:
            raise ValueError(f"layer {c.layer} is none of the model's {source.shape[0]}")
        for name in ("batch", "calibration"):
            if getattr(c, name) < 1:
                raise ValueError(f"{name} {getattr(c, name)} must be at least 1")
        vocab = source.model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(seed)
        own = [[t for t in row if t != IGNORE] for row in pairs.context_ids.tolist()]
        counts = torch.bincount(
            torch.tensor([t for row in own for t in row]).long(), minlength=vocab
        )
        self._prior = (counts.float() + 0.5).log().to(source.device)
        rows = [i for i, ids in enumerate(own) if len(ids) > 1][: c.calibration]
        contexts = [own[i][:32] for i in rows]
        if not contexts:
            rows = list(range(min(c.calibration, len(pairs))))
            contexts = torch.randint(vocab, (len(rows), 16), generator=generator).tolist()
        raw = source.prefill(contexts)
        self._foresight = Foresight(self.known.guard, raw, c.layer)
        right, wrong = [], []
        for i, (row, ids) in enumerate(zip(rows, contexts, strict=True)):
            mask, kv = pairs.mask[[row]], raw[i : i + 1].trim()
            seen = self._guarded(kv, mask, seed, i).to(pairs.kv.keys.dtype)
            for near, far in self._rehearse(ids, seen, mask, generator):
                right.append(near)
                wrong.append(far)
        d, others = torch.stack(right), torch.stack(wrong).clamp_min(1e-9).log()
        limit = float(d.mean() + 3 * d.std()) + 1e-5
        # distances of wrong tokens span decades: three deviations of their logarithm
        bar = float(torch.minimum(others.min(), others.mean() - 3 * others.std()).exp())
        self.threshold = limit if limit < bar else 0.0
        return self

    def _guarded(self, kv: KVBatch, mask: Mask, seed: int, i: int) -> KVBatch:
        guard = self.known.guard
        if guard is None:
            return kv
        keys = [noise_key(seed, f"collision {i}")]
        return guard(kv, mask, keys=keys, twin=kv if guard.needs_twin else None).kv

    def _rehearse(
        self, ids: list[int], seen: KVBatch, mask: Mask, generator: torch.Generator
    ) -> list[tuple[Tensor, Tensor]]:
        """Distances of the true token and of the nearest wrong one, at each position."""
        source = self.known.source
        table = source.model.get_input_embeddings().weight.float()
        trail, out = _Trail(self, seen, mask, None), []
        for true in ids:
            near = torch.cdist(table[true][None], table)[0].topk(17, largest=False).indices
            some = torch.randint(len(table), (16,), generator=generator).to(near)
            others = torch.cat((near, some))
            distance = trail.look(torch.cat((near.new_tensor([true]), others[others != true])))
            out.append((distance[0], distance[1:].min()))
            trail.take(0)
        return out

    @torch.no_grad()
    def read(
        self, kv: KVBatch, mask: Mask, on: KVBatch | None = None, n_tokens: int | None = None
    ) -> tuple[int, ...]:
        """The tokens of one segment (B = 1), the first ``n_tokens`` or all.

        ``on``: the consumed segments behind which it was prefilled, B = 1. Raises ``ValueError`` if
        not fitted.
        """
        trail, c = _Trail(self, kv.trim(), mask, on), self.config
        out: list[int] = []
        for _ in range(min(trail.n_tokens, n_tokens or trail.n_tokens)):
            best, token = float("inf"), -1
            for ids in trail.order(self._prior)[: c.max_candidates].split(c.batch):
                distance = trail.look(ids)
                i = int(distance.argmin())
                if float(distance[i]) < best:
                    best, token = float(distance[i]), int(ids[i])
                    trail.keep(i)
                if best < self.threshold:
                    break
            trail.take_kept()
            out.append(token)
        return tuple(out)

    def recover(self, data: AttackData) -> list[Guess]:
        """Guesses for the attempted records only; raises ``ValueError`` if not fitted."""
        c = self.config
        ends = [max((s.positions[1] for s in secrets), default=0) for secrets in data.secrets]
        chosen = [
            i for i, n in enumerate(ends) if n and (c.max_tokens is None or n <= c.max_tokens)
        ]
        chosen = chosen[: c.max_records]
        on = data.on
        found = [
            self.read(
                data.kv[i : i + 1], data.mask[[i]], None if on is None else on[i : i + 1], ends[i]
            )
            for i in chosen
        ]
        return guesses(data, chosen, found)


class _Trail:
    """A segment with as much of its text as is believed so far."""

    def __init__(
        self, attack: CollisionAttack, seen: KVBatch, mask: Mask, on: KVBatch | None
    ) -> None:
        if attack._foresight is None:
            raise ValueError(f"attack {attack.name!r} is not fitted; call fit first")
        self._foresight, self._mask = attack._foresight, mask
        self._seen = self._foresight.undone(seen)
        self._target = self._foresight.observed(self._seen, mask)
        self.n_tokens = int(seen.valid.sum())
        self._family = Siblings(attack.known.source, on, self.n_tokens)
        self._at = 0
        self._last: tuple[KVBatch, Any] | None = None
        self._kept: Any = None

    def order(self, prior: Tensor) -> Tensor:
        """Candidates, most likely first."""
        logp = self._family.log_probs()
        return (prior if logp is None else prior + logp).argsort(descending=True)

    def look(self, ids: Tensor) -> Tensor:
        """Distance of each candidate ``[N]`` at the next position."""
        self._family.look(ids)
        after = self._seen
        after = KVBatch(
            after.keys[..., self._at + 1 :, :],
            after.values[..., self._at + 1 :, :],
            after.valid[:, self._at + 1 :],
        )
        mean = self._foresight.expected(
            self._family.entries(), self._mask, self._family.before(), after
        )
        return (mean - self._target[self._at]).square().flatten(1).mean(1).sqrt()

    def keep(self, i: int) -> None:
        """Remembers candidate ``i`` of the last look."""
        self._kept = self._family.pick(i)

    def take(self, i: int) -> None:
        self.keep(i)
        self.take_kept()

    def take_kept(self) -> None:
        """Believes the remembered candidate."""
        self._family.grow(self._kept)
        self._at += 1
