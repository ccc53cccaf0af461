"""Files of scenarios read into pydantic models, with errors that name the file and the place."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from lcguard.config import explain

M = TypeVar("M", bound=BaseModel)
REQUESTER: Final = "requester"
"""The audience of a chain's last agent."""
Text = Annotated[str, StringConstraints(min_length=1)]


class ScenarioError(ValueError):
    """A scenario file that cannot be used; the message is one line with the fix."""


class ScenarioWarning(UserWarning):
    """Something in a scenario file that is read, and is probably not what was meant."""


class BenchmarkModel(BaseModel):
    """The part of a benchmark's object that a hop needs; it may have more keys."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


def own_data(name: str) -> dict[str, Any]:
    """A TOML file beside this module."""
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def data_path(
    path: Path | None,
    name: str,
    tries: Sequence[str],
    is_wanted: Callable[[Path], bool] = Path.exists,
) -> Path:
    """``path`` or a place below it; without a path the data root is LCGUARD_DATA.

    ``tries`` are relative, the most specific last. Raises ``ScenarioError`` where none is there.
    """
    if path is None:
        root = os.environ.get("LCGUARD_DATA")
        if not root:
            raise ScenarioError(f"{name} has no data root; set LCGUARD_DATA or pass --data")
        path = Path(root)
    found = next((path / t for t in reversed(tries) if is_wanted(path / t)), None)
    if found is None:
        raise ScenarioError(
            f"{path / tries[-1]}: no such file or folder; set LCGUARD_DATA or pass --data"
        )
    return found


def load_json(path: Path) -> Any:
    """A file's JSON. Raises ``ScenarioError`` where it cannot be read or is none."""
    with _readable(path):
        return _decoded(path.read_text(encoding="utf-8-sig"), path, None, "valid JSON")


def read_lines(path: Path, model: type[M]) -> Iterator[tuple[str, M]]:
    """Every line that is not blank, as ``file:line`` and its validated content.

    Raises ``ScenarioError`` where the file cannot be read, is empty, or a line is not the JSON
    object that ``model`` describes.
    """
    empty = True
    with _readable(path), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                empty = False
                where = f"{path}:{number}"
                yield (
                    where,
                    parse(
                        where, _decoded(line, path, number, "one JSON object on one line"), model
                    ),
                )
    if empty:
        raise ScenarioError(f"{path}: no records; write one JSON object a line")


def parse(where: str, value: Any, model: type[M]) -> M:
    """``value`` as a model. Raises ``ScenarioError`` naming ``where`` and the key."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ScenarioError(f"{where}: {explain(error, keys_of(model))}") from error
    except RecursionError as error:
        raise ScenarioError(f"{where}: {error}; write a plain JSON object") from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}; pass a readable file") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from error


def _decoded(text: str, path: Path, line: int | None, wanted: str) -> Any:
    """JSON that stands on that line of the file; None: that is the whole file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ScenarioError(
            f"{path}:{line or error.lineno}: column {error.colno}: {error.msg}; write {wanted}"
        ) from error
    except (RecursionError, ValueError) as error:  # too deep, or a number of 5,000 digits
        where = f"{path}:{line}" if line else path
        raise ScenarioError(f"{where}: {error}; write a plain JSON object") from error


def check_new(where: str, key: str, name: str, known: Container[str]) -> None:
    """Raises ``ScenarioError`` for a scenario's name that was used before."""
    if name in known:
        raise ScenarioError(f"{where}: {key} = {name!r}: used before; make it unique")


def check_agents(where: str, names: Sequence[str], key: str) -> None:
    """Raises ``ScenarioError`` for agents that share a name, or have the requester's."""
    if len(set(names)) < len(names) or REQUESTER in names:
        raise ScenarioError(
            f"{where}: agents = {names}: give each its own {key}, none {REQUESTER!r}"
        )


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a model and of the models in it."""
    for name, info in model.model_fields.items():
        yield prefix + name
        for hint in (info.annotation, *get_args(info.annotation)):
            if isinstance(hint, type) and issubclass(hint, BaseModel):
                yield from keys_of(hint, f"{prefix}{name}.")
