"""What a step of a round leaves for the next: one JSON file, written whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from lcguard.atomic_file import PUBLIC, replace_file

M = TypeVar("M", bound=BaseModel)


def write_step(path: Path, made: BaseModel) -> None:
    """In place of what was there."""
    replace_file(path, (made.model_dump_json(indent=1) + "\n").encode(), mode=PUBLIC)


def read_step(kind: type[M], path: Path, step: str) -> M:
    """Raises ``ValueError`` where ``lcguard loop STEP`` did not end there."""
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(
            f"{path.parent}: {path.name} cannot be read ({error.strerror}): run `lcguard loop "
            f"{step}`"
        ) from None
