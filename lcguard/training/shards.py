"""A training batch divided among processes, so that their gradients add up to those of one.

Everything random is drawn for the whole batch, in every process alike, which then takes its rows.
A mean over a batch is a sum over processes of each one's mean times its share of what the mean
counts (records, tokens, values); so gradients are added, not averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lcguard.guards.base import Draws, RowsOf
from lcguard.protocols import KVBatch


@dataclass(frozen=True)
class Shards:
    """One process among others; alone without an ``accelerator``. Every method that processes have
    to call together says so."""

    accelerator: Accelerator | None = None

    @property
    def count(self) -> int:
        return 1 if self.accelerator is None else int(self.accelerator.num_processes)

    @property
    def index(self) -> int:
        return 0 if self.accelerator is None else int(self.accelerator.process_index)

    def rows(self, n: int, hops: int = 1, index: int | None = None) -> list[int]:
        """Which of ``hops`` times ``n`` paths, hop after hop, are this process's, or another's.

        Raises ``ValueError`` where there are fewer paths than processes.
        """
        if n < self.count:
            raise ValueError(
                f"a batch of {n} for {self.count} processes: raise batch, or start fewer"
            )
        first = self.index if index is None else index
        return [k * n + i for k in range(hops) for i in range(first, n, self.count)]

    def draws(self, generator: torch.Generator, n: int, hops: int = 1) -> Draws:
        """The noise of this process's rows of a batch, whose segments have one width everywhere."""
        if self.count == 1:
            return generator
        return RowsOf(generator, self.rows(n, hops), hops * n)

    def normal(
        self, generator: torch.Generator, shape: Sequence[int], n: int, hops: int = 1
    ) -> Tensor:
        """Standard normal numbers for this process's rows of ``hops`` times ``n`` segments."""
        drawn = torch.randn((hops * n, *shape[1:]), generator=generator)
        return drawn if self.count == 1 else drawn[self.rows(n, hops)]

    def share(self, n: float) -> float:
        """``n`` over its sum over all processes, which ask together; 0 where that is 0."""
        if self.accelerator is None or self.count == 1:
            return 1.0
        counts = torch.tensor([float(n)], device=self.accelerator.device)
        total = float(self.accelerator.reduce(counts, "sum"))
        return n / total if total else 0.0

    def worst_mean(self, values: Tensor, share: float) -> Tensor:
        """This process's part of the mean over the largest ``share``, of one at least, of the
        values ``[N]`` of all processes, which ask together; N may differ between them."""
        if self.accelerator is None or self.count == 1:
            return values.topk(max(1, math.ceil(share * len(values)))).values.mean()
        counts = self.accelerator.gather(torch.tensor([len(values)], device=values.device))
        sent = values.new_full((int(counts.max()),), -math.inf)
        sent[: len(values)] = values.detach()
        worst = max(1, math.ceil(share * int(counts.sum())))
        chosen = torch.zeros(self.count * len(sent), dtype=torch.bool, device=values.device)
        chosen[self.accelerator.gather(sent).topk(worst).indices] = True
        return values[chosen.view(self.count, -1)[self.index, : len(values)]].sum() / worst

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces each gradient by the sum over all processes, which ask together. What has none
        in any of them keeps none."""
        if self.accelerator is None or self.count == 1:
            return
        own = list(parameters)
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
        there = torch.tensor([float(p.grad is not None) for p in own]).to(found[0])
        flat = torch.cat([*(g.flatten() for g in found), there])
        *summed, there = self.accelerator.reduce(flat, "sum").split(
            [*(p.numel() for p in own), len(own)]
        )
        for p, gradient, known in zip(own, summed, there.tolist(), strict=True):
            p.grad = gradient.view_as(p).clone() if known else None

    def whole(self, kv: KVBatch, n: int, hops: int = 1) -> KVBatch:
        """The segments of all processes, which ask together, in the order of the batch.
        Differentiable in this one's: the gradients of all add up to those of the whole."""
        if self.accelerator is None or self.count == 1:
            return kv
        most, gather = len(self.rows(n, hops, 0)), self.accelerator.gather

        def gathered(own: Tensor) -> Tensor:
            sent = own.new_zeros(most, *own.shape[1:])
            sent[: len(own)] = own.detach()
            found = gather(sent).view(self.count, most, *own.shape[1:])
            out = own.new_zeros(hops * n, *own.shape[1:])
            for i in range(self.count):
                rows = self.rows(n, hops, i)
                out[rows] = found[i, : len(rows)]
            mine = torch.tensor(self.rows(n, hops), device=own.device)
            return out.index_copy(0, mine, own)

        valid = gathered(kv.valid.float()).bool()
        return KVBatch(gathered(kv.keys), gathered(kv.values), valid)

    def total(self, row: Mapping[str, float]) -> dict[str, float]:
        """Figures of the whole batch from each process's part of them; all ask together. One that
        no process has is not a number."""
        if self.accelerator is None or self.count == 1:
            return dict(row)
        own = torch.tensor([list(row.values())], dtype=torch.float64).float()
        found = self.accelerator.gather(own.to(self.accelerator.device))
        nobody = found.isnan().all(0).tolist()
        sums = found.nansum(0).tolist()
        figures = zip(row, sums, nobody, strict=True)
        return {name: math.nan if none else value for name, value, none in figures}


ALONE = Shards()


def widened(kv: KVBatch, width: int) -> KVBatch:
    """Padded on the right to ``width`` tokens."""
    missing = width - kv.valid.shape[1]
    if not missing:
        return kv
    pad = torch.nn.functional.pad
    keys, values = (pad(x, (0, 0, 0, missing)) for x in (kv.keys, kv.values))
    return KVBatch(keys, values, pad(kv.valid, (0, missing)))
