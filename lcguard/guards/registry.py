"""A deployment's guards: versions with their lineage, of which one is live.

Versions are added with the judgement that was made of them, never changed, and promoted only where
that accepted them. Rolling back goes to the version that was live before and may still be served.
Every change is one replacement of ``registry.json``, under a lock (``registry_file``).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from lcguard.atomic_file import PUBLIC, replace_file
from lcguard.guards.frozen import WEIGHTS, Card, FrozenGuard, GuardError, read_card
from lcguard.guards.registry_file import (
    CARD_FILE,
    REGISTRY_FILE,
    VERSIONS,
    Judgement,
    RegistryError,
    RegistryState,
    Version,
    is_registry,
    read_registry,
    version_folder,
)

__all__ = ["Judgement", "Registry", "RegistryError", "RegistryState", "Version"]

RECORDS = "records.txt"
_LOCK = ".lock"
_SAME = ("guard", "shape", "categories", "model_digest")
"""What a running engine relies on of the guard that it took at its start."""


def record_mark(text: str) -> str:
    """What tells a record again without holding its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Registry:
    """Reads and changes one registry. Raises ``RegistryError`` for a file that is not its own."""

    def __init__(self, folder: Path, key: bytes) -> None:
        """``folder`` need not exist: the first version makes it."""
        self.folder, self._key = folder, key

    @property
    def state(self) -> RegistryState:
        """As it is now; empty where there is no registry yet."""
        if not is_registry(self.folder):
            return RegistryState()
        return read_registry(self.folder, self._key)

    def path(self, version: Version) -> Path:
        """Folder of a version whose card is the signed one."""
        return version_folder(self.folder, version)

    def load(self, version: Version) -> FrozenGuard:
        """A version's guard. Raises ``RegistryError`` where its files are not those that came."""
        folder = self.path(version)
        try:
            guard = FrozenGuard.from_pretrained(folder)
        except GuardError as error:
            raise RegistryError(f"{version.name}: {error}") from error
        if guard.digest != version.digest:
            raise RegistryError(
                f"{version.name} has digest {guard.digest[:12]}, the registry signed "
                f"{version.digest[:12]}: it was altered; put back a copy"
            )
        return guard

    def add(
        self,
        guard: Path,
        judgement: Judgement,
        *,
        parent: str = "",
        run: str = "",
        marks: Iterable[str] = (),
    ) -> Version:
        """Copies a guard's folder in as a new version; the one there is where it came before.

        Args:
            parent: digest of the guard that its training went on from.
            run: digest of the training's configuration.
            marks: ``record_mark`` of each record that it was trained on.

        Raises ``RegistryError`` for a guard that cannot be loaded, and for a judgement of one that
        was judged otherwise before.
        """
        try:
            loaded = FrozenGuard.from_pretrained(guard)
        except GuardError as error:
            raise RegistryError(str(error)) from error
        with self._changing() as state:
            known = state.of_digest(loaded.digest)
            if known is not None:
                if known.judgement.accepted != judgement.accepted:
                    raise RegistryError(
                        f"{known.name} is this guard, and was judged otherwise: "
                        f"{known.judgement.reason}; train another"
                    )
                return known
            name = f"v{len(state.versions) + 1}"
            listed = "".join(f"{m}\n" for m in sorted(set(marks))).encode()
            card = self._copy(guard, name, listed)
            version = Version(
                name=name,
                digest=loaded.digest,
                card_sha256=hashlib.sha256(card).hexdigest(),
                guard=loaded.card.guard,
                model_digest=loaded.card.model_digest,
                judgement=judgement,
                parent=parent,
                run=run,
                data=hashlib.sha256(listed).hexdigest() if listed else "",
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            self.load(version)  # what was copied, not what was read before
            why = judgement.reason if judgement.accepted else f"refused: {judgement.reason}"
            self._write(state.changed("add", name, why, versions=(*state.versions, version)))
        return version

    def promote(self, name: str, why: str) -> Version:
        """Makes a version live.

        Raises ``RegistryError`` for one that was refused, withdrawn or altered, and for one that
        cannot take the live guard's place: of another kind, or for another model.
        """
        with self._changing() as state:
            version = state.version(name)
            self._check(state, version)
            if state.live != name:
                self._write(state.changed("promote", name, why, live=name))
        return version

    def rollback(self, why: str) -> Version:
        """Withdraws the live version, and makes that live which was before it and may still be.

        Raises ``RegistryError`` where there is none: nothing is changed then.
        """
        with self._changing() as state:
            live = state.live_version
            before = self._before(state)
            if before is None:
                raise RegistryError(
                    f"no earlier version may be served in place of {live.name}: its edges stay "
                    "closed; train another"
                )
            versions = _withdrawn(state, live.name, why)
            self._write(
                state.changed("rollback", before.name, why, versions=versions, live=before.name)
            )
        return before

    def withdraw(self, name: str, why: str) -> None:
        """Marks a version as not to be promoted, or rolled back to, again. One that is live stays
        so: what closes its edges are the canaries."""
        with self._changing() as state:
            if not state.version(name).withdrawn:
                self._write(
                    state.changed("withdraw", name, why, versions=_withdrawn(state, name, why))
                )

    def marks(self, version: Version) -> frozenset[str]:
        """Marks of the records that a version and all that it descends from were trained on, as
        far as the registry knows. Raises ``RegistryError`` for an altered list."""
        state, found, seen = self.state, version, set[str]()
        lineage: Version | None = version
        for _ in state.versions:
            if lineage is None:
                break
            found, lineage = lineage, state.of_digest(lineage.parent)
            if not found.data:
                continue
            data = (self.folder / VERSIONS / found.name / RECORDS).read_bytes()
            if hashlib.sha256(data).hexdigest() != found.data:
                raise RegistryError(f"{found.name}/{RECORDS} was altered; put back a copy")
            seen |= set(data.decode().split())
        return frozenset(seen)

    def verify(self) -> list[str]:
        """What is wrong with the registry, a line each: every version is loaded."""
        state, wrong = self.state, []
        for version in state.versions:
            try:
                self.load(version)
                self.marks(version)
            except (RegistryError, OSError) as error:
                wrong.append(str(error))
        if [e.serial for e in state.events] != list(range(1, state.serial + 1)):
            wrong.append("its events are not numbered one after the other")
        return wrong

    def _check(self, state: RegistryState, version: Version) -> None:
        """Raises ``RegistryError`` where the version may not become live."""
        if not version.judgement.accepted:
            raise RegistryError(f"{version.name} was refused: {version.judgement.reason}")
        if version.withdrawn:
            raise RegistryError(f"{version.name} was withdrawn: {version.withdrawn}")
        card = self.load(version).card
        if not state.live:
            return
        live = read_card(self.folder / VERSIONS / state.live)
        for field in _SAME:
            if getattr(card, field) != getattr(live, field):
                raise RegistryError(
                    f"{version.name} has {field} {_shown(card, field)}, the live {state.live} has "
                    f"{_shown(live, field)}: give it a registry of its own"
                )

    def _before(self, state: RegistryState) -> Version | None:
        """The version that was live last, of those that may be served."""
        for event in reversed(state.events):
            if event.what in ("promote", "rollback") and event.version != state.live:
                version = state.version(event.version)
                if not version.withdrawn:
                    try:
                        self._check(state, version)
                    except RegistryError:
                        continue
                    return version
        return None

    def _copy(self, guard: Path, name: str, listed: bytes) -> bytes:
        """Puts a version's folder in its place; the card's bytes."""
        target = self.folder / VERSIONS / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        try:
            for file in (CARD_FILE, WEIGHTS):
                replace_file(part / file, (guard / file).read_bytes(), mode=PUBLIC)
            replace_file(part / RECORDS, listed)  # who was trained on is nobody else's to ask
            part.chmod(0o755)
            if target.exists():  # of a process that died before it could sign it
                shutil.rmtree(target)
            os.rename(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return (target / CARD_FILE).read_bytes()

    @contextmanager
    def _changing(self) -> Iterator[RegistryState]:
        """The state, while nobody else changes it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self.state

    def _write(self, state: RegistryState) -> None:
        replace_file(self.folder / REGISTRY_FILE, state.encode(self._key), mode=PUBLIC)


def _withdrawn(state: RegistryState, name: str, why: str) -> tuple[Version, ...]:
    reason = " ".join(why.split())[:500]
    return tuple(
        v.model_copy(update={"withdrawn": reason}) if v.name == name else v for v in state.versions
    )


def _shown(card: Card, field: str) -> str:
    value = getattr(card, field)
    return repr(value[:12] if field == "model_digest" else value)
