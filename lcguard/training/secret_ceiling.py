"""A ceiling on how often anybody names one secret, whatever he computes and knows beside it.

**What is bounded.** One draw Y of a guarded segment; S one secret, C = c all the rest of the
record (the other secrets, and S's number of tokens), known to the attacker, as are model and guard.
His guess is any function of (Y, c) and of what else he knows that lies behind S: W, with
``P(S = s | c, W) <= g(c)`` for all s. g is his blind guess.

**Per context.** Let ``P_s`` be the law of Y for (s, c). He wins on sets ``A_s`` of segments, one
for each s and disjoint. For any law Q of segments and any l >= 1 that do not depend on S given c,

    P(win | c) = E_S P_S(A_S) <= E_S [l Q(A_S) + E_l(P_S || Q)] <= l g(c) + E_S E_l(P_S || Q),

    E_l(P || Q) = sup_A P(A) - l Q(A) = E_{Y ~ P} (1 - l Q(Y) / P(Y))+,

the last step since E_S Q(A_S) = sum_s P(s) Q(A_s) <= g(c) (given W, then in expectation over it).
This is the converse of Polyanskiy, Poor and Verdu (IEEE Trans. Inf. Theory 56, 2010), with the
hockey-stick divergence in place of Fano's inequality on KL: where a guard tells k bits of a uniform
secret of n bits and Q is the mixture of all P_s, l = 2^k gives exactly 2^k / 2^n, where KL between
pairs is infinite.

**Over contexts.** The right side is linear in the law of (S, Y) given c. So a record's own secret s
and a draw of its noise give an unbiased figure ``l g + (1 - l Q(Y) / P_s(Y))+``, and these average
to a bound on the average success over contexts. A ceiling computed from an information *estimated*
per context would not: it is concave, so that by Jensen's inequality noisy estimates pull its
average below the truth. A heavy tail costs its own contexts and no more: a figure is at most 3/2.

**Q and l** may be anything that s did not choose. Q is 7/10 the mixture over references (values
drawn from the field's law, put in the secret's place) and 3/10 the law around their mean; l is what
serves the references best against each other, at most ``1 / 2g``; where even that foresees 1 or
more the figure is 1. A poor choice makes the ceiling loose, never wrong: it is not even needed that
the references have the secret's law. A mean of grid points may lie between them: the discrete
Gaussian's normaliser is largest at integers (Poisson summation), so that the formula for real
centres gives ``Q(Y) / P_s(Y)`` or less, and the figure or more.

**Exactly.** One record of each scenario and one secret of it, drawn at random, make independent
figures. Their mean is bounded without asymptotics (``lcguard.training.bounded_mean``) at nine
tenths of the risk that ``level`` leaves; the tenth pays for bounds on each law's most probable
value, from which g comes. Noise is drawn as a hop draws it; its table is the ideal discrete
Gaussian but for a total variation of 5e-16 an entry, by which a ceiling may be too low.

**What is not said.** Of several draws of one content (an edge gives one, equal for equal content),
of other segments that tell of the same secret, of records unlike these, of values that depend on
the rest of the record by more than field and length, of what the length tells, and of parts of a
value: to name it is to name all of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcguard.discrete_gaussian import STEPS
from lcguard.guards.base import GuardModule
from lcguard.noise import noise_key, segment_noise
from lcguard.records import TokenRecord, TokenSpan, mask_of
from lcguard.source import ModelSource
from lcguard.tokens import REPEAT
from lcguard.training.bounded_mean import mean_upper_bound
from lcguard.training.known_values import KnownValues, Law, written_otherwise
from lcguard.training.twins import forbidden_spans, with_value

Floats = NDArray[np.float64]
GUESSES = (0.1, 0.04, 0.01, 0.001)
"""Least blind guesses that ceilings are given for; more where a field's values allow it."""
GUESS = 0.04
"""Of the ceiling that a card leads with: one value of 25."""
SECRETS, REFERENCES = 800, 32
"""Looked at, most; compared with, each."""
DRAWS = 8
"""Of noise, a secret."""
_FACTORS = 2.0 ** np.arange(0, 10, 0.5)
"""l to choose from."""
_MOST = 1.5
_CENTRE = 0.3
"""Share of Q around the references' mean."""
_RISK_OF_LAWS = 0.1
_TOKENS = 16
"""Of a segment at a time."""


@dataclass(frozen=True)
class Seen:
    """One secret's segment (row 0) and those of references, around the references' mean and in
    units of the noise: all that likelihood ratios depend on."""

    category: str
    law: Law
    gram: Floats
    """``[1 + n, 1 + n]`` inner products; n = 0 where too little is known of the law."""
    dots: Floats
    """``[draws, 1 + n]`` with draws of the noise."""
    others: Sequence[int] = ()
    """References that are distinct values and not the secret's."""

    def log_ratio(self, row: int, references: NDArray[np.int64], dots: Floats) -> Floats:
        """log Q(Y) / P(Y) ``[draws]`` where Y has the mean of ``row``."""
        ahead = self.ahead(row, references, dots)
        mixed: Floats = np.logaddexp.reduce(ahead, 1) - np.log(len(references))
        centre = -self.gram[row, row] / 2 - dots[:, row]
        ratio: Floats = np.logaddexp(mixed + np.log(1 - _CENTRE), centre + np.log(_CENTRE))
        return ratio

    def ahead(self, row: int, others: NDArray[np.int64], dots: Floats) -> Floats:
        """log P_other(Y) / P_row(Y) ``[draws, others]``."""
        g = self.gram
        apart = g[row, row] - 2 * g[row, others] + g[others, others]
        found: Floats = -apart / 2 - (dots[:, [row]] - dots[:, others])
        return found

    def pair_nats(self) -> Floats:
        """KL divergence to each reference."""
        g = self.gram
        nats: Floats = (g[0, 0] - 2 * g[0, 1:] + np.diag(g)[1:]) / 2
        return nats

    def figure(self, guess: float, lost: Floats) -> float:
        """The unbiased figure of this secret, 0..3/2, for a blind guess; ``lost``: see ``lost``."""
        factors = _FACTORS[_FACTORS * guess <= _MOST - 1]
        foreseen = factors * guess + lost[: len(factors)]
        if not len(factors) or foreseen.min() >= 1:
            return 1.0
        factor = factors[int(foreseen.argmin())]
        ratio = np.exp(self.log_ratio(0, np.arange(1, len(self.gram)), self.dots))
        return float(factor * guess + np.clip(1 - factor * ratio, 0, 1).mean())

    def lost(self, seed: str) -> Floats:
        """E_l that is to be expected for every l, from the references alone: each in turn plays the
        secret against the others. 1 where there are too few."""
        n = len(self.gram) - 1
        if n < 2:
            return np.ones(len(_FACTORS))
        rows = np.arange(1, n + 1)
        values, vectors = np.linalg.eigh(self.gram[1:, 1:])
        root = vectors * np.sqrt(values.clip(0))
        dots = np.zeros((DRAWS, n + 1))
        digits = random.Random(f"l/{seed}").getrandbits(64)
        dots[:, 1:] = np.random.default_rng(digits).standard_normal((DRAWS, n)) @ root.T
        played = rows[:16]
        ratios = [np.exp(self.log_ratio(row, rows[rows != row], dots)) for row in played]
        lost: Floats = np.clip(1 - np.array(ratios)[..., None] * _FACTORS, 0, 1).mean((0, 1))
        return lost

    def picked(self) -> float:
        """How often the optimal attacker picks the secret from a list of it and the others, over
        the draws; those that are equal to it share."""
        ahead = self.ahead(0, np.array(self.others, dtype=np.int64), self.dots)
        return float(((ahead <= 0).all(1) / (1 + (ahead == 0).sum(1))).mean())


@torch.no_grad()
def see(
    module: GuardModule,
    record: TokenRecord,
    span: TokenSpan,
    law: Law,
    source: ModelSource,
    references: int,
    seed: str,
) -> Seen:
    """A secret's segment and its references'."""
    category, values = str(span.category), [*law.values]
    if law.guess(0.5) == 1.0:
        return Seen(category, law, np.zeros((1, 1)), np.zeros((DRAWS, 1)))
    rng = random.Random(f"references/{seed}")
    drawn = [values[int(rng.random() * len(values))] for _ in range(references)]
    contexts = [record.ids, *(with_value(record, span, v) for v in drawn)]
    points = module.grid_mean(source.prefill(contexts), mask_of([record.rule] * len(contexts)))
    n, tokens = len(contexts), len(record.ids)
    gram, dots = np.zeros((n, n)), np.zeros((DRAWS, n))
    keys = [noise_key(0, f"{seed}/{i}") for i in range(DRAWS)]
    for first in range(0, tokens, _TOKENS):
        part = points[:, first : min(first + _TOKENS, tokens)].long()
        apart = ((part - part[1:2]).flatten(1).double() / STEPS).cpu().numpy()
        noise = torch.stack([segment_noise(k, module.shape, part.shape[1], first) for k in keys])
        gram += apart @ apart.T
        dots += (noise.flatten(1).double() / STEPS).numpy() @ apart.T
    around = np.eye(n)
    around[:, 1:] -= 1 / (n - 1)
    secret = record.ids[span.start : span.end]
    others = {v: i + 1 for i, v in enumerate(drawn) if v != secret}
    return Seen(category, law, around @ gram @ around.T, dots @ around.T, sorted(others.values()))


def chosen_secrets(
    records: Sequence[TokenRecord], most: int, seed: int
) -> list[tuple[TokenRecord, TokenSpan]]:
    """One secret of one record of each scenario, at random, in random order."""
    rng = random.Random(f"secrets/{seed}")
    by_scenario: dict[str, list[tuple[TokenRecord, list[TokenSpan]]]] = {}
    for r in records:
        if spans := [s for s in forbidden_spans(r, r.forbid) if s.field != REPEAT]:
            by_scenario.setdefault(r.scenario_id, []).append((r, spans))
    found = [rng.choice(rows) for _, rows in sorted(by_scenario.items())]
    rng.shuffle(found)
    return [(r, rng.choice(spans)) for r, spans in found[:most]]


def secret_ceilings(
    module: GuardModule,
    records: Sequence[TokenRecord],
    source: ModelSource,
    known: KnownValues,
    *,
    level: float = 0.95,
    seed: int = 0,
    secrets: int = SECRETS,
    references: int = REFERENCES,
) -> dict[str, Any]:
    """Ceilings for several blind guesses, by category for ``GUESS``; and, measured and not bounded,
    how often the optimal attacker picks the secret from a list of it and the references.

    Every figure holds at ``level`` for itself. Raises ``ValueError`` for a guard without noise, or
    where no record has a forbidden value.
    """
    seen: list[Seen] = []
    for record, span in (chosen := chosen_secrets(records, secrets, seed)):
        law = known.of(record, span, span.category in record.derive)
        if written_otherwise(record, span):
            law = Law(())
        number = f"{seed}/{record.record_id}/{span.start}"
        seen.append(see(module, record, span, law, source, references, number))
    if not chosen:
        raise ValueError("no held-out record has a forbidden value: nothing to certify")
    return summary(seen, level, seed)


def summary(seen: Sequence[Seen], level: float, seed: int) -> dict[str, Any]:
    """What is said of the secrets that were seen."""
    laws = {id(s.law.values): s.law for s in seen}
    risk = (1 - level) * _RISK_OF_LAWS / len(laws)
    guesses = {i: law.guess(risk) for i, law in laws.items()}
    own = [guesses[id(s.law.values)] for s in seen]
    lost = [s.lost(f"{seed}/{i}") for i, s in enumerate(seen)]
    inner = 1 - (1 - level) * (1 - _RISK_OF_LAWS)

    def bounded(rows: Sequence[int], least: float) -> dict[str, float]:
        at = [max(least, own[i]) for i in rows]
        figures = [seen[i].figure(g, lost[i]) for i, g in zip(rows, at, strict=True)]
        upper = _MOST * mean_upper_bound([f / _MOST for f in figures], inner)
        return {
            "guess": float(np.mean(at)),
            "ceiling": float(np.mean(figures)),
            "upper": min(1.0, upper),
            "secrets": len(rows),
        }

    every = range(len(seen))
    picks = [i for i in every if len(seen[i].others)]
    picked = [seen[i].picked() for i in picks]
    nats = [float(s.pair_nats().mean()) for s in seen if len(s.gram) > 1]
    categories = sorted({s.category for s in seen})
    return {
        "level": level,
        "ceilings": [{"least_guess": g, **bounded(every, g)} for g in GUESSES],
        "by_category": {
            c: bounded([i for i in every if seen[i].category == c], GUESS) for c in categories
        },
        "listed": {
            "candidates": max((1 + len(seen[i].others) for i in picks), default=0),
            "asr": float(np.mean(picked)) if picked else None,
            "upper": mean_upper_bound(picked, level) if picked else None,
            "chance": float(np.mean([1 / (1 + len(seen[i].others)) for i in picks] or [1.0])),
            "secrets": len(picks),
        },
        "pair_nats": {
            "mean": float(np.mean(nats)),
            **{f"p{q}": float(np.quantile(nats, q / 100)) for q in (50, 90, 99)},
            "max": max(nats),
        }
        if nats
        else {},
        "unknown": sum(len(s.gram) == 1 for s in seen),
    }
