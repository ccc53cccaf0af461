"""Likelihood: the best there is for an attacker who has a list of values to choose from.

He knows the model, the guard and all of the record but one value. For every candidate he makes the
sender's context with it (wherever the value stands), runs the model and the guard's mean over it,
and compares with the segment that he observed, taken back to where the noise is white:

    log p(segment | candidate) = -||k - m(candidate)||^2 / 2 sigma^2 + constant

exactly, on the integers that the noise is drawn on (``lcguard.grid``). By the lemma of Neyman and
Pearson no other reader of the segment does better on that list. Our own, after the threat model of
arXiv 2508.09442 (collision), with whole values in place of tokens.

That the rest of the record is known, other secrets included, is the strongest assumption: the only
attack here that looks at the victims' contexts. Guards whose noise is not a single Gaussian (a
composed one) are compared at the size of what their mean leaves unexplained on the attacker's own
records; guards without noise, to rounding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lcguard.attacks.base import BaseAttack, register
from lcguard.attacks.candidates import Candidates, Ids
from lcguard.attacks.foresight import Foresight
from lcguard.discrete_gaussian import STEPS
from lcguard.protocols import AttackData, Guess, KVBatch, Ranked, Secret
from lcguard.records import TokenRecord
from lcguard.training.dataset import twin_contexts

ROUNDING = 1e-3
"""Least standard deviation, in channels' units: what batched arithmetic may move an entry by."""


@register("likelihood")
class LikelihoodAttack(BaseAttack):
    goal = "name the value of a list under which the observed segment is most likely"
    reference = "own; Neyman and Pearson's test through model and guard"
    fitted: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Config:
        lists: tuple[int, ...] = (10, 100, 10_000)
        """Sizes; the values of a smaller list are the first of the larger one's."""
        long_records: int = 1
        """Of the records tried, those whose number is looked for in a list above 1,000."""
        max_records: int | None = 40
        """Records tried, chosen by the seed; None: all."""
        batch: int = 64
        """Candidates a forward pass."""
        calibration: int = 8
        """Segments of the attacker's own that noise of an unknown size is estimated from."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        self._foresight: Foresight | None = None
        self.noise = math.nan
        """Standard deviation of the white noise in what ``observed`` gives."""

    @torch.no_grad()
    def fit(self, pairs: AttackData, *, seed: int = 0) -> LikelihoodAttack:
        """Learns nothing but the lists' values and, where the guard does not state it, the noise.

        Raises ``ValueError`` for options that cannot be, joint segments, or pairs without records.
        """
        known, c = self.known, self.config
        sizes = tuple(int(n) for n in c.lists)
        if not sizes or min(sizes) < 2 or list(sizes) != sorted(set(sizes)):
            raise ValueError(f"lists {list(sizes)}: give ascending sizes of 2 or more")
        for name in ("batch", "calibration"):
            if getattr(c, name) < 1:
                raise ValueError(f"{name} {getattr(c, name)} must be at least 1")
        if known.guard is not None and known.guard.keeps_later:
            raise ValueError(
                f"attack 'likelihood' has none for guard {known.guard.name!r}, which sends raw "
                "entries beside the twin's: leave it out of the guard's attacks"
            )
        records = _records(pairs)[: c.calibration]
        self._candidates = Candidates(pairs.secrets, known.decode, known.encode, known.sample)
        raw = known.source.prefill([r.ids for r in records], on=_behind(pairs, range(len(records))))
        self._foresight = Foresight(known.guard, raw)
        module = self._foresight.module
        self._on_grid = module if module is not None and module.config.noise else None
        self.noise = 1.0 if self._on_grid else max(self._left_over(pairs, records), ROUNDING)
        self._seed = seed
        return self

    def _left_over(self, pairs: AttackData, records: Sequence[TokenRecord]) -> float:
        """Root mean square of what the mean leaves unexplained of the attacker's own segments."""
        left = []
        for i, record in enumerate(records):
            seen = self.observed(pairs, i)
            left.append(float(self._distances(pairs, i, [record], seen)[0]) / seen.numel())
        return math.sqrt(sum(left) / len(left))

    @torch.no_grad()
    def recover(self, data: AttackData) -> list[Guess]:
        """For the attempted records: the first of each list with its rank.

        ``Guess.ids`` is the choice from the list of 100, or from the longest shorter one.
        """
        if self._foresight is None:
            raise ValueError(f"attack {self.name!r} is not fitted; call fit first")
        rng = random.Random(f"likelihood/{self._seed}")
        rows = [i for i, secrets in enumerate(data.secrets) if secrets]
        rng.shuffle(rows)
        rows = rows[: self.config.max_records]
        numbers = {i: k for i in rows if (k := self._longest_number(data.secrets[i])) is not None}
        long = dict(list(numbers.items())[: self.config.long_records])
        out: dict[int, list[Guess]] = {}
        for i in rows:
            target = self.observed(data, i)
            out[i] = [
                self.rank(data, i, k, target, self.sizes(long.get(i) == k))
                for k in range(len(data.secrets[i]))
            ]
        return [guess for i in sorted(out) for guess in out[i]]

    def sizes(self, long: bool) -> list[int]:
        """The lists that a secret is looked for in."""
        return [n for n in self.config.lists if long or n <= 1000]

    def rank(
        self,
        data: AttackData,
        row: int,
        which: int,
        target: Tensor,
        sizes: Sequence[int],
        draws: int = 1,
    ) -> Guess:
        """One secret of one record; ``target`` as ``observed`` gives it, or a mean of ``draws`` of
        them: the likelihood of several draws is that of their mean."""
        record, secret = _records(data)[row], data.secrets[row][which]
        rng = random.Random(f"luck/{self._seed}/{record.record_id}/{which}")
        values = self._draw(record, which, secret, max(sizes, default=2))
        distance = self._distances(data, row, [_put(record, secret, v) for v in values], target)
        score = -distance * draws / (2 * self.noise**2)
        # equal candidates cannot be told apart: a random one of them comes first
        luck = torch.tensor([rng.random() for _ in values], dtype=torch.float64)
        ranked: dict[int, Ranked] = {}
        best: Ids = secret.ids
        for size in sizes:
            some, chance = score[:size], luck[:size]
            first = (some > some[0]) | ((some == some[0]) & (chance > chance[0]))
            nats = float(some.log_softmax(0)[0]) + math.log(len(some))
            ranked[size] = Ranked(len(some), 1 + int(first.sum()), nats)
            if size <= 100 or size == sizes[0]:
                top = (some == some.max()).nonzero().flatten()
                best = values[int(top[chance[top].argmax()])]
        length = self._candidates.length_nats(rng, secret)
        return Guess(
            data.record_ids[row],
            secret.category,
            secret.field,
            best,
            lists=ranked,
            length_nats=length,
        )

    def _draw(self, record: TokenRecord, which: int, secret: Secret, size: int) -> list[Ids]:
        rng = random.Random(f"list/{self._seed}/{record.record_id}/{which}")
        return self._candidates.draw(rng, secret, size)

    def observed(self, data: AttackData, row: int) -> Tensor:
        """A segment where its noise is white, float64 ``[T, L, 2, H * D]``: in units of the noise
        where the guard states it, else of the channels."""
        assert self._foresight is not None
        kv, mask = data.kv[row : row + 1].trim(), data.mask[[row]]
        if self._on_grid is None:
            return self._foresight.observed(self._foresight.undone(kv), mask).double()
        points = self._on_grid.grid_points(kv, mask)[0]
        exact = kv.keys.dtype in (torch.float32, torch.float64)
        return (points.round() if exact else points) / STEPS

    def candidate_means(self, data: AttackData, row: int, which: int, size: int) -> Tensor:
        """``means`` under each of up to ``size`` candidates for a secret, the true one first."""
        record, secret = _records(data)[row], data.secrets[row][which]
        values = self._draw(record, which, secret, size)
        texts = self._prefilled(data, row, [_put(record, secret, v) for v in values])
        parts = [texts[i : i + self.config.batch] for i in range(0, len(texts), self.config.batch)]
        return torch.cat([self.means(data, row, part) for part in parts])

    def means(self, data: AttackData, row: int, contexts: Sequence[Ids]) -> Tensor:
        """Of what the contexts would become on the record's edge, ``[N, T, L, 2, H * D]``, in the
        units of ``observed``."""
        assert self._foresight is not None
        on = _behind(data, [row] * len(contexts))
        raw = self.known.source.prefill(contexts, self.config.batch, on)
        mask = data.mask[[row] * len(contexts)]
        if self._on_grid is None:
            return self._foresight.segments(raw, mask)
        return self._on_grid.grid_mean(raw, mask) / STEPS

    def _distances(
        self, data: AttackData, row: int, contexts: Sequence[TokenRecord], target: Tensor
    ) -> Tensor:
        """Squared, float64 ``[N]``. What a guard prefills alike is computed once, so that it is
        equal to the last bit."""
        texts = self._prefilled(data, row, contexts)
        distinct = list(dict.fromkeys(texts))
        found: dict[Ids, Tensor] = {}
        for first in range(0, len(distinct), self.config.batch):
            part = distinct[first : first + self.config.batch]
            mean = self.means(data, row, part)
            n = min(mean.shape[1], len(target))  # another record's segment, for the floor
            gap = (mean[:, :n].double() - target[:n]).square().flatten(1).sum(1)
            found |= dict(zip(part, gap, strict=True))
        distance = torch.stack([found[t] for t in texts]).cpu()
        fits = torch.tensor([len(t) == len(target) for t in texts])
        # a twin of another length is not what was seen; it is only where nothing else fits
        return distance.masked_fill(~fits, torch.inf) if bool(fits.any()) else distance

    def _prefilled(self, data: AttackData, row: int, contexts: Sequence[TokenRecord]) -> list[Ids]:
        """What is prefilled for each context: itself, or the twin that the guard makes of it."""
        guard, source = self.known.guard, self.known.source
        if guard is None or not guard.needs_twin:
            return [r.ids for r in contexts]
        ids = [r.ids for r in contexts]
        kv = source.prefill(ids[:1], on=_behind(data, [row]))
        if guard.marks(kv, data.mask[[row]]) is not None:  # it reads the raw entries of each
            kv = source.prefill(ids, self.config.batch, _behind(data, [row] * len(ids)))
        return twin_contexts(guard, contexts, kv, data.special, data.fixed_length)

    def _longest_number(self, secrets: Sequence[Secret]) -> int | None:
        """Which secret has enough digits for a list above 1,000."""
        digits = [self._candidates.digits(s) for s in secrets]
        k = max(range(len(digits)), key=lambda i: digits[i])
        return k if digits[k] > 4 else None


def _records(data: AttackData) -> list[TokenRecord]:
    if data.records is None or data.segments is not None:
        raise ValueError(
            "attack 'likelihood' compares whole contexts: give single segments with their records "
            "(attack_data), not joint ones"
        )
    return list(data.records)


def _behind(data: AttackData, rows: Sequence[int]) -> KVBatch | None:
    """The consumed segments that the rows' contexts stand behind."""
    return None if data.on is None else data.on[torch.as_tensor(list(rows), dtype=torch.long)]


def _put(record: TokenRecord, secret: Secret, value: Ids) -> TokenRecord:
    """The record with another value wherever the secret stands, marked as one or not."""
    ids, n = list(record.ids), len(secret.ids)
    for at in range(len(ids) - n + 1):
        if record.ids[at : at + n] == secret.ids:
            ids[at : at + n] = value
    return replace(record, ids=tuple(ids))
