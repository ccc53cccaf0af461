"""Where a guard lies that goes by a name: ``nano:gate`` came with the package, a registry's folder
means its live version."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from lcguard.guards.registry_file import CARD_FILE, is_registry, live_folder
from lcguard.nearest import unknown

CARD = CARD_FILE


def guard_folder(path: str) -> str:
    """The folder of a guard: ``MODEL:NAME`` is one that came with the package, a registry stands
    for its live version, anything else is a folder or repository as it is.

    Raises ``ValueError`` naming the shipped ones where the model has none of that name, and
    ``RegistryError`` for a registry that was altered or has no live version.
    """
    if is_registry(Path(path)):
        return str(live_folder(Path(path)))
    model, _, name = path.partition(":")
    if not name or not model.isidentifier():
        return path
    try:
        root = Path(str(files(f"lcguard.agents.{model}") / "guards"))
    except ModuleNotFoundError:
        return path
    shipped = sorted(p.parent.name for p in root.glob(f"*/{CARD}"))
    if name not in shipped:
        raise ValueError(unknown("guard", path, [f"{model}:{s}" for s in shipped]))
    return str(root / name)
