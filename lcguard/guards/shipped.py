"""Guards that come with the package, for the models that go by a name: ``nano:gate``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from lcguard.nearest import unknown

CARD = "lcguard_config.json"


def guard_folder(path: str) -> str:
    """The folder of a guard: ``MODEL:NAME`` is one that came with the package, anything else is a
    folder or repository as it is.

    Raises ``ValueError`` naming the shipped ones where the model has none of that name.
    """
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
