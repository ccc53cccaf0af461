"""Files of one JSON object a line, read into pydantic models with errors that name the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel, ValidationError

from lcguard.config import explain

M = TypeVar("M", bound=BaseModel)


class ScenarioError(ValueError):
    """A scenario file that cannot be used; the message is one line with the fix."""


class ScenarioWarning(UserWarning):
    """Something in a scenario file that is read, and is probably not what was meant."""


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a model and of the models in it."""
    for name, info in model.model_fields.items():
        yield prefix + name
        for hint in (info.annotation, *get_args(info.annotation)):
            if isinstance(hint, type) and issubclass(hint, BaseModel):
                yield from keys_of(hint, f"{prefix}{name}.")


def read_lines(path: Path, model: type[M]) -> Iterator[tuple[str, M]]:
    """Every line that is not blank, as ``file:line`` and its validated content.

    Raises ``ScenarioError`` where the file cannot be read, is empty, or a line is not the JSON
    object that ``model`` describes.
    """
    empty = True
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                empty = False
                yield f"{path}:{number}", _parse(f"{path}:{number}", line, model)
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}; pass a readable file") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    if empty:
        raise ScenarioError(f"{path}: no records; write one JSON object a line")


def _parse(where: str, line: str, model: type[M]) -> M:
    try:
        return model.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise ScenarioError(
            f"{where}: column {error.colno}: {error.msg}; write one JSON object on one line"
        ) from error
    except ValidationError as error:
        raise ScenarioError(f"{where}: {explain(error, keys_of(model))}") from error
    except (RecursionError, ValueError) as error:  # too deep, or a number of 5,000 digits
        raise ScenarioError(f"{where}: {error}; write a plain JSON object") from error
