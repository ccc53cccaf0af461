"""What the canary worker is told: where to publish, as whom, and on which edges."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from lcguard.categories import CATEGORIES
from lcguard.guards.registry_file import live_digest
from lcguard.server.access.keyring import Identity
from lcguard.server.audit.edge_counts import CANARY_TENANT
from lcguard.server.dashboard.overview import known_edges
from lcguard.server.state import Proxy

LEVEL = 0.95


def canary_job(proxy: Proxy, model: str, url: Callable[[], str]) -> Callable[[], dict[str, Any]]:
    """Makes the job of each run: the edges of the policy that is in force then.

    Args:
        model: folder or hub repository, for the tokenizer.
        url: where the proxy itself listens.
    """
    who = Identity("", CANARY_TENANT, "canary", "canary")
    token = proxy.keyring.add_memory_key(who)

    def job() -> dict[str, Any]:
        c, policy = proxy.settings.canaries, proxy.authority.policy
        guards = proxy.settings.engine.guards
        counts = proxy.database.read(proxy.counts.update)
        edges = []
        for tenant, source, audience in sorted(known_edges(proxy, policy, counts)):
            rule = policy.for_edge(f"{tenant}/{source}", f"{tenant}/{audience}")
            if rule.channel == "text":
                continue  # there is no KV to attack
            edges.append(
                {
                    "tenant": tenant,
                    "source": source,
                    "audience": audience,
                    # of the policy's own categories there are no records to plant
                    "forbid": [c for c in rule.forbid if c in CATEGORIES],
                    "guard": rule.guard,
                    # another version is screened as soon as it is promoted
                    "guard_digest": live_digest(guards.get(rule.guard, "")),
                }
            )
        return {
            "base_url": url(),
            "token": token,
            "model": model,
            "served_model": proxy.model,
            "store": proxy.settings.store,
            "edges": edges,
            "train_records": c.train_records,
            "test_records": c.test_records,
            "attack": c.attack,
            "seed": secrets.randbelow(2**31),
            "level": LEVEL,
            "limit": c.threshold,
        }

    return job
