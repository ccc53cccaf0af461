"""The lattice attack on a guard's noise, beside ideal Gaussian scores.

``python -m tests.attacks.lattice`` runs it.

Noise of Box and Muller with 24-bit uniforms leaves a mark: for the true mean, two neighbours a, b
of ``(observed - mean) / sigma`` make ``exp(-(a^2 + b^2) / 2) 2^24`` a whole number, for any other
mean they do not. The attacker tries all values of a forbidden number's last digits through model
and guard. Prints JSON; with TRITON_INTERPRET=1 the kernels are attacked too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import log, pi, sqrt

import torch
from torch import Tensor

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.discrete_gaussian import STEPS
from lcguard.guards.cloak import box_muller
from lcguard.guards.frozen import FrozenGuard
from lcguard.guards.gate import GateGuard
from lcguard.noise import WORDS, key_stream, noise_key
from lcguard.ops import reference
from lcguard.ops.work import decide, work_of
from lcguard.protocols import KVBatch, Mask
from lcguard.records import TokenRecord, mask_of
from lcguard.rule import Rule
from tests.fixtures import make_records

CATEGORY = "government_id"
DIGITS = 4
"""The last of the number: each a token of the nano agent."""
NUMBER = 11
"""Tokens of a whole number, 912-55-1029."""
FAR = 11.0
"""Squared radius from which a whole number is fine enough to be told from a fraction."""
START, PAGE = 3, 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Note:
    record: TokenRecord
    first: int
    """Of the digits that are guessed."""

    @property
    def mask(self) -> Mask:
        return mask_of([Rule((CATEGORY,))])

    @property
    def key(self) -> bytes:
        return noise_key(1, self.record.record_id)

    def with_digits(self, digits: tuple[int, ...]) -> tuple[int, ...]:
        ids = self.record.ids
        return (*ids[: self.first], *digits, *ids[self.first + DIGITS :])


@dataclass(frozen=True)
class Ranks:
    """Of the truth among all candidates; 1 is found, ties count half."""

    gaussian: float
    lattice: float
    both: float
    """By the sum of both scores."""


@cache
def agent() -> HFBackend:
    return load_backend("nano", "cpu")


@cache
def gate() -> GateGuard:
    module = FrozenGuard.from_pretrained("nano:gate").module
    assert isinstance(module, GateGuard)
    return module


def notes(n: int) -> list[Note]:
    """The shortest with a number, for speed, of a set that the guard was not trained on."""
    found = []
    for record in make_records(agent().encoder, 600, seed=77):
        for span in record.spans:
            if span.category == CATEGORY and span.end - span.start == NUMBER:
                found.append(Note(record, span.end - DIGITS))
    return sorted(found, key=lambda note: len(note.record.ids))[:n]


# -- what the receiver gets


def raw_kv(note: Note) -> KVBatch:
    return agent().source.prefill([note.record.ids], 1)


def by_module(note: Note, raw: KVBatch, dtype: torch.dtype) -> KVBatch:
    return FrozenGuard(gate())(raw.to(dtype), note.mask, keys=[note.key]).kv


def by_pages(note: Note, raw: KVBatch, dtype: torch.dtype, *, kernel: bool = False) -> KVBatch:
    """Out of an engine's pages, by the reference or the kernels."""
    if kernel:
        from lcguard.ops import kv_rewrite as ops
    else:
        ops = reference  # type: ignore[assignment]
    module, rotary = gate(), agent().source.rotary
    _, layers, heads, n, dim = raw.keys.shape
    slots = torch.arange(n).flip(0)
    decision = decide(module, module.standardise(raw)[0], note.mask)
    out = torch.empty(2, layers, heads, n, dim, dtype=dtype)
    for i in range(layers):
        pages = torch.zeros(2, -(-n // PAGE), heads, PAGE, dim, dtype=dtype)
        reference.place_layer(
            raw.keys[0, i].to(dtype),
            raw.values[0, i].to(dtype),
            slots,
            rotary,
            START,
            pages[0],
            pages[1],
        )
        work = work_of(module, i, noise_key=note.key, decision=decision)
        ops.rewrite_layer(pages[0], pages[1], slots, rotary, START, work, out[0, i], out[1, i])
    return KVBatch(out[0][None], out[1][None], raw.valid)


@torch.no_grad()
def by_box_muller(note: Note, raw: KVBatch, dtype: torch.dtype) -> KVBatch:
    """As guards were before: float32 noise on a float32 mean."""
    module = gate()
    mean = module.rewrite(module.standardise(raw), raw.valid, note.mask).mean
    words = key_stream(note.key, 0, -(-mean.numel() // WORDS))
    noise = box_muller(words.flatten())[: mean.numel()].view_as(mean)
    noisy = module.finish(mean + module.config.noise * noise, note.mask)
    return module.restore(noisy, raw.to(dtype))


# -- what he makes of it


@dataclass(frozen=True)
class Seen:
    at: Tensor
    """``[T, L, 2, W]`` float64: the observation before ``finish``, in units of the noise."""
    error: Tensor
    """How far rounding may have moved it: a standard deviation, times 2 to be on the safe side."""

    @classmethod
    def of(cls, kv: KVBatch, mask: Mask) -> Seen:
        module = gate()
        at = module.grid_points(kv, mask)[0] / STEPS
        ulp = torch.finfo(kv.keys.dtype).eps / sqrt(12)
        moved = module.channels(kv)[0].double() * ulp / module.scale / module.config.noise
        back = torch.linalg.pinv(module.expand.double()).square()
        error = 2 * torch.einsum("tlkc,lkcd->tlkd", moved.square(), back).sqrt()
        return cls(at, error)

    def gaussian(self, means: Tensor, base: Tensor) -> Tensor:
        """Nats ``[N]`` of means ``[N, T, L, 2, W]``, in the same units, over those of ``base``."""
        apart = (means - base).flatten(1)
        cross = apart @ (self.at - base.double()).float().flatten()
        return (cross - apart.square().sum(1) / 2).double()

    def lattice(self, means: Tensor) -> Tensor:
        """Log-odds ``[N]`` of whole numbers against any."""
        at, error = (x.unflatten(-1, (-1, 2)) for x in (self.at, self.error))
        means = means.unflatten(-1, (-1, 2))
        rough = (at.float() - means).square().sum(-1)
        where = (rough > FAR).nonzero(as_tuple=True)
        r = at[where[1:]] - means[where].double()
        whole = torch.exp(-r.square().sum(-1) / 2) * 2.0**24
        width = whole * (r * error[where[1:]]).square().sum(-1).sqrt()
        width = width.clamp_min(1e-4)
        off = whole - whole.round().clamp_min(1)
        density = torch.exp(-((off / width) ** 2) / 2) / (width * sqrt(2 * pi))
        odds = torch.where(width < 0.4, torch.log(0.99 * density + 0.01), 0.0)
        return odds.new_zeros(len(means)).index_add_(0, where[0], odds)


def candidates(n: int, truth: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Token ids of the truth, then of others, evenly among the 10,000 numbers."""
    digit = [agent().encoder.tokenizer.convert_tokens_to_ids(str(i)) for i in range(10)]
    every = 10**DIGITS // n
    rows = [tuple(digit[int(c)] for c in f"{i:0{DIGITS}d}") for i in range(0, 10**DIGITS, every)]
    return [truth, *(row for row in rows if row != truth)][:n]


@torch.no_grad()
def means_of(note: Note, raw: KVBatch, n: int, batch: int = 100) -> Iterator[Tensor]:
    """Of every candidate, the truth first, in units of the noise: ``[batch, T, L, 2, W]``."""
    module, rows = gate(), candidates(n, note.record.ids[note.first : note.first + DIGITS])
    for start in range(0, len(rows), batch):
        texts = [note.with_digits(row) for row in rows[start : start + batch]]
        same = raw[torch.zeros(len(texts), dtype=torch.long)]
        past = KVBatch(
            same.keys[..., : note.first, :],
            same.values[..., : note.first, :],
            same.valid[:, : note.first],
        )
        fresh = agent().source.prefill([t[note.first :] for t in texts], len(texts), past)
        kv = KVBatch.join([past, fresh])
        mask = Mask(*(m.expand(len(texts), -1) for m in (note.mask.forbid, note.mask.derive)))
        mean = module.rewrite(module.standardise(kv), kv.valid, mask).mean
        yield mean / module.config.noise


def rank_of_first(scores: Tensor) -> float:
    better, equal = (scores > scores[0]).sum(), (scores == scores[0]).sum() - 1
    return float(1 + better + equal / 2)


def ranks(note: Note, raw: KVBatch, received: dict[str, KVBatch], n: int) -> dict[str, Ranks]:
    seen = {name: Seen.of(kv, note.mask) for name, kv in received.items()}
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in seen}
    base = None
    for means in means_of(note, raw, n):
        base = means[0].clone() if base is None else base
        for name, s in seen.items():
            parts[name].append((s.gaussian(means, base), s.lattice(means)))
    out = {}
    for name, scores in parts.items():
        gaussian, lattice = (torch.cat(x) for x in zip(*scores, strict=True))
        every = gaussian, lattice, gaussian + lattice
        out[name] = Ranks(*(rank_of_first(x) for x in every))
    return out


def attack(n_notes: int, n: int, *, kernel: bool) -> dict[str, list[Ranks]]:
    """Ranks of every note, by path and dtype; ``before`` is the noise of before."""
    found: dict[str, list[Ranks]] = {}
    for note in notes(n_notes):
        raw = raw_kv(note)
        received = {"before float32": by_box_muller(note, raw, torch.float32)}
        for name, dtype in DTYPES.items():
            received[f"module {name}"] = by_module(note, raw, dtype)
            received[f"reference {name}"] = by_pages(note, raw, dtype)
            if kernel:
                received[f"kernel {name}"] = by_pages(note, raw, dtype, kernel=True)
        for name, rank in ranks(note, raw, received, n).items():
            found.setdefault(name, []).append(rank)
    return found


def advantages(rows: list[Ranks]) -> dict[str, tuple[float, float]]:
    """Mean and standard error, over notes, of the nats by which the lattice's ranks lie below the
    Gaussian ones."""
    out = {}
    for kind in ("lattice", "both"):
        nats = torch.tensor([log(r.gaussian) - log(getattr(r, kind)) for r in rows])
        out[kind] = float(nats.mean()), float(nats.std() / len(nats) ** 0.5)
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    everything = attack(
        int(sys.argv[1]), int(sys.argv[2]), kernel=os.environ.get("TRITON_INTERPRET") == "1"
    )
    print(json.dumps({k: [list(vars(r).values()) for r in v] for k, v in everything.items()}))
