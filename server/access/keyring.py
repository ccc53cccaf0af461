"""API keys: who asks, told by ``Authorization: Bearer lcg_ID_SECRET``.

    version: 1
    keys:
      - id: 4k2v9x7m1qpd
        tenant: acme
        agent: billing
        role: agent
        created_at: 2026-01-31T12:00:00Z
        expires_at: 2026-07-31T12:00:00Z    # optional, as are models and limits
        limits: {requests_per_min: 600, tokens_per_min: 200000, concurrency: 16}
        sha256: 9b74c9897bac770ffc029102a200c5de...

The file holds SHA-256 of each secret and no secret. A slow hash guards secrets that can be guessed;
256 random bits cannot, however fast the hash, and a slow one would be paid on every request. An
agent may have several keys at once, so that a new one can be handed out before the old one goes.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from lcguard.config import ConfigError, read_mapping, validated
from lcguard.handoff.names import KeyName
from lcguard.reloading import ReloadingFile
from lcguard.server.limits.key_limits import Limits

Role = Literal["agent", "admin", "auditor"]
_ID_LENGTH, _SECRET_BYTES = 12, 32
_ID_CHARACTERS = string.ascii_lowercase + string.digits
_BEARER = re.compile(r"(?i:bearer) +lcg_([a-z0-9]{12})_([A-Za-z0-9_-]{43})")
_SECRETIVE = re.compile(r"[A-Za-z0-9_-]{32,}")
_NOBODY = bytes(32)
"""What the secret of an unknown id is compared with: the same work, and no secret has this hash."""


class KeyringError(ValueError):
    """A keys file that cannot be used; the message is one line with the fix, and no secret."""


class AuthError(Exception):
    """Nobody who may ask. The reason never says whether a key exists."""

    status = 401

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class KeyEntry(_Model):
    """One key, without its secret.

    ``sha256`` is last and required: a file cut off in the middle of writing is broken, and no
    entry in it has lost its expiry or its limits.
    """

    id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]{12}$")]
    tenant: KeyName
    agent: KeyName
    role: Role
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Served models that the key may use; None: all."""
    limits: Limits = Limits()
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Of the secret's ASCII text."""


class KeyFile(_Model):
    """The file ``keys.yaml``."""

    version: Literal[1]
    keys: tuple[KeyEntry, ...]

    @model_validator(mode="after")
    def _unambiguous(self) -> KeyFile:
        seen: set[str] = set()
        for entry in self.keys:
            if entry.id in seen:
                raise ValueError(f"id {entry.id} is there twice; remove one entry")
            seen.add(entry.id)
        return self


_KEYS = (
    *KeyFile.model_fields,
    *(f"keys.{name}" for name in KeyEntry.model_fields),
    *(f"keys.limits.{field.name}" for field in fields(Limits)),
)


def load_keys(path: str | Path) -> KeyFile:
    """Reads and checks a keys file. Raises ``KeyringError``."""
    try:
        data = read_mapping(Path(path))
    except ConfigError as error:
        raise KeyringError(str(error)) from None
    return parse_keys(data, str(path))


def parse_keys(data: Mapping[str, Any], name: str = "keys") -> KeyFile:
    """Checks a keys file that is already parsed; ``name`` stands for it in errors."""
    try:
        return validated(KeyFile, data, name, _KEYS)
    except ConfigError as error:
        # a value in the wrong place may be a secret, and this message goes to logs; the file's
        # name, which may be as long, stays whole
        said = _SECRETIVE.sub("...", str(error).removeprefix(f"{name}: "))
        raise KeyringError(f"{name}: {said}") from None


@dataclass(frozen=True)
class Identity:
    """Who asks, and what the key allows."""

    key_id: str
    tenant: str
    agent: str
    role: Literal["agent", "admin", "auditor", "canary"]
    """``canary`` is for keys in memory; no file can give it."""
    models: tuple[str, ...] | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class _Lock:
    """What opens, and for whom."""

    digest: bytes
    identity: Identity
    expires_at_s: float | None = None


def new_secret() -> str:
    """256 random bits, URL-safe."""
    return secrets.token_urlsafe(_SECRET_BYTES)


def new_id() -> str:
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))


def key_text(key_id: str, secret: str) -> str:
    """What the client sends behind ``Bearer``."""
    return f"lcg_{key_id}_{secret}"


def secret_digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("ascii")).digest()


class Keyring:
    """The keys of a file that is followed, and those made in memory.

    A file that breaks or disappears leaves the keys as they were, and says so in ``error``. A
    change is seen within ``every_s``, by the request that looks for it: about 1 ms for each key.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every_s: float = 1.0,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ``KeyringError`` for a file that cannot be used."""
        self._clock = clock
        self.loads = 0
        """Readings of the file that were good."""
        self.failures = 0
        """Readings that were not; each left the keys as they were."""
        self._memory: dict[str, _Lock] = {}
        self._file = ReloadingFile(path, self._read, every_s=every_s, clock=monotonic)

    @property
    def error(self) -> str:
        """Why the file as it is now cannot be used; empty while it can."""
        return self._file.error

    @property
    def n_keys(self) -> int:
        """Keys of the file in force, expired ones too."""
        return len(self._file.current())

    def agents(self) -> set[tuple[str, str]]:
        """Tenant and agent of every key of the file."""
        found = (lock.identity for lock in self._file.current().values())
        return {(who.tenant, who.agent) for who in found}

    def tenants(self) -> set[str]:
        """Whose keys the file has."""
        return {lock.identity.tenant for lock in self._file.current().values()}

    def authenticate(self, header: str | None) -> Identity:
        """Who sends this ``Authorization`` header. Raises ``AuthError``."""
        if not header:
            raise AuthError("no API key: send Authorization: Bearer lcg_...")
        match = _BEARER.fullmatch(header.strip(" \t"))
        if match is None:
            raise AuthError("the Authorization header is not of the form: Bearer lcg_ID_SECRET")
        key_id, secret = match.groups()
        lock = self._memory.get(key_id) or self._file.current().get(key_id)
        digest = lock.digest if lock is not None else _NOBODY
        if not hmac.compare_digest(secret_digest(secret), digest) or lock is None:
            raise AuthError("the API key is not valid: it was mistyped, revoked or never given")
        if lock.expires_at_s is not None and self._clock() >= lock.expires_at_s:
            raise AuthError(f"the API key {key_id} has expired: ask for a new one")
        return lock.identity

    def add_memory_key(self, identity: Identity) -> str:
        """A key for ``identity`` that lives as long as this object and is written nowhere."""
        key_id, secret = new_id(), new_secret()
        self._memory[key_id] = _Lock(secret_digest(secret), replace(identity, key_id=key_id))
        return key_text(key_id, secret)

    def _read(self, path: Path) -> dict[str, _Lock]:
        try:
            found = load_keys(path)
        except KeyringError:
            self.failures += 1
            raise
        self.loads += 1
        return {entry.id: _lock(entry) for entry in found.keys}


def _lock(entry: KeyEntry) -> _Lock:
    who = Identity(entry.id, entry.tenant, entry.agent, entry.role, entry.models, entry.limits)
    until = entry.expires_at
    return _Lock(bytes.fromhex(entry.sha256), who, None if until is None else until.timestamp())
