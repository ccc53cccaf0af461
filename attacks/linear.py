"""Linear probes by scikit-learn: one closed-form or logistic classifier of the guarded entry.

The weakest of the standard probes and the quickest: all layers' keys and values of one token,
standardised, to the token that stood there. ``ridge`` solves ``min ||XW - Y||^2 + alpha ||W||^2``
with Y in -1, 1 per class (no iteration, so nothing to converge); ``logistic`` is the multinomial
one. Where only a non-linear probe succeeds, a guard hides from linear readers alone.

Scores become probabilities by a softmax with one temperature, fitted on held-back tokens, mixed
with the uniform distribution so that a token outside the classes has a finite cross-entropy.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from lcguard.attacks.base import BaseAttack, register
from lcguard.attacks.decoder import aligned
from lcguard.protocols import AttackData, Guess
from lcguard.records import IGNORE

SOLVERS = ("ridge", "logistic")
_UNIFORM = 0.01
"""Share of the uniform distribution over the vocabulary in every prediction."""


@register("linear")
class LinearAttack(BaseAttack):
    goal = "read each forbidden token linearly off the guarded entry at its own position"
    reference = "linear probing, scikit-learn; positions known"

    @dataclass(frozen=True)
    class Config:
        solver: Literal["ridge", "logistic"] = "ridge"
        alpha: float = 10.0
        """Strength of the L2 penalty."""
        max_tokens: int = 8000
        """Training tokens; secret positions first, then others of the same tokens."""
        max_iter: int = 2000
        """Iterations of the logistic solver."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        c = self.config
        if c.solver not in SOLVERS:
            raise ValueError(f"solver {c.solver!r} is unknown; known: {', '.join(SOLVERS)}")
        if c.max_tokens < 20 or not c.alpha > 0:
            raise ValueError(
                f"max_tokens={c.max_tokens} must be 20 or more and alpha={c.alpha} above 0"
            )
        self.model: Any = None
        self.temperature = 1.0

    def fit(self, pairs: AttackData, *, seed: int = 0) -> LinearAttack:
        """Raises ``ValueError`` where no secret's position is known, ``ImportError`` without
        scikit-learn."""
        model = self._pipeline(seed)
        x, y = _sample(pairs, self.config.max_tokens, seed)
        held = max(1, len(y) // 10)
        # a class of one token alone in the held-back part would be none of the classes
        self.model = model.fit(x[held:], y[held:])
        self.temperature = self._calibrate(x[:held], y[:held], pairs.special.vocab)
        return self

    def _pipeline(self, seed: int) -> Any:
        try:
            from sklearn.linear_model import LogisticRegression, RidgeClassifier
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise ImportError(
                f"attack {self.name!r} needs scikit-learn: pip install lcguard[eval]"
            ) from error
        c = self.config
        if c.solver == "ridge":
            head = RidgeClassifier(alpha=c.alpha)
        else:
            head = LogisticRegression(C=1 / c.alpha, max_iter=c.max_iter, random_state=seed)
        return make_pipeline(StandardScaler(), head)

    def _log_probs(self, x: np.ndarray, vocab: int, temperature: float) -> np.ndarray:
        """``[N, V]`` log-probabilities in nats of the whole vocabulary."""
        classes = self.model.classes_
        scores = np.asarray(self.model.decision_function(x), dtype=np.float64)
        if scores.ndim == 1:  # scikit-learn's form for two classes: the score of the second
            scores = np.stack((-scores, scores), 1) if len(classes) == 2 else scores[:, None]
        scores = scores / temperature
        scores -= scores.max(1, keepdims=True)
        p = np.exp(scores)
        out = np.full((len(x), vocab), _UNIFORM / vocab)
        out[:, classes] += (1 - _UNIFORM) * p / p.sum(1, keepdims=True)
        return np.asarray(np.log(out))

    def _calibrate(self, x: np.ndarray, y: np.ndarray, vocab: int) -> float:
        """The temperature of least cross-entropy on held-back tokens, from a grid."""
        grid = [float(t) for t in np.geomspace(0.1, 10, 11)]
        rows = np.arange(len(y))
        return min(grid, key=lambda t: -float(self._log_probs(x, vocab, t)[rows, y].mean()))

    def recover(self, data: AttackData) -> list[Guess]:
        """One guess a secret; raises ``ValueError`` if not fitted."""
        if self.model is None:
            raise ValueError(f"attack {self.name!r} is not fitted; call fit first")
        features, vocab = data.kv.features().float().cpu().numpy(), data.special.vocab
        spots = [(i, s) for i, secrets in enumerate(data.secrets) for s in secrets]
        here = [features[i, s.positions[0] : s.positions[1]] for i, s in spots]
        if not any(map(len, here)):
            return [Guess(data.record_ids[i], s.category, s.field, ()) for i, s in spots]
        logp = self._log_probs(np.concatenate(here), vocab, self.temperature)
        out, first = [], 0
        for (i, s), rows in zip(spots, here, strict=True):
            part = logp[first : first + len(rows)]
            first += len(rows)
            name = data.record_ids[i], s.category, s.field
            if len(rows) < len(s.ids):  # the guard moved the tokens: nothing to read
                out.append(Guess(*name, (), None, 0.0))
                continue
            guess = part.argmax(1)
            nll = -float(part[np.arange(len(s.ids)), list(s.ids)].sum())
            hits = float(np.mean(guess == np.asarray(s.ids)))
            out.append(
                Guess(*name, tuple(guess.tolist()), nll if math.isfinite(nll) else None, hits)
            )
        return out


def _sample(pairs: AttackData, limit: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features ``[N, F]`` and tokens ``[N]``, shuffled; secret positions before all others."""
    n = pairs.kv.valid.shape[1]
    secret = [
        (i, at, token)
        for i, secrets in enumerate(pairs.secrets)
        for s in secrets
        for at, token in zip(range(s.positions[0], min(s.positions[1], n)), s.ids, strict=False)
    ]
    if not secret:
        raise ValueError("no secret position in the training pairs: nothing to probe")
    rng = random.Random(seed)
    rng.shuffle(secret)
    chosen = secret[:limit]
    if len(chosen) < limit:
        wanted = {token for _, _, token in secret}
        inside = {(i, at) for i, at, _ in secret}
        ids = aligned(pairs.context_ids, n)
        known = pairs.kv.valid.cpu() & (ids != IGNORE)
        others = [
            (i, at, int(ids[i, at]))
            for i, at in known.nonzero().tolist()
            if (i, at) not in inside and int(ids[i, at]) in wanted
        ]
        rng.shuffle(others)
        chosen += others[: limit - len(chosen)]
        rng.shuffle(chosen)
    rows, at, tokens = (list(column) for column in zip(*chosen, strict=True))
    # gathered before they are put side by side: the features of a whole set would not fit
    place = torch.tensor(rows), slice(None), slice(None), torch.tensor(at)
    parts = [t[place].float() for t in (pairs.kv.keys, pairs.kv.values)]  # [N, L, H, D]
    both = torch.stack(parts, 2).flatten(1)  # [N, L * 2 * H * D], the order of features()
    return both.cpu().numpy(), np.asarray(tokens)
