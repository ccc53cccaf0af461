"""What the registries of the engine's guards hold: versions, which is live, what happened."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from lcguard.guards.registry_file import RegistryState, is_registry, read_registry
from lcguard.server.dashboard.view import ChangeRow, VersionRow

LAST = 12


def guard_versions(
    folders: Mapping[str, str],
) -> tuple[tuple[VersionRow, ...], tuple[ChangeRow, ...], tuple[tuple[str, str], ...]]:
    """Versions, the last changes, and guard to error, of those ``folders`` (guard name to folder)
    that are registries."""
    versions: list[VersionRow] = []
    changes: list[ChangeRow] = []
    errors: list[tuple[str, str]] = []
    for guard, folder in sorted(folders.items()):
        if not is_registry(Path(folder)):
            continue
        try:
            state = read_registry(Path(folder))
        except ValueError as error:
            errors.append((guard, str(error)))
            continue
        versions += _versions(guard, state)
        changes += [
            ChangeRow(datetime.fromisoformat(e.at).timestamp(), guard, e.what, e.version, e.why)
            for e in state.events
        ]
    changes.sort(key=lambda change: change.at_s)  # stable: of one second in their order
    return tuple(versions), tuple(reversed(changes[-LAST:])), tuple(errors)


def _versions(guard: str, state: RegistryState) -> list[VersionRow]:
    """The newest first."""
    rows = []
    for v in reversed(state.versions):
        parent = state.of_digest(v.parent) if v.parent else None
        rows.append(
            VersionRow(
                guard,
                v.name,
                state.standing(v),
                v.digest[:12],
                parent.name if parent else v.parent[:12],
                v.withdrawn or v.judgement.reason,
            )
        )
    return rows
