"""``lcguard keys``: makes, lists and takes back API keys.

The file is replaced as a whole, by a rename, under a lock: a running server reads the old one or
the new one, and two commands at once lose no key.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from lcguard.atomic_file import replace_file
from lcguard.config import dump_config
from lcguard.server.access.keyring import (
    KeyEntry,
    KeyFile,
    KeyringError,
    Role,
    key_text,
    load_keys,
    new_id,
    new_secret,
    parse_keys,
    secret_digest,
)
from lcguard.server.limits.key_limits import Limits

_HEAD = "# API keys, without their secrets. `lcguard keys` rewrites this file: comments get lost.\n"


def new_key(
    path: str | Path,
    agent: str,
    tenant: str = "default",
    role: Role = "agent",
    *,
    expires_at: datetime | None = None,
    models: Sequence[str] | None = None,
    limits: Limits | None = None,
) -> str:
    """Adds a key, making the file if need be; returns its text, which nothing else knows.

    ``expires_at`` has a time zone. Raises ``KeyringError``, and changes nothing then.
    """
    if expires_at is not None:
        if expires_at.tzinfo is None:
            raise KeyringError(f"expires_at {expires_at.isoformat()} has no time zone; add one")
        if expires_at <= datetime.now(UTC):
            raise KeyringError(f"expires_at {expires_at.isoformat()} is over; give a later time")
    with _locked(Path(path)) as real:
        keys = [_plain(entry) for entry in _existing(real).keys]
        secret = new_secret()
        key_id = next(i for i in iter(new_id, "") if i not in {key["id"] for key in keys})
        entry: dict[str, Any] = {
            "id": key_id,
            "tenant": tenant,
            "agent": agent,
            "role": role,
            "created_at": _text(datetime.now(UTC)),
            "expires_at": None if expires_at is None else _text(expires_at),
            "models": None if models is None else list(models),
            "limits": _given(vars(limits or Limits())) or None,
            "sha256": secret_digest(secret).hex(),
        }
        _write(real, [*keys, _given(entry)])
    return key_text(key_id, secret)


def revoke(path: str | Path, key_id: str) -> KeyEntry:
    """Takes the key out of the file; returns what it was. Raises ``KeyringError``."""
    with _locked(Path(path)) as real:
        entries = load_keys(real).keys
        found = next((e for e in entries if e.id == key_id), None)
        if found is None:
            raise KeyringError(
                f"{path}: no key with id {key_id[:40]!r}; `lcguard keys list` shows which there are"
            )
        _write(real, [_plain(e) for e in entries if e is not found])
    return found


def listing(path: str | Path) -> tuple[KeyEntry, ...]:
    """All keys, oldest first. Raises ``KeyringError``."""
    return tuple(sorted(load_keys(path).keys, key=lambda e: (e.created_at, e.id)))


def key_table(entries: Sequence[KeyEntry], now: datetime | None = None) -> Table:
    """For a terminal."""
    now = now or datetime.now(UTC)
    table = Table()
    for name in ("id", "tenant", "agent", "role", "created", "expires", "models", "limits"):
        table.add_column(name, overflow="fold")
    for e in entries:
        ends = "never" if e.expires_at is None else _text(e.expires_at)
        if e.expires_at is not None and e.expires_at <= now:
            ends += " (expired)"
        limits = ", ".join(f"{k}={v}" for k, v in _given(vars(e.limits)).items())
        table.add_row(
            e.id,
            e.tenant,
            e.agent,
            e.role,
            _text(e.created_at),
            ends,
            ", ".join(e.models or ("all",)),
            limits or "none",
        )
    return table


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """The file behind ``path``, ours alone. The lock is a file beside it: the renames below put
    another one in the place of the file itself."""
    real = path.resolve()
    try:
        real.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(real.with_name(f".{real.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise KeyringError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield real
    finally:
        os.close(lock)


def _existing(path: Path) -> KeyFile:
    return load_keys(path) if path.exists() else KeyFile(version=1, keys=())


def _write(path: Path, keys: list[dict[str, Any]]) -> None:
    """Puts the whole file in place, for its owner alone. Raises ``KeyringError``."""
    data = {"version": 1, "keys": keys}
    parse_keys(data, str(path))  # nothing malformed gets in
    try:
        # made by root for a server that is not: still the server's to read
        replace_file(path, (_HEAD + dump_config(data)).encode(), keep_owner=True)
    except OSError as error:
        raise KeyringError(f"{path}: cannot be written: {error.strerror}") from None


def _plain(entry: KeyEntry) -> dict[str, Any]:
    """As in the file, without what is not set."""
    data = _given(entry.model_dump(mode="json"))
    data["limits"] = _given(data["limits"])
    return data if data["limits"] else {k: v for k, v in data.items() if k != "limits"}


def _given(data: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in data.items() if v is not None}


def _text(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
