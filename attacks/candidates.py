"""Lists of values that a secret could have: what an attacker who enumerates tries.

Values come from the sampler of the field where one is known, else from the attacker's own records,
else from redrawn digits in the form of a number. All of a list have the true value's number of
tokens, because the segment shows it; what that alone tells is counted apart (``length_nats``).
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence

from lcguard.protocols import Secret

Ids = tuple[int, ...]
_DIGITS = "0123456789"


class Candidates:
    """Draws lists. ``sample`` gives a value of a field as text, None for a field it does not know;
    ``own`` are secrets of the attacker's own records."""

    def __init__(
        self,
        own: Sequence[Sequence[Secret]],
        decode: Callable[[Sequence[int]], str],
        encode: Callable[[str], Sequence[int]] | None,
        sample: Callable[[str, random.Random], str | None] | None,
    ) -> None:
        self._decode, self._encode, self._sample = decode, encode, sample
        self._own: dict[str, list[Ids]] = defaultdict(list)
        for secrets in own:
            for secret in secrets:
                self._own[secret.field].append(secret.ids)

    def draw(self, rng: random.Random, secret: Secret, size: int) -> list[Ids]:
        """Up to ``size - 1`` distinct values beside the true one, and the true one first."""
        others: dict[Ids, None] = {}
        tries = 0
        while len(others) < size - 1 and tries < 40 * size:
            tries += 1
            value = self._one(rng, secret)
            if value is not None and value != secret.ids and len(value) == len(secret.ids):
                others[value] = None
        return [secret.ids, *others]

    def length_nats(self, rng: random.Random, secret: Secret, draws: int = 200) -> float:
        """What the number of tokens alone tells of the value: minus the logarithm of the share of
        values that have it."""
        found = [self._one(rng, secret) for _ in range(draws)]
        lengths = [len(v) for v in found if v is not None]
        same = sum(n == len(secret.ids) for n in lengths)
        return -math.log((same + 1) / (len(lengths) + 1))

    def digits(self, secret: Secret) -> int:
        """Digits in the value: a number of many is one of a long list."""
        return sum(c in _DIGITS for c in self._decode(secret.ids))

    def _one(self, rng: random.Random, secret: Secret) -> Ids | None:
        text = self._decode(secret.ids)
        if self._sample is not None and self._encode is not None:
            value = self._sample(secret.field, rng)
            if value is not None:
                lead = text[: len(text) - len(text.lstrip())]
                return tuple(self._encode(lead + value))
        own = self._own.get(secret.field, [])
        if self._encode is not None and any(c in _DIGITS for c in text) and rng.random() < 0.5:
            drawn = (rng.choice(_DIGITS) if c in _DIGITS else c for c in text)
            return tuple(self._encode("".join(drawn)))
        return rng.choice(own) if own else None
