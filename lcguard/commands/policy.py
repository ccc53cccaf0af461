"""``lcguard policy check``: what a policy holds, what decides a hop, and what can never match."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from lcguard.handoff.names import ANY
from lcguard.handoff.policy import Policy, load_policy
from lcguard.handoff.policy_reader import is_whole
from lcguard.handoff.policy_review import idle, missed, never, unserved, why


def check_command(
    path: Path,
    hop: tuple[str, str] | None,
    keys: Path | None,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Says what the file holds and, for a hop, which edge decides it.

    Raises ``PolicyError`` or ``KeyringError`` for a file that cannot be used.
    """
    policy = load_policy(path)
    say(f"{path.name}: {summary(policy)}")
    if line := unended(path):
        warn(line)
    for line in warnings(policy, keys or path.with_name("keys.yaml"), must_exist=keys is not None):
        warn(line)
    for line in why(policy, *hop) if hop else ():
        say(line)


def unended(path: Path) -> str:
    """A warning where nothing shows that the file is whole; empty where something does."""
    if is_whole(path):
        return ""
    return (
        f"warning: nothing shows that {path.name} is whole: end it with a line `...`, or a "
        "running server takes no change of it that hides less"
    )


def summary(policy: Policy) -> str:
    own = {name for tenant in (ANY, *policy.tenants) for name in policy.custom_of(tenant)}
    named = f"own categories {', '.join(sorted(own))}, " if own else ""
    return f"{len(policy.edges)} edges, {named}digest {policy.digest[:12]}"


def warnings(
    policy: Policy, keys: Path, guards: Collection[str] | None = None, must_exist: bool = False
) -> list[str]:
    """A line for each edge that never matches, given who has a key, for each on which the engine
    refuses every publish, given its guards where they are known, and for each category that is
    named nowhere or found too seldom.

    Raises ``KeyringError`` for a keys file that cannot be used.
    """
    agents = None
    if must_exist or keys.exists():
        from lcguard.server.access.keyring import load_keys  # here: it needs the extra `server`

        agents = {(k.tenant, k.agent) for k in load_keys(keys).keys if k.role == "agent"}
    found = (*never(policy, agents), *unserved(policy, guards), *idle(policy), *missed(policy))
    return [f"warning: {line}" for line in found]
