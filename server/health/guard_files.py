"""The guards on the disk: whether they are those that the engine runs, and what their cards say."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lcguard.guards import FrozenGuard
from lcguard.guards.frozen import GuardError
from lcguard.guards.registry_file import live_digest
from lcguard.guards.shipped import guard_folder
from lcguard.guards.standing import unproven_guards
from lcguard.server.errors import ProxyError


class GuardFiles:
    """Those of the engine's settings; a registry's are followed as others are promoted."""

    def __init__(self, folders: dict[str, str]) -> None:
        """``folders``: guard name to folder, registry, hub repository or ``nano:NAME``."""
        self._folders = dict(folders)
        self._marks: dict[str, tuple[object, str]] = {}
        self.unproven: dict[str, str] = {}
        """Guard to why nothing shows that it withholds anything."""
        self.certificates: dict[str, float] = {}
        """Guard to the mean pair leak on its card, in nats."""
        self.read_cards()

    def read_cards(self) -> None:
        """Again, in place: who shows them holds these very dictionaries."""
        unproven, certificates = unproven_guards(self._folders), dict[str, float]()
        for name, folder in self._folders.items():
            with suppress(ValueError):
                card = FrozenGuard.from_pretrained(folder).card
                if card.certificate is not None:
                    certificates[name] = float(card.certificate["mean_nats"])
        self.unproven.clear()
        self.unproven.update(unproven)
        self.certificates.clear()
        self.certificates.update(certificates)

    def promoted(self, running: dict[str, str]) -> bool:
        """Whether a registry has another version live than the engine was seen to run."""
        for name, digest in running.items():
            with suppress(ValueError):  # for ``check`` to say
                if live_digest(self._folders.get(name, "")) not in ("", digest):
                    return True
        return False

    def check(self, running: dict[str, str]) -> str:
        """Raises ``ProxyError`` for a guard whose files were altered since the engine read them."""
        for name in self._folders:
            if name in running:
                self._one(name, running[name])
        return f"{len(self._folders)} as the engine runs them"

    def _one(self, name: str, running: str) -> None:
        try:
            folder, live = Path(guard_folder(self._folders[name])), live_digest(self._folders[name])
        except ValueError as error:
            raise ProxyError(503, f"guard {name!r}: {error}", code="guard") from None
        if not (folder.is_absolute() or folder.is_dir()):
            return  # a hub repository
        if not folder.is_dir():
            why = f"guard {name!r}: {folder} is gone: put it back"
            raise ProxyError(503, why, code="guard")
        files = [(p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.iterdir())]
        mark, before = (str(folder), files), self._marks.get(name)
        if before is None or before[0] != mark:
            try:
                digest = FrozenGuard.from_pretrained(folder).digest
            except GuardError as error:
                digest = f"unreadable: {error}"
            before = self._marks[name] = (mark, digest)
        if before[1] == running:
            return
        found = f"guard {name!r} on the disk is not the one that the engine runs"
        if live:
            raise ProxyError(
                503,
                f"{found}: {folder.name} was promoted, and the engine could not take it over (its "
                "log says why): promote another, or restart",
                code="guard",
            )
        raise ProxyError(
            503, f"{found} ({before[1][:80]}): put the files back, or restart", code="guard"
        )
