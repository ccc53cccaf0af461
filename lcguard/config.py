"""Run configurations: one YAML file to one frozen (nested) dataclass.

The dataclass is the only schema: its fields, types and defaults say what a file may hold.
Anything else is refused with the key, the value and the nearest valid key. Values are checked
strictly (``"3"`` is no integer), except that lists become tuples and strings become paths, which
YAML cannot write otherwise.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic_core import InitErrorDetails, PydanticCustomError

from lcguard.nearest import hint
from lcguard.strict_yaml import YamlError, dump_yaml, parse_yaml

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line with the fix."""


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML file whose top level maps strings; an empty file is an empty mapping."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    except YamlError as error:
        raise ConfigError(f"{path}: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: top level is a {type(data).__name__}; write `key: value` lines")
    return data


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def explain(
    error: ValidationError, keys: Iterable[str], shown: Collection[str] | None = None
) -> str:
    """The first error as one line: key path, value, and the fix.

    ``keys`` are the valid dotted keys without list indices (``edges.forbid``), with ``*`` for a
    name that the file chooses. ``shown``: top-level keys whose values may be shown; None: all.
    """
    errors = error.errors(include_url=False)
    # A misspelt required key is missing too, and the misspelling is what to say.
    first = next((e for e in errors if e["type"] in _UNKNOWN), errors[0])
    # in brackets: which form of a value was tried (the tag of a union)
    kind, loc = first["type"], tuple(p for p in first["loc"] if not str(p).startswith("("))
    where = _dotted(loc) or "top level"
    value = repr(first["input"])
    value = f" = {value if len(value) <= 60 else value[:57] + '...'}:"
    if shown is not None and not (loc and loc[0] in shown and _flat(kind, first["input"])):
        value = ":"
    if kind in ("missing", "missing_argument"):
        fix = f"{where}: missing; add `{loc[-1]}: ...`"
    elif kind in _UNKNOWN:
        fix = f"{where}{value} unknown key; {_nearest(loc, list(keys))}"
    elif kind == "literal_error":
        valid = re.findall(r"'([^']*)'", str(first["ctx"]["expected"]))
        at = f"{where}{value}".removesuffix(":")
        fix = f"{at} is unknown: {hint(first['input'], valid)}"
    else:
        reason = str(first["msg"]).removeprefix("Value error, ")
        fix = f"{where}{value} {reason[:1].lower()}{reason[1:]}"
    others = len(errors) - 1
    fix += f" (and {others} more)" if others else ""
    return " ".join(fix.split())  # keys and messages may carry line breaks


def _flat(kind: str, value: object) -> bool:
    """Not a part of a file that has got to where nothing of it belongs."""
    return kind not in _UNKNOWN or not isinstance(value, dict)


def _dotted(loc: Sequence[int | str]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return "".join(parts).removeprefix(".")


def _nearest(loc: Sequence[int | str], keys: list[str]) -> str:
    """The valid key most like the last one of ``loc``: a sibling first, then anywhere."""
    parent = [part for part in loc[:-1] if isinstance(part, str)]
    siblings = [path[-1] for key in keys if _within(path := key.split("."), parent)]
    name = str(loc[-1])
    if close := difflib.get_close_matches(name, siblings, 1):
        return f"did you mean {close[0]!r}?"
    if moved := [key for key in keys if key.rsplit(".", 1)[-1] == name]:
        return f"did you mean {moved[0]!r}?"
    return f"valid keys: {', '.join(siblings)}"


def _within(path: Sequence[str], parent: Sequence[str]) -> bool:
    return len(path) == len(parent) + 1 and all(
        part in ("*", name) for part, name in zip(path, parent, strict=False)
    )


def field_paths(cls: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of a dataclass and of the dataclasses inside it."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield prefix + field.name
        for inner in _dataclasses_in(hints[field.name]):
            if inner is not cls:  # a recursive type would never end
                yield from field_paths(inner, f"{prefix}{field.name}.")


def _dataclasses_in(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for argument in get_args(hint):
        yield from _dataclasses_in(argument)


def load_config(
    cls: type[T], path: Path | None, overrides: Sequence[str] = (), base: T | None = None
) -> T:
    """Loads ``path`` as a ``cls``; ``overrides`` are ``a.b=c`` with c parsed as YAML.

    Without a path the defaults of ``cls`` are the file. ``base``: what the file leaves out, within
    its parts too; without it a part that is named has the defaults of its own type.
    """
    name = str(path) if path else "defaults"
    data = read_mapping(path) if path else {}
    if base is not None:
        data = _over(parse_yaml(dump_config(base)), data)
    for override in overrides:
        _apply(data, override)
    if overrides:
        name += " with --set " + " ".join(overrides)
    # Standard dataclasses take their configuration from the model around them, nested ones too.
    wrapper: Any = create_model("Run", __config__=ConfigDict(extra="forbid"), run=(cls, ...))
    try:
        # Through JSON: strict there still turns lists into tuples and strings into paths.
        return wrapper.model_validate_json(_as_json({"run": data}, name), strict=True).run  # type: ignore[no-any-return]
    except ValidationError as error:
        stripped = ValidationError.from_exception_data(
            error.title,
            [{**line, "loc": line["loc"][1:]} for line in error.errors()],  # type: ignore[typeddict-unknown-key]
        )
        raise ConfigError(f"{name}: {explain(stripped, field_paths(cls))}") from None


def _over(below: Any, above: Any) -> Any:
    """Mappings merged, key by key; anything else is what stands above."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    both = {k: _over(below[k], v) if k in below else v for k, v in above.items()}
    return {**below, **both}


def validated(
    model: type[M],
    data: Any,
    name: str,
    keys: Iterable[str],
    shown: Collection[str] | None = None,
    context: dict[str, Any] | None = None,
) -> M:
    """Parsed YAML as a pydantic model; ``name`` stands for the file in the one-line
    ``ConfigError``, ``keys`` and ``shown`` as for ``explain``, ``context`` is pydantic's."""
    try:
        # through JSON, as in ``load_config``
        return model.model_validate_json(_as_json(data, name), context=context)
    except ValidationError as error:
        raise ConfigError(f"{name}: {explain(error, keys, shown)}") from None


def located(loc: Sequence[int | str], value: object, message: str) -> ValidationError:
    """What a validator of a whole model raises for one value in it."""
    kind = PydanticCustomError("value_error", "{message}", {"message": message})
    line: InitErrorDetails = {"type": kind, "loc": (*loc,), "input": value}
    return ValidationError.from_exception_data("", [line])


def _as_json(data: Any, name: str) -> str:
    try:
        return json.dumps(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: {error}; write plain YAML scalars, lists and keys") from None


def _apply(data: dict[str, Any], override: str) -> None:
    """Sets one ``a.b=c`` in ``data``."""
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: not of the form a.b=c")
    try:
        value = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"--set {override}: {error}") from None
    for part in parts[:-1]:
        inner = data.get(part)
        if inner is None:
            inner = data[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {part} = {inner!r} holds no keys of its own")
        data = inner
    data[parts[-1]] = value


def dump_config(config: Any) -> str:
    """YAML text from which ``load_config`` gives ``config`` back."""
    data = TypeAdapter(type(config)).dump_python(config, mode="json")
    return dump_yaml(data)
