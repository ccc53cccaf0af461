"""Whole JSON files read into pydantic models, with errors that name file and place."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lcguard.agents.scenarios.lines import ScenarioError, keys_of
from lcguard.config import explain

M = TypeVar("M", bound=BaseModel)


def data_path(path: Path | None, name: str, tries: Sequence[str]) -> Path:
    """``path`` or a place below it; without a path the data root is LCGUARD_DATA.

    ``tries`` are relative, the most specific last. Raises ``ScenarioError`` where none is there.
    """
    if path is None:
        root = os.environ.get("LCGUARD_DATA")
        if not root:
            raise ScenarioError(f"{name} has no data root; set LCGUARD_DATA or pass --data")
        path = Path(root)
    found = next((path / t for t in reversed(tries) if (path / t).exists()), None)
    if found is None:
        raise ScenarioError(
            f"{path / tries[-1]}: no such file or folder; set LCGUARD_DATA or pass --data"
        )
    return found


def load_json(path: Path) -> Any:
    """A file's JSON. Raises ``ScenarioError`` where it cannot be read or is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}; pass a readable file") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ScenarioError(
            f"{path}:{error.lineno}: column {error.colno}: {error.msg}; write valid JSON"
        ) from error
    except (RecursionError, ValueError) as error:  # too deep, or a number of 5,000 digits
        raise ScenarioError(f"{path}: {error}; write plain JSON") from error


def parse(where: str, value: Any, model: type[M]) -> M:
    """``value`` as a model. Raises ``ScenarioError`` naming ``where`` and the key."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ScenarioError(f"{where}: {explain(error, keys_of(model))}") from error
