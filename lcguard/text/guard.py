"""One edge's guard of text: a string, chat messages, or any JSON value.

    guard = TextGuard("policy.yaml", "intake", "billing", key=key, secrets=["Ada Long"])
    guard.text("Ada Long called.").value         # "[TEXT-3f9a2c...] called."
    guard.messages(state["messages"]).value
    guard.json({"patient": "Ada Long"}).value

Everything but the values stays as it is, byte for byte. What cannot be looked through is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from lcguard.handoff.channel import check_channel
from lcguard.handoff.errors import HandoffError
from lcguard.handoff.keys import deployment_key
from lcguard.handoff.names import split_tenant
from lcguard.handoff.policy import Edge, Policy, load_policy
from lcguard.handoff.request import check_findable
from lcguard.text.placeholder import Placeholders
from lcguard.text.rewriting import Rewriting, leaves_of, rewriting
from lcguard.text.search import Leaf, Search
from lcguard.text.walk import Spot, Walk
from lcguard.value_search import Range

T = TypeVar("T")
Finder = Callable[[str, Collection[str]], Iterable[Range]]
"""Character ranges of what belongs to any of some categories, in a text."""


@dataclass(frozen=True)
class Guarded(Generic[T]):
    """What may be handed over."""

    value: T
    hidden: Mapping[str, int]
    """How many values were hidden, by the word of their placeholders."""
    originals: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Placeholder id to value: secret, for a vault."""


class TextGuard:
    """Guards what ``source`` hands ``audience`` as text."""

    def __init__(
        self,
        policy: Policy | str | Path,
        source: str,
        audience: str,
        *,
        edge: Edge | None = None,
        key: bytes | None = None,
        conversation: str = "",
        secrets: Sequence[str] | None = None,
        detect: Finder | None = None,
        vouched: Collection[str] = (),
    ) -> None:
        """
        Args:
            policy: or the path of its file.
            source: agent that hands over, ``agent`` or ``tenant/agent``.
            audience: agent that reads.
            edge: in place of the policy's, where it was tightened for this hop.
            key: the deployment's, of at least 32 bytes; None takes that of ``LCGUARD_KEY``.
            conversation: within which a value keeps its placeholder.
            secrets: values to hide, ``[]`` for none; each call may name further ones. Needed where
                the edge forbids what nothing vouches for.
            detect: of an edge with ``detect``: finds by itself what belongs to categories.
            vouched: categories of which ``detect`` misses so few that none need be named.

        Raises:
            PolicyError: for a policy or an agent's name that cannot be used.
            HandoffError: for an edge that takes no text (403), or that nobody can guard (400).
        """
        if edge is None:
            found = policy if isinstance(policy, Policy) else load_policy(policy)
            edge = found.for_edge(source, audience)
        self.edge = edge
        check_channel(self.edge, "text")
        check_findable(self.edge)
        if self.edge.detect != "none" and detect is None:
            raise HandoffError(
                400,
                f"{self.edge.name.in_words} says detect: {self.edge.detect}, and no detector was "
                "given: make the guard with lcguard.text_guard, or pass detect",
            )
        self.placeholders = Placeholders(
            deployment_key() if key is None else key, split_tenant(source)[0], conversation
        )
        self._secrets, self._vouched = secrets, frozenset(vouched)
        self._finder = detect if self.edge.detect != "none" else None

    def text(self, text: str, secrets: Sequence[str] | None = None) -> Guarded[str]:
        """A text. Raises ``HandoffError`` (400) as ``json``."""
        if not isinstance(text, str):
            raise HandoffError(400, f"text is a {type(text).__name__}: give a string")
        return self._guarded(lambda walk: walk.text(text), secrets)

    def messages(
        self, messages: Sequence[Any], secrets: Sequence[str] | None = None
    ) -> Guarded[list[Any]]:
        """Messages as OpenAI's chat or Responses API has them. Raises as ``json``."""
        return self._guarded(lambda walk: walk.messages(messages), secrets)

    def json(self, value: Any, secrets: Sequence[str] | None = None) -> Guarded[Any]:
        """Any JSON value, its keys too.

        Raises ``HandoffError`` (400) for what is no JSON value, where a forbidden category is
        neither found by itself nor answered for by ``secrets``, and where a value could still be
        read.
        """
        return self._guarded(lambda walk: walk.json(value), secrets)

    def request(
        self, messages: Sequence[Any], rest: Mapping[str, Any], secrets: Sequence[str] | None = None
    ) -> Guarded[tuple[list[Any], dict[str, Any]]]:
        """Messages and what else of a request is read, such as its tools. Raises as ``json``."""
        return self._guarded(lambda walk: (walk.messages(messages, 1), walk.json(rest)), secrets)

    def choices(
        self, choices: Sequence[Mapping[str, Any]], secrets: Sequence[str] | None = None
    ) -> Guarded[list[dict[str, Any]]]:
        """Those of an answer, chat's or text's. Raises as ``json``."""
        return self._guarded(lambda walk: walk.choices(choices), secrets)

    def output(
        self, items: Sequence[Mapping[str, Any]], secrets: Sequence[str] | None = None
    ) -> Guarded[list[dict[str, Any]]]:
        """The items of an answer of the Responses API. Raises as ``json``."""
        return self._guarded(lambda walk: walk.output(items), secrets)

    def check_named(self, secrets: Sequence[str] | None = None) -> list[str]:
        """The values that are named. Raises ``HandoffError`` (400) where some should be, and none
        are."""
        if self._secrets is None and secrets is None:
            open_ = [
                c for c in self.edge.forbid if c not in self._vouched and c not in self.edge.custom
            ]
            if open_:
                raise HandoffError(
                    400,
                    f"nothing vouches for finding all {', '.join(open_)} in a text: name the "
                    f"values to hide on {self.edge.name.in_words} as secrets, [] for none",
                    "secrets",
                )
        return [*(self._secrets or ()), *(secrets or ())]

    def search(self, secrets: Sequence[str] | None = None) -> Search:
        """What the edge forbids, to be looked for. Raises as ``check_named``."""
        finder, forbid = self._finder, self.edge.forbid
        detect = None if finder is None else lambda text: finder(text, forbid)
        return Search(self.check_named(secrets), self.edge.custom, detect)

    def _guarded(self, make: Callable[[Walk], T], secrets: Sequence[str] | None) -> Guarded[T]:
        search = self.search(secrets)
        hosts: list[tuple[str, Spot]] = []

        def collect(text: str, spot: Spot) -> str:
            hosts.append((text, spot))
            return text

        make(Walk(collect))
        leaves: list[Leaf] = []
        for i, (text, spot) in enumerate(hosts):
            leaves += leaves_of(text, i, spot)
        hits = search.find(leaves)
        found: Rewriting = rewriting(leaves, hits, self.placeholders)
        search.check(found.left, hits)
        made: Iterator[str] = iter([found.apply(text, i) for i, (text, _) in enumerate(hosts)])
        value = make(Walk(lambda text, spot: next(made)))
        return Guarded(value, dict(found.hidden), found.originals)
