"""The signed file of a guard registry: which versions there are, which is live, what happened.

``registry.json`` is replaced whole, so the ``live`` pointer moves in one step; ``versions/NAME``
are guards' folders that never change. ``hmac = HMAC-SHA256(deployment key, canonical JSON of every
other field)``: whoever can write the folder and lacks the key can put the whole of it back to an
older state, and nothing else. ``serial`` counts the changes: a reader that has seen a later one
refuses an earlier.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from lcguard.canonical import canonical_hmac
from lcguard.deployment_key import deployment_key
from lcguard.nearest import unknown

REGISTRY_FILE, VERSIONS = "registry.json", "versions"
CARD_FILE = "lcguard_config.json"
_DOMAIN = b"lcguard guard registry\0"


class RegistryError(ValueError):
    """A registry that must not be used, or a change that it refuses. One line with the fix."""


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
OptionalDigest = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
Name = Annotated[str, Field(pattern=r"^v[1-9][0-9]{0,8}$")]
What = Literal["add", "promote", "rollback", "withdraw"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Judgement(_Frozen):
    """What was decided about a version before it came here."""

    accepted: bool
    reason: str
    """One line; of a refusal, everything that spoke against it."""
    figures: dict[str, JsonValue] = {}


class Version(_Frozen):
    """A guard of the registry, and where it comes from."""

    name: Name
    digest: Digest
    """Of options, model and weights: what a segment's manifest names."""
    card_sha256: Digest
    """Of the card as it lies there, which has the weights' own."""
    guard: str
    model_digest: str
    judgement: Judgement
    parent: OptionalDigest = ""
    """Digest of the guard that its training went on from."""
    run: OptionalDigest = ""
    """Of the training's configuration."""
    data: OptionalDigest = ""
    """Of ``records.txt`` beside the card: a mark for each record that it was trained on. No
    judgement may use one."""
    created: str = ""
    withdrawn: str = ""
    """Why it may not be served again; empty while it may."""


class Event(_Frozen):
    """One change."""

    serial: Annotated[int, Field(ge=1)]
    at: str
    what: What
    version: Name
    why: str


class RegistryState(_Frozen):
    """The whole file."""

    format: Literal[1] = 1
    serial: Annotated[int, Field(ge=0)] = 0
    live: str = ""
    """Name of the version that guards; empty before the first promotion."""
    versions: tuple[Version, ...] = ()
    events: tuple[Event, ...] = ()
    hmac: str = ""

    def version(self, name: str) -> Version:
        """Raises ``RegistryError`` naming those that there are."""
        for found in self.versions:
            if found.name == name:
                return found
        raise RegistryError(unknown("version", name, [v.name for v in self.versions]))

    def of_digest(self, digest: str) -> Version | None:
        """The version with a guard's digest."""
        return next((v for v in self.versions if v.digest == digest), None)

    @property
    def live_version(self) -> Version:
        """Raises ``RegistryError`` where nothing was promoted yet."""
        if not self.live:
            raise RegistryError("the registry has no live version: promote one")
        return self.version(self.live)

    def standing(self, version: Version) -> str:
        """A version's state in a word or two."""
        if version.name == self.live:
            return "live, leaks" if version.withdrawn else "live"
        if version.withdrawn:
            return "withdrawn"
        return "ready" if version.judgement.accepted else "refused"

    def changed(self, what: What, version: str, why: str, **fields: object) -> RegistryState:
        """The next state, with its event; not signed yet."""
        event = Event(
            serial=self.serial + 1,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            what=what,
            version=version,
            why=" ".join(why.split())[:500],
        )
        update = {"serial": event.serial, "events": (*self.events, event), **fields}
        return self.model_copy(update=update)

    def signature(self, key: bytes) -> str:
        """What ``hmac`` has to be. Raises ``ValueError`` for a key that is too short."""
        return canonical_hmac(key, _DOMAIN, self.model_dump(mode="json", exclude={"hmac"}))

    def encode(self, key: bytes) -> bytes:
        """The file's content, signed."""
        signed = self.model_copy(update={"hmac": self.signature(key)})
        return (json.dumps(signed.model_dump(mode="json"), indent=1) + "\n").encode()


def read_registry(folder: Path, key: bytes | None = None) -> RegistryState:
    """The registry's state, its signature checked with ``key`` or that of ``LCGUARD_KEY``.

    Raises ``RegistryError`` for a file that is missing, malformed or not signed with the key, and
    ``ValueError`` where there is no key.
    """
    path = folder / REGISTRY_FILE
    try:
        state = RegistryState.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RegistryError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise RegistryError(f"{path}: {where}: {first['msg']}; put back a copy") from None
    if not hmac.compare_digest(
        state.hmac, state.signature(deployment_key() if key is None else key)
    ):
        raise RegistryError(
            f"{path} is not signed with this deployment's key: it was altered, or LCGUARD_KEY is "
            "another's"
        )
    return state


def is_registry(folder: Path) -> bool:
    """Whether a folder holds a registry rather than one guard."""
    return (folder / REGISTRY_FILE).is_file()


def version_folder(folder: Path, version: Version) -> Path:
    """Where the version's guard lies, once its card is seen to be the one that was signed.

    Raises ``RegistryError`` where it was altered or is gone.
    """
    found = folder / VERSIONS / version.name
    try:
        digest = hashlib.sha256((found / CARD_FILE).read_bytes()).hexdigest()
    except OSError as error:
        raise RegistryError(f"{found}: its card cannot be read: {error.strerror}") from None
    if digest != version.card_sha256:
        raise RegistryError(
            f"{found}: its card has sha256 {digest[:12]}, the registry signed "
            f"{version.card_sha256[:12]}: the file was altered; put back a copy"
        )
    return found


def live_digest(path: str) -> str:
    """Digest of a registry's live version; empty for what is no registry. Raises as
    ``live_folder``."""
    return read_registry(Path(path)).live_version.digest if is_registry(Path(path)) else ""


def live_folder(folder: Path) -> Path:
    """The folder of a registry's live version. Raises ``RegistryError``, and ``ValueError`` where
    there is no key."""
    return version_folder(folder, read_registry(folder).live_version)
