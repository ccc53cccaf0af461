"""A run's folder: what it was started with, what it has done, and whether it may go on.

``config.yaml`` is the resolved configuration, ``manifest.json`` where the figures come from (both
written before the first unit), ``attempts.jsonl`` the journal, ``timing.json`` what was measured
once and cannot be read off the journal, ``report.*`` the end. A folder holds one run: another
configuration, or the same on other records, is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcguard.atomic_file import PUBLIC, replace_file
from lcguard.config import dump_config
from lcguard.evaluation.hashing import digest
from lcguard.evaluation.outcomes import Attempt, Journal
from lcguard.evaluation.presets import AnyPlan, load_evaluation
from lcguard.records import TokenRecord

Timing = dict[str, dict[str, float]]


class RunJournal(Journal):
    """A run's journal, which calls ``after`` once a unit is on disk.

    Raises ``ValueError`` where its units are of another format.
    """

    def __init__(self, path: Path, after: Callable[[], None] = lambda: None) -> None:
        super().__init__(path)
        self._after = after
        for unit in self.units():
            detail = unit.get("detail")
            found = detail.get("format") if isinstance(detail, dict) else None
            if found != self.FORMAT:
                self.close()
                raise ValueError(
                    f"{path.parent}: its journal is of another version of lcguard, whose units "
                    "cannot be told from this one's; give another --out"
                )

    def write(self, unit: Mapping[str, Any], attempts: Sequence[Attempt]) -> None:
        super().write(unit, attempts)
        self._after()


class FinishedJournal(RunJournal):
    """A journal that is only read: units that it lacks are noted in ``missing``, not made."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.missing: list[dict[str, Any]] = []

    def done(self, unit: Mapping[str, Any]) -> list[Attempt]:
        found = super().done(unit)
        if found is None and dict(unit) not in self.missing:
            self.missing.append(dict(unit))
        return found or []


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Names, reads and checks the files of one run."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def journal_file(self) -> Path:
        return self.path / "attempts.jsonl"

    def config(self) -> AnyPlan:
        """What the run was started with. Raises ``ValueError`` where that is not known."""
        if not self.config_file.exists():
            raise ValueError(
                f"{self.path}: no config.yaml, so there is no run to go on with; start one with "
                f"`lcguard eval run CONFIG --out {self.path}`"
            )
        return load_evaluation(self.config_file)

    def check(self, config: Any) -> None:
        """Raises ``ValueError`` naming the first key in which the folder's run differs."""
        if not self.config_file.exists():
            return
        key = first_difference(plain(self.config()), plain(config))
        if key is not None:
            name, there, here = key
            raise ValueError(
                f"{self.path} holds a run with another configuration: {name} is {_short(there)} "
                f"there and {_short(here)} here; go on with `lcguard eval resume {self.path}`, or "
                "give another --out"
            )

    def start(self, config: Any, manifest: dict[str, Any]) -> dict[str, Any]:
        """Writes configuration and manifest, unless the run has them; returns its manifest.

        Raises ``ValueError`` where the run was started on other records.
        """
        self.check(config)
        self.path.mkdir(parents=True, exist_ok=True)
        known = self.manifest()
        if known is None:
            write_text(self.config_file, dump_config(config))
            self._write_manifest(manifest)
            return manifest
        if known["hashes"]["data"] != manifest["hashes"]["data"]:
            raise ValueError(
                f"{self.path}: its run was started on other records (the data or the code that "
                "makes them changed since); give another --out"
            )
        return known

    def manifest(self) -> dict[str, Any] | None:
        """As written at the start; None for a folder without one."""
        return _read(self.path / "manifest.json")

    def resumed(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Adds a later start to the manifest: when, by which command, with which code."""
        known = self.manifest() or manifest
        starts = [known, *known.get("resumed", [])]
        if any(all(s[k] == manifest[k] for k in ("created", "command")) for s in starts):
            return known
        later = {k: manifest[k] for k in ("created", "command", "git", "hashes")}
        known = {**known, "resumed": [*starts[1:], later]}
        self._write_manifest(known)
        return known

    def timing(self) -> Timing:
        return _read(self.path / "timing.json") or {}

    def save_timing(self, timing: Timing) -> None:
        write_text(self.path / "timing.json", json.dumps(timing, indent=1) + "\n")

    def report(self) -> dict[str, Any]:
        """Raises ``ValueError`` where there is none."""
        found = _read(self.path / "report.json")
        if found is None:
            raise ValueError(
                f"{self.path}: no report.json; end the run with `lcguard eval resume {self.path}`"
            )
        return found

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        write_text(self.path / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def plain(config: Any) -> dict[str, Any]:
    """The configuration as JSON holds it: lists, not tuples."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return found


def first_difference(a: Any, b: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Dotted name of the first place where two plain structures differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            inner = f"{name}.{key}" if name else key
            found = first_difference(a.get(key), b.get(key), inner)
            if found is not None:
                return found
        return None
    if isinstance(a, list) and isinstance(b, list) and a and b:
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            found = first_difference(x, y, f"{name}[{i}]")
            if found is not None:
                return found
        return None if len(a) == len(b) else (f"{name} (its length)", len(a), len(b))
    return None if a == b else (name, a, b)


def data_digest(train: Sequence[TokenRecord], test: Sequence[TokenRecord]) -> str:
    """Sha256 of what attackers are fitted on and what is measured: tokens, secrets, questions."""
    return digest([[_content(r) for r in records] for records in (train, test)])


def _content(r: TokenRecord) -> list[Any]:
    spans = [[s.start, s.end, s.field, s.category, s.band, s.secret] for s in r.spans]
    questions = [[q.prompt, q.answer, q.field, q.category, q.kind, q.task] for q in r.questions]
    return [r.record_id, r.scenario_id, r.edge, r.ids, spans, questions, r.forbid, r.derive]


def write_text(path: Path, text: str) -> None:
    """In one step: a reader, or a run that goes on, never sees half a file."""
    replace_file(path, text.encode("utf-8", "backslashreplace"), mode=PUBLIC)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object; remove it")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
