"""The embedded agent and the guards shipped with it."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
GUARDS = FOLDER / "guards"


def model_path() -> Path:
    """The nano agent as an ordinary model folder, for transformers and vLLM alike.

    Raises ``FileNotFoundError`` in an installation without package data.
    """
    if not (MODEL / "model.safetensors").exists():
        raise FileNotFoundError(
            f"{MODEL.name}/model.safetensors is not installed; make it with scripts/train_nano.py"
        )
    return MODEL


def guard_names() -> list[str]:
    """Guards shipped with the nano agent."""
    return sorted(p.parent.name for p in GUARDS.glob("*/lcguard_config.json"))


def guard_path(name: str) -> Path:
    """Folder of a shipped guard. Raises ``ValueError`` naming those there are."""
    path = GUARDS / name
    if name not in guard_names():
        raise ValueError(f"nano guard {name!r} is not shipped; shipped: {', '.join(guard_names())}")
    return path
