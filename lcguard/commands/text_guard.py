"""The public API's guard of text: an edge's, with the detector that the edge asks for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from lcguard.handoff.policy import Policy, load_policy
from lcguard.text.guard import TextGuard
from lcguard.value_search import Range


def text_guard(
    policy: Policy | str | Path,
    source: str,
    audience: str,
    *,
    key: bytes | None = None,
    conversation: str = "",
    secrets: Sequence[str] | None = None,
) -> TextGuard:
    """What ``source`` may hand ``audience`` as text, in this process, without a server.

    ``lcguard.text_guard("policy.yaml", "intake", "billing").messages(state["messages"]).value``

    Args:
        policy: or the path of its file; the edge says ``channel: text``.
        key: the deployment's; None takes that of ``LCGUARD_KEY``.
        conversation: within which a value keeps its placeholder.
        secrets: values to hide, ``[]`` for none; needed where nothing vouches for a category.

    Raises ``ValueError`` in one line for a policy, an edge or a detector that cannot be used.
    """
    found = policy if isinstance(policy, Policy) else load_policy(policy)
    return TextGuard(
        found,
        source,
        audience,
        key=key,
        conversation=conversation,
        secrets=secrets,
        detect=_detector(found.for_edge(source, audience).detect),
    )


def _detector(name: str) -> Callable[[str, Collection[str]], Iterable[Range]] | None:
    """Loaded here, so that an edge without one waits for nothing."""
    if name == "presidio":
        from lcguard.server.detection.detector import Detector

        return Detector().find
    if name == "lcguard":
        from lcguard.commands.text_detector import shared_text_detector

        finder = shared_text_detector()
        return lambda text, forbid: [(s.start, s.end) for s in finder.find(text, forbid)]
    return None
