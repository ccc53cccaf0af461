"""First step of a round: what leaked, under which guard, and the records to learn it from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.scenarios.jsonl_writer import jsonl_of
from lcguard.atomic_file import replace_file
from lcguard.categories import CATEGORIES, in_order
from lcguard.commands.canary_records import holding
from lcguard.commands.canary_screen import ATTACKS, Screened
from lcguard.commands.loop_config import LoopConfig
from lcguard.commands.loop_files import write_step
from lcguard.commands.loop_leakage import screened_edges
from lcguard.commands.loop_screen import screening
from lcguard.commands.train import hard_hops
from lcguard.guards.registry import Registry
from lcguard.handoff.policy import load_policy
from lcguard.server.leakage.edge_state import EdgeLeakage

LEAK, HARD = "leak.json", "hard.jsonl"


class Leaked(BaseModel):
    """A round's reason: what ``leak.json`` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    guard_digest: str
    """Of the live guard, which the candidate is trained from."""
    edges: tuple[str, ...]
    """Those that canaries closed under it."""
    reason: str
    forbid: tuple[str, ...]
    """What these edges hide, together."""
    categories: tuple[str, ...]
    """Those of which the canaries' attack reads more than the limit."""
    screened: dict[str, Screened]
    """What it reads of each, on the same guard."""
    attack: str
    attack_steps: int
    """That it was fitted for: the measured attack's budget."""
    own_records: int
    hard_records: int
    """Own ones among them."""
    hard_sha256: str

    @property
    def needed(self) -> bool:
        """Whether there is anything to learn."""
        return bool(self.edges) or self.own_records > 0


def collect(
    config: LoopConfig,
    registry: Registry,
    out: Path,
    *,
    database: str | Path | None = None,
    policy: Path | None = None,
    data: Path | None = None,
    backend: HFBackend | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Leaked:
    """Reads which edges are closed under the live guard, finds out of which categories it leaks,
    and writes ``out/leak.json`` and ``out/hard.jsonl``; what was written before is kept.

    Args:
        database: the proxy's, where canaries leave what they found.
        policy: its policy, for what each edge hides; without one everything is.
        data: new labelled records of your own, as JSONL.

    Raises ``ValueError`` for files that cannot be read.
    """
    if (out / LEAK).exists():
        return read_leak(out)
    live = registry.state.live_version
    edges = closed_under(database, live.digest) if database is not None else []
    forbid = hidden_on(edges, policy)
    own = hard_hops(str(data)) if data is not None else []
    lines = jsonl_of(own)
    screened: dict[str, Screened] = {}
    leaked: tuple[str, ...] = ()
    if edges:
        backend = backend or load_backend(config.model)
        found = screening(
            backend, registry.load(live), forbid, config.screen, config.seed, config.limit
        )
        screened = found.by_category
        leaks = [c for c, s in screened.items() if s.asr_low > max(config.limit, s.floor)]
        # where they leak together and none by itself: those that are above
        leaks = leaks or [c for c, s in screened.items() if s.asr > config.limit]
        leaked = in_order(leaks or forbid)
        for name, s in screened.items():
            say(f"{name}: {s.recovered} of {s.n_secrets} read, at least {s.asr_low:.0%}")
        if config.hard_records:
            made = holding(backend.encoder, leaked, config.hard_records, "coined", config.seed + 7)
            lines += jsonl_of([hop for hop, _ in made])
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / HARD, lines.encode())  # your records: for their owner alone
    attack = config.screen.attack
    leak = Leaked(
        version=live.name,
        guard_digest=live.digest,
        edges=tuple("/".join(e.name) for e in edges),
        reason="; ".join(dict.fromkeys(e.reason for e in edges)),
        forbid=forbid,
        categories=leaked,
        screened=screened,
        attack=attack,
        attack_steps=int(ATTACKS[attack].get("fit", {}).get("steps", 0)),
        own_records=len(own),
        hard_records=lines.count("\n"),
        hard_sha256=hashlib.sha256(lines.encode()).hexdigest(),
    )
    if edges:  # nobody may roll back to it
        registry.withdraw(live.name, f"leaked on {', '.join(leak.edges)}: {leak.reason}")
    write_step(out / LEAK, leak)
    return leak


def read_leak(out: Path) -> Leaked:
    """What ``collect`` found. Raises ``ValueError`` where it was not run, or its records changed
    since."""
    try:
        leak = Leaked.model_validate(json.loads((out / LEAK).read_text(encoding="utf-8")))
        hard = (out / HARD).read_bytes()
    except OSError as error:
        raise ValueError(
            f"{out}: {LEAK} or {HARD} cannot be read ({error.strerror}): run `lcguard loop collect`"
        ) from None
    if hashlib.sha256(hard).hexdigest() != leak.hard_sha256:
        raise ValueError(f"{out / HARD} changed since it was collected: put it back")
    return leak


def closed_under(database: str | Path, digest: str) -> list[EdgeLeakage]:
    """Edges that canaries closed under the guard of ``digest`` and that are closed still.

    Raises ``ValueError`` as ``screened_edges``.
    """
    edges = screened_edges(database).values()
    return [e for e in edges if e.state == "closed" and e.closed_guard_digest == digest]


def hidden_on(edges: Sequence[EdgeLeakage], policy: Path | None) -> tuple[str, ...]:
    """Categories that the edges hide, together; all without a policy. Of a policy's own categories
    no guard learns anything."""
    if policy is None or not edges:
        return CATEGORIES
    rules = load_policy(policy)
    hidden: set[str] = set()
    for e in edges:
        hidden |= set(rules.for_edge(f"{e.tenant}/{e.source}", f"{e.tenant}/{e.audience}").forbid)
    return in_order(hidden & set(CATEGORIES))
