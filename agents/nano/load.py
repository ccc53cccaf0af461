"""Where the embedded agent lies."""

from __future__ import annotations

from pathlib import Path

MODEL = Path(__file__).parent / "model"


def model_path() -> Path:
    """The nano agent as an ordinary model folder, for transformers and vLLM alike.

    Raises ``FileNotFoundError`` in an installation without package data.
    """
    if not (MODEL / "model.safetensors").exists():
        raise FileNotFoundError(
            f"{MODEL.name}/model.safetensors is not installed; make it with scripts/train_nano.py"
        )
    return MODEL
