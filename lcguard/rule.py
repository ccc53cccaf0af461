"""What a receiver may not learn: a value type for the pair that goes through the whole house."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lcguard.categories import CATEGORIES, DERIVABLE, in_order


@dataclass(frozen=True)
class Rule:
    """Categories that are hidden, and how far."""

    forbid: tuple[str, ...] = ()
    """Of the library, or of a policy's own (``lcguard.custom_categories``)."""
    derive: tuple[str, ...] = ()
    """Forbidden categories whose derived value (a band) may pass."""

    @classmethod
    def of(cls, forbid: Iterable[str], derive: Iterable[str] = ()) -> Rule:
        """A rule of names that a person wrote, in their order. Raises ``ValueError`` for one that
        is none of the library's categories, or has no derived value, or is derived without being
        forbidden."""
        hidden = _known("forbid", forbid, CATEGORIES)
        return cls(hidden, _known("derive", derive, [c for c in DERIVABLE if c in hidden]))

    @classmethod
    def hiding(cls, names: Collection[str | None]) -> Rule:
        """Forbids those categories that are among ``names``."""
        return cls(tuple(c for c in CATEGORIES if c in names))

    @classmethod
    def joined(cls, rules: Iterable[Rule]) -> Rule:
        """The rule that is as strict as all of them: a category is forbidden if any forbids it, and
        a value may be derived only where every rule that forbids it says so."""
        found = list(rules)
        forbid = in_order(c for rule in found for c in rule.forbid)
        exact = {c for rule in found for c in rule.forbid if c not in rule.derive}
        return cls(forbid, tuple(c for c in forbid if c not in exact))

    def without(self, categories: Collection[str]) -> Rule:
        """The rule for all other categories."""
        return Rule(
            tuple(c for c in self.forbid if c not in categories),
            tuple(c for c in self.derive if c not in categories),
        )

    def missing(self, wanted: Rule) -> tuple[str, ...]:
        """Categories that ``wanted`` forbids, or forbids to derive, and this rule does not."""
        return tuple(
            c
            for c in wanted.forbid
            if c not in self.forbid or (c in self.derive and c not in wanted.derive)
        )


def _known(which: str, names: Iterable[str], valid: Collection[str]) -> tuple[str, ...]:
    out = tuple(names)
    for name in out:
        if name not in valid:
            raise ValueError(f"{which} names {name!r}; use {', '.join(valid) or 'none'}")
    return out
