"""Guards of a running worker that follow a registry: what is promoted there guards from then on.

The registry's file is looked at before a step that publishes; a new version is read beside the
step, checked like those of the start, and put in the old one's place between two steps. One that
cannot be used leaves the guard in force, and says so: behind the proxy, whose readiness then finds
another guard on the disk than the engine runs, nothing more is published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

from vllm.logger import init_logger

from lcguard.guards.frozen import FrozenGuard
from lcguard.guards.registry_file import (
    REGISTRY_FILE,
    RegistryError,
    RegistryState,
    Version,
    is_registry,
    read_registry,
    version_folder,
)
from lcguard.reloading import ReloadingFile
from lcguard.store.line import Call, StoreLine

logger = init_logger("vllm.lcguard.live_guards")
Load = Callable[[str, str], FrozenGuard]
"""Name as policies call it and folder -> a guard that fits the engine's model."""


class Followed:
    """One registry, as far as it was followed."""

    def __init__(self, name: str, folder: Path, key: bytes, guard: FrozenGuard) -> None:
        self.name, self.folder, self._key = name, folder, key
        self.file: ReloadingFile[RegistryState] = ReloadingFile(
            folder / REGISTRY_FILE, lambda path: read_registry(path.parent, key)
        )
        self.serial = self.file.current().serial
        self.digest = guard.digest
        """Of the guard in force, or of one that could not take its place: it is tried once."""
        self.call: Call[FrozenGuard] | None = None
        self.complaint = ""

    def wanted(self) -> Version | None:
        """A version to go over to. Raises ``RegistryError`` for a registry put back to an older
        state than was seen."""
        state = self.file.current()
        if self.file.error:
            raise RegistryError(self.file.error)
        if state.serial < self.serial:
            raise RegistryError(
                f"{self.folder} is at change {state.serial}, and was at {self.serial} before: an "
                "older copy was put back"
            )
        self.serial = state.serial
        version = state.live_version
        return None if version.digest == self.digest else version


class LiveGuards:
    """Puts promoted versions into a worker's ``guards``, which it shares."""

    def __init__(
        self,
        guards: MutableMapping[str, FrozenGuard],
        folders: Mapping[str, str],
        key: bytes,
        load: Load,
        check: Callable[[Mapping[str, FrozenGuard]], None],
        line: StoreLine,
    ) -> None:
        """
        Args:
            folders: of the guards that are followed, by name; those of no registry are not.
            check: raises ``ValueError`` for guards that this engine computes wrong.
            line: where files are read.
        """
        self._guards, self._load, self._check, self._line = guards, load, check, line
        self._followed = [
            Followed(name, Path(at), key, guards[name])
            for name, at in folders.items()
            if is_registry(Path(at))
        ]

    def look(self) -> None:
        """Between two steps: asks for what was promoted, and takes what was read. Raises nothing:
        what is wrong is logged once, and the guard in force stays."""
        for f in self._followed:
            try:
                self._one(f)
                f.complaint = ""
            except Exception as error:
                line = " ".join(str(error).split())
                if line != f.complaint:
                    logger.error("lcguard: guard %r stays as it is: %s", f.name, line)
                f.complaint = line

    def _one(self, f: Followed) -> None:
        version = f.wanted()
        if f.call is None:
            if version is not None:
                folder = f.folder
                f.call = self._line.submit(lambda: self._read(f.name, folder, version))
            return
        if not f.call.ended():
            return
        call, f.call = f.call, None
        try:
            guard = call.result()
            if version is None or version.digest != guard.digest:
                return  # another was promoted meanwhile, and is asked for at the next look
            now = self._guards[f.name]
            if type(guard.module) is not type(now.module):
                raise RegistryError(
                    f"{version.name} is a {guard.name!r}, the engine was started with "
                    f"{now.name!r}: restart it"
                )
            self._check({f.name: guard})
        except BaseException:
            if version is not None:
                f.digest = version.digest
            raise
        self._guards[f.name], f.digest = guard, guard.digest
        logger.info("lcguard: guard %r is %s (%s) now", f.name, version.name, guard.digest[:12])

    def _read(self, name: str, folder: Path, version: Version) -> FrozenGuard:
        guard = self._load(name, str(version_folder(folder, version)))
        if guard.digest != version.digest:
            raise RegistryError(
                f"{version.name} has digest {guard.digest[:12]}, the registry signed "
                f"{version.digest[:12]}: it was altered"
            )
        return guard
