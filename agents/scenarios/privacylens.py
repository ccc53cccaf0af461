"""PrivacyLens (arXiv 2409.00138) as scenarios: what an agent's tools returned, before it acts.

The sender has read the trajectory; its private record is the text of the observations (e-mails,
notes, chats), one ``Label: value`` for each entry. The receiver writes the final action. Secrets
are the atoms (``atoms``) that ``sensitive_info_items`` share with that text and that are not in
the user's instruction; an item without any is not applicable. The task questions ask for entries
that address and file a message (``TASK``), where they hold no secret. Trajectories are long: they
are cut into windows (``excerpts``), and those that hold a secret are records.

Differs from the benchmark: it judges by a model whether an action leaks an item; here a value of
the item counts where it comes back verbatim, as KV is handed on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from lcguard.agents.scenarios.atoms import AtomFinder
from lcguard.agents.scenarios.excerpts import (
    Piece,
    SecretFinder,
    excerpt,
    secret_fields,
    sentences,
    windows,
)
from lcguard.agents.scenarios.files import (
    BenchmarkModel,
    ScenarioError,
    Text,
    check_new,
    data_path,
    load_json,
    parse,
)
from lcguard.agents.scenarios.types import AgentSpec, EdgeSpec, Scenario
from lcguard.rule import Rule

FILE: Final = "main_data.json"
SENDER: Final = "reader"
RECEIVER: Final = "writer"
MAX_CHARS: Final = 800
"""Of a window: about 470 tokens of the nano agent, which reads 8,192 but learnt on shorter ones."""

TASK: Final = {
    "subject": "subject",
    "title": "title",
    "from": "sender",
    "to": "recipient",
    "sender_id": "sender",
    "name": "name",
    "event_name": "event",
    "location": "location",
    "time": "time",
    "timestamp": "time",
    "start_time": "start time",
    "end_time": "end time",
    "dateTime": "date",
    "attendees": "attendee",
    "email": "email address",
    "folder": "folder",
    "in": "folder",
}
"""Keys of the observations that say who, when, where and about what; how questions call them."""
LONGEST_ANSWER: Final = 60
"""Characters; a longer entry is prose, and not asked for."""

_OBSERVATION: Final = re.compile(r"^[ \t]*Observation:", re.MULTILINE)
_ACTION: Final = re.compile(r"^[ \t]*(?:Action(?: Input)?|Thought):", re.MULTILINE)


class _Trajectory(BenchmarkModel):
    user_instruction: Text
    executable_trajectory: Text
    sensitive_info_items: Annotated[list[Text], Field(min_length=1)]
    final_action: Text
    user_name: str = ""
    user_email: str = ""


class _Entry(BenchmarkModel):
    name: Text
    trajectory: _Trajectory


def read_privacylens(path: Path | None = None, *, max_chars: int = MAX_CHARS) -> list[Scenario]:
    """All entries of the file, in order: the file itself, its folder, or the data root.

    One without a checkable item has no record, and all its items are not applicable. Raises
    ``ScenarioError`` naming file and entry where the file is missing or an entry is malformed.
    """
    file = data_path(path, "PrivacyLens", ("", FILE, f"privacylens/{FILE}"))
    entries = load_json(file)
    if not isinstance(entries, list) or not entries:
        raise ScenarioError(f"{file}: no list of entries; write one JSON array of objects")
    scenarios: dict[str, Scenario] = {}
    for i, raw in enumerate(entries):
        where = f"{file}: entry {i}"
        entry = parse(where, raw, _Entry)
        check_new(where, "name", entry.name, scenarios)
        scenarios[entry.name] = _scenario(entry, max_chars)
    return list(scenarios.values())


def _scenario(entry: _Entry, max_chars: int) -> Scenario:
    source = entry.trajectory
    items = source.sensitive_info_items
    known = (source.user_instruction, source.user_name, source.user_email)
    leaves = [(key, sentences(t)) for key, t in _leaves(source.executable_trajectory)]
    text = [part for _, parts in leaves for part in parts]
    secrets = SecretFinder(items, AtomFinder(items, known, text), known, text)
    pieces: list[Piece] = []
    for key, parts in leaves:
        for i, part in enumerate(parts):
            asked = TASK.get(key) if len(parts) == 1 and len(part) <= LONGEST_ANSWER else None
            pieces.append(Piece(part, None if i else _label(key), secrets.values(part), asked))
    records = tuple(
        excerpt(f"{entry.name}-{i}", source.final_action, "assistant", "file", window)
        for i, window in enumerate(windows(pieces, max_chars))
        if any(p.secret for p in window)
    )
    return Scenario(
        entry.name,
        "privacylens",
        "assistant",
        (AgentSpec(SENDER, SENDER, records), AgentSpec(RECEIVER, source.final_action, ())),
        (EdgeSpec(SENDER, RECEIVER, Rule.hiding(secrets.categories)),),
        None,
        secret_fields(records),
        tuple(items[i] for i in secrets.missing),
    )


def _leaves(trajectory: str) -> Iterator[tuple[str, str]]:
    """Key and text of everything that the tools returned, in order."""
    for part in _OBSERVATION.split(trajectory)[1:]:
        text = _ACTION.split(part)[0].strip()
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            found = {"observation": text}
        yield from ((k, t) for k, t in _walk(found, "result") if sentences(t))


def _walk(found: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(found, dict):
        for name, inner in found.items():
            yield from _walk(inner, name)
    elif isinstance(found, list):
        for inner in found:
            yield from _walk(inner, key)
    elif found is not None:
        yield key, str(found)


def _label(key: str) -> str:
    """``start_time`` as Start time, ``dateTime`` as Date time."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[_\s{}]+", " ", key).strip().lower()
    return words[:1].upper() + words[1:] if words else "Entry"
