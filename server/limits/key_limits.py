"""How much one key may ask for, and how much the whole proxy takes at a time.

Token buckets that hold one minute's worth: a bucket of r per minute refills with r/60 per second
and is full at r, so that a key may spend a minute's allowance at once and then r per minute. All
state is computed when it is looked at; no task runs in the background. By hand, since the buckets
of the library `limits` know no debt, no giving back and no change of a limit that is in use.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Annotated, Self

from pydantic import Field

_SOON_S = 1
"""Retry-After where nobody knows when a request ends."""
_LOOKED_AT = 8
"""Old keys that a new one looks at for one to forget: bounds the work per request."""

Count = Annotated[int, Field(ge=1, le=10**12)]


class Limited(Exception):
    """A request that came too early, or that is too large ever to be let in (status 413)."""

    def __init__(self, reason: str, retry_after_s: int | None, status: int = 429) -> None:
        super().__init__(reason)
        self.reason, self.retry_after_s, self.status = reason, retry_after_s, status


@dataclass(frozen=True)
class Limits:
    """Of one key. None: no limit, or the default where there is one."""

    requests_per_min: Count | None = None
    tokens_per_min: Count | None = None
    """Tokens of prompt and answer."""
    concurrency: Count | None = None
    """Requests at a time."""

    def over(self, default: Limits) -> Limits:
        """These, with ``default`` for what is not said."""
        own = ((f.name, getattr(self, f.name)) for f in fields(self))
        return Limits(**{n: getattr(default, n) if v is None else v for n, v in own})


class Bucket:
    """``per_min`` at most, and as much again each minute."""

    def __init__(self, per_min: int, now_s: float) -> None:
        self.per_min, self._level, self._at_s = per_min, float(per_min), now_s

    def wait_s(self, n: int, now_s: float) -> float:
        """Seconds until ``n`` can be taken; 0: now."""
        return max(0.0, (n - self._now(now_s)) * 60 / self.per_min)

    def take(self, n: int, now_s: float) -> None:
        """Takes ``n``, below zero where that is what was used; a negative ``n`` gives back."""
        self._level = min(float(self.per_min), self._now(now_s) - n)

    def resize(self, per_min: int, now_s: float) -> None:
        """Another limit from now on. What was spent stays spent: a change is no fresh minute."""
        spent = self.per_min - self._now(now_s)
        self.per_min, self._level = per_min, per_min - spent

    def full_at_s(self, now_s: float) -> float:
        """When it is as if it had never been used."""
        return now_s + self.wait_s(self.per_min, now_s)

    def saved(self) -> list[float]:
        """For ``restored``."""
        return [self.per_min, self._level, self._at_s]

    @classmethod
    def restored(cls, saved: Sequence[float] | None) -> Bucket | None:
        """As ``saved`` gave it; None for none."""
        if saved is None:
            return None
        per_min, level, at_s = saved
        made = cls(int(per_min), at_s)
        made._level = level
        return made

    def _now(self, now_s: float) -> float:
        passed_s = max(0.0, now_s - self._at_s)
        self._at_s = max(now_s, self._at_s)
        self._level = min(float(self.per_min), self._level + passed_s * self.per_min / 60)
        return self._level


class Account:
    """What one key has spent."""

    def __init__(self) -> None:
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.running = 0

    def apply(self, limits: Limits, now_s: float) -> None:
        self.requests = _fitted(self.requests, limits.requests_per_min, now_s)
        self.tokens = _fitted(self.tokens, limits.tokens_per_min, now_s)

    def admit(self, limits: Limits, now_s: float, tokens: int) -> None:
        """Counts one request and sets ``tokens`` aside, both or neither. Raises ``Limited``."""
        if limits.concurrency is not None and self.running >= limits.concurrency:
            raise Limited(f"the key has {limits.concurrency} requests running already", _SOON_S)
        if self.requests is not None and (wait_s := self.requests.wait_s(1, now_s)):
            raise _later(f"the key's {limits.requests_per_min} requests a minute are spent", wait_s)
        self.reserve(tokens, now_s)
        self.running += 1
        if self.requests is not None:
            self.requests.take(1, now_s)

    def reserve(self, n: int, now_s: float) -> None:
        """Sets ``n`` tokens aside. Raises ``Limited``, and sets none aside then."""
        bucket = self.tokens
        if bucket is None:
            return
        if n > bucket.per_min:
            raise Limited(
                f"the request may take {n} tokens, the key has {bucket.per_min} a minute: "
                "shorten the prompt or lower max_tokens",
                None,
                413,
            )
        if wait_s := bucket.wait_s(n, now_s):
            raise _later(f"the key's {bucket.per_min} tokens a minute are spent", wait_s)
        bucket.take(n, now_s)

    def full_at_s(self, now_s: float) -> float:
        """When its buckets are as if they had never been used."""
        buckets = (self.requests, self.tokens)
        return max((b.full_at_s(now_s) for b in buckets if b is not None), default=now_s)

    def fresh(self, now_s: float) -> bool:
        """Whether it is as if it had never been used, so that it can be forgotten."""
        return self.running == 0 and self.full_at_s(now_s) <= now_s

    def saved(self) -> dict[str, list[float]]:
        """Its buckets, for ``restored``."""
        buckets = {"requests": self.requests, "tokens": self.tokens}
        return {name: b.saved() for name, b in buckets.items() if b is not None}

    @classmethod
    def restored(cls, saved: Mapping[str, Sequence[float]]) -> Account:
        """As ``saved`` gave it; nothing runs."""
        made = cls()
        made.requests = Bucket.restored(saved.get("requests"))
        made.tokens = Bucket.restored(saved.get("tokens"))
        return made


def _fitted(bucket: Bucket | None, per_min: int | None, now_s: float) -> Bucket | None:
    if per_min is None:
        return None
    if bucket is None:
        return Bucket(per_min, now_s)
    if bucket.per_min != per_min:
        bucket.resize(per_min, now_s)
    return bucket


class Admission:
    """One running request of a key; a context manager that ends it."""

    def __init__(self, account: Account, clock: Callable[[], float], reserved: int = 0) -> None:
        self._account, self._clock = account, clock
        self._reserved = reserved
        self._ended = False

    def reserve(self, n: int) -> None:
        """Sets ``n`` further tokens aside. Raises ``Limited``, and sets none aside then."""
        self._account.reserve(n, self._clock())
        self._reserved += n

    def settle(self, actual: int) -> None:
        """Charges what was used in place of what was set aside; more leaves a debt.

        A request that ends without it is charged what was set aside.
        """
        if self._account.tokens is not None:
            self._account.tokens.take(actual - self._reserved, self._clock())
        self._reserved = actual

    def end(self) -> None:
        """The request is over. Only the first call counts."""
        if not self._ended:
            self._ended = True
            self._account.running -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


class KeyLimits:
    """The limits of every key. For one thread, such as an event loop's."""

    def __init__(
        self,
        default: Limits | None = None,
        *,
        max_keys: int = 65536,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``max_keys``: keys that are remembered at a time."""
        self.default, self._max_keys, self._clock = default or Limits(), max_keys, clock
        self._accounts: OrderedDict[str, Account] = OrderedDict()

    def __len__(self) -> int:
        return len(self._accounts)

    def of(self, limits: Limits | None) -> Limits:
        """What holds for a key with these."""
        return (limits or Limits()).over(self.default)

    def admit(self, key_id: str, limits: Limits | None = None, tokens: int = 0) -> Admission:
        """Lets one request of a key in and sets ``tokens`` aside; all of it or nothing.

        Raises ``Limited``: such a request counts against nothing.
        """
        limits, now_s = self.of(limits), self._clock()
        if limits == Limits():
            return Admission(_unlimited(), self._clock)
        account = self._account(key_id, now_s)
        account.apply(limits, now_s)
        account.admit(limits, now_s, tokens)
        return Admission(account, self._clock, tokens)

    def _account(self, key_id: str, now_s: float) -> Account:
        account = self._accounts.get(key_id)
        if account is None:
            self._forget(now_s)
            account = self._accounts[key_id] = Account()
        self._accounts.move_to_end(key_id)
        return account

    def _forget(self, now_s: float) -> None:
        """Drops old accounts that hold nothing. Raises ``Limited`` where none can be spared:
        to forget one that was spent would give its key a fresh minute."""
        for key_id in [k for k, _ in zip(self._accounts, range(_LOOKED_AT), strict=False)]:
            if self._accounts[key_id].fresh(now_s):
                del self._accounts[key_id]
            else:
                self._accounts.move_to_end(key_id)
        if len(self._accounts) >= self._max_keys:
            raise Limited(f"{self._max_keys} keys are in use at a time", _SOON_S)


def _unlimited() -> Account:
    account = Account()
    account.running = 1
    return account


def _later(reason: str, wait_s: float) -> Limited:
    return Limited(reason, max(1, math.ceil(wait_s)))
