"""Guards: one file each, registered by name; a guard is known by its file alone."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from lcguard.guards.base import GuardModule, KVShape, guard_class, names, register
from lcguard.guards.frozen import Card, FrozenGuard, GuardError

for _file in sorted(Path(__file__).parent.glob("[!_]*.py")):
    import_module(f"lcguard.guards.{_file.stem}")

__all__ = [
    "Card",
    "FrozenGuard",
    "GuardError",
    "GuardModule",
    "KVShape",
    "guard_class",
    "names",
    "register",
]
