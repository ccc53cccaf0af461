"""Models that go by a name of ours: the embedded one, and those made from a wheel on first use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from lcguard.agents.nano.load import MODEL, model_path
from lcguard.agents.smollm2 import prepare as smollm2
from lcguard.nearest import unknown

Say = Callable[[str], None]
_LIKE = 0.75
"""How like one of ours a name is that was mistyped; no repository of the hub's is called so."""


@dataclass(frozen=True)
class NamedModel:
    """A model whose folder is made or found by its name."""

    name: str
    what: str
    folder: Callable[[], Path]
    """Where it lies, or will."""
    ready: Callable[[], bool]
    prepare: Callable[[Say], Path]
    """Makes the folder where it is missing; raises ``ValueError`` in one line."""
    guards: tuple[str, ...] = ()
    """Shipped ones that its server offers."""
    reader: Path | None = None
    """Folder of the adapters that it answers with, if it comes with some."""


NAMED = {
    m.name: m
    for m in (
        NamedModel(
            "nano",
            "1 M parameters, embedded: tests and the demo",
            lambda: MODEL,
            lambda: (MODEL / "model.safetensors").is_file(),
            lambda say: model_path(),
            ("gate",),
        ),
        NamedModel(
            "smollm2",
            f"SmolLM2-135M-Instruct, from the wheel {smollm2.WHEEL}=={smollm2.VERSION}",
            smollm2.model_folder,
            smollm2.ready,
            smollm2.prepare,
            ("twin",),
            smollm2.READER,
        ),
    )
}


def model_location(name: str, say: Say = lambda text: None) -> str:
    """A folder for a name of ours, prepared where it has to be; anything else as it is: a folder
    or a hub repository. Raises ``ValueError`` in one line where it cannot be prepared, for a name
    like one of ours that is no folder, and for a path of none."""
    if name in NAMED:
        return str(NAMED[name].prepare(say))
    if name.startswith((".", "/", "~")):
        if not (folder := Path(name).expanduser()).is_dir():
            raise ValueError(
                f"model {name!r} is not a folder; give a model folder or a hub repository"
            )
        return str(folder)
    like = "/" not in name and get_close_matches(name, NAMED, 1, _LIKE)
    if like and not Path(name).is_dir():
        raise ValueError(unknown("model", name, like))
    return name


def served_guards(name: str) -> dict[str, str]:
    """Guards that come with a model: name as policies use it -> ``MODEL:NAME``."""
    return {g: f"{name}:{g}" for g in NAMED[name].guards} if name in NAMED else {}


def reader_folder(name: str) -> Path | None:
    """Where the adapters are that a model answers with; None where it answers as it is."""
    folder = NAMED[name].reader if name in NAMED else None
    return folder if folder is not None and (folder / "adapter_config.json").is_file() else None
