"""A round from end to end, and the log that says what became of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lcguard.agents.backends.hf import HFBackend
from lcguard.commands.loop_collect import collect
from lcguard.commands.loop_config import LoopConfig
from lcguard.commands.loop_judge import judge, promote
from lcguard.commands.loop_train import train
from lcguard.guards.frozen import read_card
from lcguard.guards.registry import Judgement, Registry, Version
from lcguard.guards.shipped import guard_folder
from lcguard.guards.standing import unproven
from lcguard.tracking import Tracker

LOG = "log.jsonl"
Say = Callable[[str], None]


class LoopLog:
    """JSON lines, one a step, each on the disk before the next begins."""

    def __init__(self, path: Path, say: Say = lambda text: None) -> None:
        self.path, self._say = path, say

    def write(self, step: str, outcome: str, **more: Any) -> None:
        """``outcome`` is for people; ``more`` for programs."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = {"at": at, "step": step, "outcome": outcome, **more}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._say(f"{step}: {outcome}")

    def rows(self) -> list[dict[str, Any]]:
        """Everything so far."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def begin(
    registry: Registry, guard: str, accept: str = "", marks: frozenset[str] = frozenset()
) -> Version:
    """The registry's first version: the guard that is served today, made live.

    ``accept``: why it is taken though its card shows nothing for it. Raises ``ValueError`` for such
    a guard without it, and for a registry that has a live version.
    """
    if live := registry.state.live:
        raise ValueError(f"{registry.folder} has {live} live: promote another, or start elsewhere")
    folder = Path(guard_folder(guard))
    against = unproven(read_card(folder))
    if against and not accept:
        raise ValueError(
            f"guard {guard!r}: {against}; say why it is served all the same, or measure it "
            "(lcguard eval run, then lcguard eval record)"
        )
    why = f"{accept} ({against})" if against else "its card speaks for it"
    version = registry.add(folder, Judgement(accepted=True, reason=why), marks=marks)
    return registry.promote(version.name, "the first")


def run_round(
    config: LoopConfig,
    registry: Registry,
    out: Path,
    log: LoopLog,
    command: str = "lcguard loop run",
    *,
    database: str | Path | None = None,
    policy: Path | None = None,
    data: Path | None = None,
    backend: HFBackend | None = None,
    say: Say = lambda text: None,
    tracker: Tracker | None = None,
) -> str:
    """Collect, train, judge, and promote or keep; a round that was killed goes on where it stopped.
    Returns ``nothing to do``, ``promoted`` or ``kept``."""
    leak = collect(
        config, registry, out, database=database, policy=policy, data=data, backend=backend, say=say
    )
    if not leak.needed:
        log.write("collect", "no edge is closed under the live guard, and there are no new records")
        return "nothing to do"
    log.write(
        "collect",
        f"{leak.version} leaks {', '.join(leak.categories) or 'nothing'}; "
        f"{leak.hard_records} hard records, {leak.own_records} of them new",
        **leak.model_dump(mode="json"),
    )
    trained = train(config, registry, out, command, say=say, tracker=tracker)
    assert trained is not None
    log.write(
        "train",
        f"{trained.steps} steps from {leak.version} in {trained.seconds:.0f} s, its attacker "
        f"{trained.attacker_steps} (measured: {trained.measured_steps})",
        **trained.model_dump(),
    )
    return judge_and_promote(config, registry, out, log, command, say=say, tracker=tracker)


def judge_and_promote(
    config: LoopConfig,
    registry: Registry,
    out: Path,
    log: LoopLog,
    command: str,
    *,
    guard: Path | None = None,
    say: Say = lambda text: None,
    tracker: Tracker | None = None,
) -> str:
    """The second half of a round, also for a guard that came from elsewhere."""
    judged = judge(config, registry, out, command, guard=guard, say=say, tracker=tracker)
    judgement = judged.judgement
    word = "accepted" if judgement.accepted else "refused"
    log.write("judge", f"{word}: {judgement.reason}", **judged.model_dump(mode="json"))
    before = registry.state.live
    name = promote(registry, out)
    if judgement.accepted:
        log.write("promote", f"{name} is live, {before or 'nothing'} was", version=name)
        return "promoted"
    log.write("keep", f"{before or 'nothing'} stays live", version=before, refused=name)
    return "kept"
