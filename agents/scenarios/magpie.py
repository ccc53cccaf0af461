"""MAGPIE (arXiv 2510.15186) as scenarios: negotiators with preferences to share and to hide.

Each agent's record is its role and preferences, as they stand in the file, one ``Name: text`` for
each. Secrets are the atoms (``atoms``; no phrases, the text is the item) of its private
preferences; what stands in the scenario, task, deliverable, success criteria, in an agent's name
or in the agent's own shareable preferences is none, as the others may know it. Atoms of the
shareable preferences are task values. Every agent hands on to the next and the last to the
requester; an edge forbids the categories of what its own source hides. Records are cut into
windows (``excerpts``).

Differs from the benchmark: it negotiates over many rounds and judges leaks by a model; here each
agent hands its preferences on as KV, in a chain, and values count only where they come back
verbatim. The points that a preference is worth are written, but are neither secret nor asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AliasChoices, BeforeValidator, Field, StringConstraints

from lcguard.agents.scenarios.atoms import AtomFinder
from lcguard.agents.scenarios.excerpts import (
    Piece,
    SecretFinder,
    Value,
    excerpt,
    secret_fields,
    sentences,
    windows,
)
from lcguard.agents.scenarios.files import (
    REQUESTER,
    BenchmarkModel,
    ScenarioError,
    check_agents,
    data_path,
    load_json,
    parse,
)
from lcguard.agents.scenarios.types import AgentSpec, EdgeSpec, Record, Scenario
from lcguard.rule import Rule

FOLDER: Final = "scenarios"
MAX_CHARS: Final = 800
"""Of a window: about 470 tokens of the nano agent."""

_POINTS: Final = re.compile(r"\b(?:penalt|utilit)|[(\s][+-]\d(?:\.\d)?\b", re.IGNORECASE)
"""A sentence on what a preference is worth."""


def _preferences(value: object) -> object:
    """Name to text: an entry is a text or an object with a description or a value."""
    if not isinstance(value, Mapping):
        return value
    found = {}
    for name, entry in value.items():
        text = entry
        if isinstance(entry, Mapping):
            text = entry.get("description", entry.get("value"))
        if not isinstance(text, str):
            raise ValueError(f"{name}: use a text, or an object with a description or a value")
        found[name] = text
    return found


_Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
_Preferences = Annotated[dict[_Text, _Text], BeforeValidator(_preferences)]


class _Agent(BenchmarkModel):
    name: _Text
    role: str = "agent"
    shareable_preferences: _Preferences
    private_preferences: _Preferences = Field(
        validation_alias=AliasChoices("private_preferences", "private_information")
    )


class _File(BenchmarkModel):
    task: _Text
    deliverable: _Text
    agents: Annotated[list[_Agent], Field(min_length=1)]
    scenario: str = ""
    success_criteria: Any = ""


def read_magpie(path: Path | None = None, *, max_chars: int = MAX_CHARS) -> list[Scenario]:
    """One scenario a file, by name: a file, a folder of files, or the data root.

    Raises ``ScenarioError`` naming the file where one is missing or malformed.
    """
    place = data_path(path, "MAGPIE", ("", FOLDER, f"magpie/{FOLDER}"))
    files = [place] if place.is_file() else sorted(place.glob("*.json"))
    if not files:
        raise ScenarioError(f"{place}: no *.json in it; set LCGUARD_DATA or pass --data")
    scenarios = []
    for file in files:
        content = parse(str(file), load_json(file), _File)
        names = [a.name for a in content.agents]
        check_agents(str(file), names, "name")
        scenarios.append(_scenario(file.stem, content, max_chars))
    return scenarios


def _scenario(name: str, content: _File, max_chars: int) -> Scenario:
    names = [a.name for a in content.agents]
    public = (
        content.scenario,
        content.task,
        content.deliverable,
        str(content.success_criteria),
        *names,
    )
    # one per domain, in numbered files: auction_3
    vertical = name.rstrip("0123456789").strip("_") or name
    agents, edges, missing = [], [], []
    for i, (agent, audience) in enumerate(
        zip(content.agents, [*names[1:], REQUESTER], strict=True)
    ):
        records, without = _hand(f"{name}-{i}", vertical, agent, public, max_chars)
        agents.append(AgentSpec(agent.name, agent.role, records))
        hidden = {s.category for r in records for s in r.spans}
        edges.append(EdgeSpec(agent.name, audience, Rule.hiding(hidden)))
        missing += [f"{agent.name}: {w}" for w in without]
    return Scenario(
        name,
        "magpie",
        vertical,
        tuple(agents),
        tuple(edges),
        None,
        secret_fields([r for a in agents for r in a.records]),
        tuple(missing),
    )


def _hand(
    name: str, vertical: str, agent: _Agent, public: Sequence[str], max_chars: int
) -> tuple[tuple[Record, ...], list[str]]:
    """An agent's windows, and its private preferences without a checkable value."""
    shared, private = agent.shareable_preferences, agent.private_preferences
    context = [*shared.values(), *private.values()]
    known = [*public, *shared, *shared.values()]
    facts = [_facts(text) for text in private.values()]
    secrets = SecretFinder(
        facts,
        AtomFinder(facts, known, context, phrases=False),
        known,
        [part for text in private.values() for part in sentences(text)],
    )
    open_ = AtomFinder(list(shared.values()), (), context, phrases=False)

    def tasks(part: str) -> tuple[Value, ...]:
        found = [] if _POINTS.search(part) else open_.find(part)
        return tuple(Value(a.start, a.end, a.kind, None) for a in found)

    pieces = [Piece(agent.role, "Role")]
    for preferences, values in ((shared, tasks), (private, secrets.values)):
        for label, text in preferences.items():
            pieces += [
                Piece(part, None if i else label.replace("_", " "), values(part))
                for i, part in enumerate(sentences(text))
            ]
    records = tuple(
        excerpt(f"{name}-{i}", "preferences", vertical, "agent", window)
        for i, window in enumerate(windows(pieces, max_chars))
        if any(p.values for p in window)
    )
    labels = list(private)
    return records, [labels[i] for i in secrets.missing]


def _facts(text: str) -> str:
    """A text without its sentences on points."""
    return "\n".join(part for part in sentences(text) if not _POINTS.search(part))
