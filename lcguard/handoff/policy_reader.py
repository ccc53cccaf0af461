"""Reads a policy file again and again, and takes no cut-off one for whole.

YAML has no need of an end: a file cut off in the middle of a write is a policy too, one with fewer
edges or a shorter ``forbid``. What shows that a file is whole is its last line, YAML's end of a
document::

    version: 1
    edges: [...]
    ...

or braces around all of it, as in JSON. A changed file without either is taken where it is at least
as strict as the one before, edge by edge: then a cut did no harm.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from lcguard.handoff.names import ANY
from lcguard.handoff.policy import Edge, Policy, PolicyError, check_finders, load_policy

_ANYBODY = "somebody-else"
_LESS = ("ttl_s", "max_segments", "max_draws")
"""Fields of which less is stricter; none is no bound."""


class PolicyReader:
    """``parse`` of a ``ReloadingFile`` policy: each call is held against the last that was good."""

    def __init__(self, finders: Collection[str] | None = None) -> None:
        """``finders``: see ``check_finders``; None where the engine's guards are not known."""
        self._last: Policy | None = None
        self._finders = finders

    def __call__(self, path: Path) -> Policy:
        """Raises ``PolicyError``, also for a change that only a whole file may make."""
        before = _mark(path)
        whole = is_whole(path)
        policy = load_policy(path)
        if self._finders is not None:
            check_finders(policy, self._finders, str(path))
        if _mark(path) != before:
            raise PolicyError(f"{path}: changed while it was read")
        if self._last is not None and not whole and (why := loosened(self._last, policy)):
            raise PolicyError(
                f"{path}: {why}, and nothing shows that the file is whole: if it is, end it with a "
                "line `...`"
            )
        self._last = policy
        return policy


def is_whole(path: Path) -> bool:
    """Whether the file shows its own end. Raises ``PolicyError`` where it cannot be read."""
    try:
        data = path.read_bytes().strip()
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read: {error.strerror}") from None
    lines = data.splitlines() or [b""]
    return lines[-1].rstrip() == b"..." or data.startswith(b"{")


def loosened(old: Policy, new: Policy) -> str:
    """What ``new`` hides or bounds less than ``old`` somewhere, in a line; empty for nothing."""
    for source, audience in _hops(old, new):
        before, after = old.for_edge(source, audience), new.for_edge(source, audience)
        if what := _looser(before, after):
            return f"{after.name.in_words}: {what}"
    return ""


def _hops(*policies: Policy) -> Iterator[tuple[str, str]]:
    """A hop for each entry of the policies; ``*`` is an agent that none of them names."""
    keys = {(e.tenant, e.source, e.audience) for p in policies for e in p.edges}
    for tenant, *names in sorted(keys):
        group = "" if tenant == ANY else f"{tenant}/"
        source, audience = (group + (_ANYBODY if n == ANY else n) for n in names)
        yield source, audience
    yield _ANYBODY, _ANYBODY


def _looser(old: Edge, new: Edge) -> str:
    lost = [c for c in old.forbid if c not in new.forbid]
    if lost:
        return f"{', '.join(lost)} no longer forbidden"
    less = [c for c, own in old.custom.items() if not new.custom[c].covers(own)]
    if less:
        return f"{', '.join(less)} has lost terms or patterns, or has another head"
    told = [c for c in new.derive if c not in old.derive]
    if told:
        return f"the derived value of {', '.join(told)} now passes"
    for name in type(old).model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if name in ("forbid", "derive", "tenant") or before == after:
            continue
        if name == "guard" and (before == "identity" or not old.forbid):
            continue  # it hid nothing before
        if name in _LESS and after is not None and (before is None or after < before):
            continue
        return f"{name} is {after!r}, it was {before!r}"
    return ""


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
