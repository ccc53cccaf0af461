"""AgentLeak (arXiv 2602.11510) as scenarios: its private records, rendered to prose.

A record is written by the generator's own code, seeded by the scenario's id. What its policy
forbids by *field* becomes two things here: the fields are the secrets that attacks are scored on
(``Scenario.secret_fields``), and their categories are what the edges forbid. A category also
covers fields that the policy does not list; those are guarded and not scored.

Differs from the benchmark: its agents run tools and are judged on seven channels; here each agent
hands its records on as KV, in a chain, and values count only where they come back verbatim.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

from pydantic import BeforeValidator, Field, StringConstraints

from lcguard.agents.scenarios.files import (
    REQUESTER,
    BenchmarkModel,
    check_agents,
    check_new,
    data_path,
    read_lines,
)
from lcguard.agents.scenarios.generator import GeneratorConfig, write_record
from lcguard.agents.scenarios.schema import BY_NAME, FIELD_CATEGORY, FieldType, RecordType
from lcguard.agents.scenarios.types import AgentSpec, EdgeSpec, Record, Scenario
from lcguard.agents.scenarios.values import anything
from lcguard.rule import Rule

FILE: Final = "scenarios.jsonl"

ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "ssn": ("client_ssn",),
    "name": ("patient_name", "customer_name", "client_name"),
    "client_name": ("name",),
    "candidate_name": ("name",),
    "position": ("position_applied",),
}
"""A field as a policy calls it to the same field as a record calls it, beside the exact name."""


def _as_text(value: object) -> str:
    """A field's value as prose: lists joined, nothing as ``None``, on one line."""
    if value is None or value in ("", []):
        return "None"
    items = value if isinstance(value, list) else [value]
    if any(isinstance(v, bool) or not isinstance(v, str | int | float) for v in items):
        raise ValueError("use a string, a number or a list of those")
    text = ", ".join(str(v) for v in items)
    return re.sub(r"\s*[\r\n]+\s*", " ", text).strip() or "None"


# Names go through str.format as labels, where a brace would be a placeholder.
_Name = Annotated[str, StringConstraints(pattern=r"^[^{}\s]([^{}\r\n]*[^{}\s])?$")]
_Value = Annotated[str, BeforeValidator(_as_text)]


class _Record(BenchmarkModel):
    record_type: _Name
    fields: Annotated[dict[_Name, _Value], Field(min_length=1)]


class _Vault(BenchmarkModel):
    records: Annotated[list[_Record], Field(min_length=1)]


class _Agent(BenchmarkModel):
    agent_id: _Name
    role: str = "agent"


class _AllowedSet(BenchmarkModel):
    # Both required: a list that is left out would protect nothing.
    fields: list[str]
    forbidden_fields: list[str]


class _Line(BenchmarkModel):
    scenario_id: _Name
    vertical: _Name
    agents: Annotated[list[_Agent], Field(min_length=1)]
    private_vault: _Vault
    allowed_set: _AllowedSet


def read_agentleak(
    path: Path | None = None,
    *,
    aliases: Mapping[str, tuple[str, ...]] = ALIASES,
    categories: Mapping[str, str] = FIELD_CATEGORY,
) -> list[Scenario]:
    """All scenarios of the file, in order.

    ``categories`` names the category of a field; a forbidden field that it lacks is
    ``confidential``. Raises ``ScenarioError`` with file and line where the file is missing or a
    line is malformed.
    """
    scenarios: dict[str, Scenario] = {}
    for where, line in read_lines(_file(path), _Line):
        names = [a.agent_id for a in line.agents]
        check_agents(where, names, "agent_id")
        check_new(where, "scenario_id", line.scenario_id, scenarios)
        scenarios[line.scenario_id] = _scenario(line, aliases, categories)
    return list(scenarios.values())


def _file(path: Path | None) -> Path:
    """The file itself, in the given folder, or in its folder ``agentleak``."""
    return data_path(path, "AgentLeak", ("", FILE, f"agentleak/{FILE}"), Path.is_file)


def _scenario(
    line: _Line, aliases: Mapping[str, tuple[str, ...]], categories: Mapping[str, str]
) -> Scenario:
    present = {name for r in line.private_vault.records for name in r.fields}

    def resolve(wanted: str) -> list[str]:
        return [f for f in (wanted, *aliases.get(wanted, ())) if f in present]

    listed = line.allowed_set
    secret = {
        f: categories.get(f, "confidential")
        for wanted in listed.forbidden_fields
        for f in resolve(wanted)
    }
    task = dict.fromkeys(f for wanted in listed.fields for f in resolve(wanted))
    # Never asked about as absent: "not stated" is what a receiver that learnt nothing says too,
    # and would count as a task done.
    named = {*secret, *task}
    hands: list[list[Record]] = [[] for _ in line.agents]
    for i, record in enumerate(line.private_vault.records):
        name = f"{line.scenario_id}-{i}"
        hands[i % len(hands)].append(_record(name, line.vertical, record, secret, named))
    rule = Rule.hiding(set(secret.values()))
    names = [a.agent_id for a in line.agents]
    return Scenario(
        line.scenario_id,
        "agentleak",
        line.vertical,
        tuple(
            AgentSpec(a.agent_id, a.role, tuple(hand))
            for a, hand in zip(line.agents, hands, strict=True)
        ),
        tuple(
            EdgeSpec(source, audience, rule)
            for source, audience in zip(names, [*names[1:], REQUESTER], strict=True)
        ),
        tuple(f for f in task if f not in secret),
        tuple(secret),
        tuple(dict.fromkeys(f for f in listed.forbidden_fields if not resolve(f))),
    )


def _record(
    record_id: str, vertical: str, source: _Record, secret: Mapping[str, str], named: set[str]
) -> Record:
    kind = BY_NAME.get(source.record_type)
    if kind is None:
        kind = RecordType(source.record_type, vertical, source.record_type.replace("_", " "), ())
    known = {f.name: f for f in kind.fields}
    entries = []
    for name, value in source.fields.items():
        field = known.get(name) or FieldType(name, None, anything, (name.replace("_", " "),))
        entries.append((replace(field, category=secret.get(name, field.category)), value))
    rng = random.Random(f"agentleak/{record_id}")
    rng.shuffle(entries)  # the file's fixed order would tell an attack which value is which
    missing = [f for f in kind.fields if f.name not in source.fields and f.name not in named]
    absent = rng.sample(missing, min(1, len(missing)))
    return write_record(rng, record_id, kind, entries, filler=GeneratorConfig.filler, absent=absent)
