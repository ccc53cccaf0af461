"""The headline comes from fresh attackers alone.

A guard is trained until the attacker beside it fails, so what that attacker recovers in the end
says nothing about the next one. ``asr_fresh`` is therefore taken from attacks that this run fitted
itself, after the guards were frozen. An attack that would bring weights along is refused before
anything runs, and a headline by an attack that the run did not fit is refused before it is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lcguard.evaluation.outcomes import Attempt
from lcguard.evaluation.plan import Plan

_TRAINING_TIME = ("train", "trained", "training", "training-time")
_SAVED = ("weights", "checkpoint", "ckpt", "state_dict", "pretrained", "attacker")
_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")


def check_fresh(config: Plan) -> None:
    """Raises ``ValueError`` for an attack that is not fitted in this run."""
    for spec in config.attacks:
        if spec.attack in _TRAINING_TIME:
            raise ValueError(
                f"attack {spec.name!r}: {spec.attack!r} is the attacker a guard was trained "
                "against; name a fresh one, such as decoder (a guard's own stands as asr_train)"
            )
        for key, value in _leaves({**spec.options, "clean_fit": spec.clean_fit}):
            if isinstance(value, str) and (key.rsplit(".", 1)[-1] in _SAVED or _holds(value)):
                raise ValueError(
                    f"attack {spec.name!r}: option {key} = {value!r} brings saved weights along; "
                    "leave it out: attacks are fitted in the run, after the guard was frozen"
                )


def check_headline(results: list[dict[str, Any]], attempts: list[Attempt], config: Plan) -> None:
    """Raises ``ValueError`` for a headline whose attack this run did not fit on that guard."""
    fitted = {(a.guard, a.attack) for a in attempts if a.kind == "attack"}
    known = {a.name for a in config.attacks}
    for row in results:
        best = row["asr_fresh_best"]
        if best is not None and (best not in known or (row["guard"], best) not in fitted):
            raise ValueError(
                f"guard {row['guard']!r}: the headline is from {best!r}, which was not fitted in "
                "this run; only fresh attackers may stand there"
            )


def _leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _holds(value: str) -> bool:
    """Does the text name weights, or a folder with some?"""
    folder = Path(value)
    if value.endswith(_FILES):
        return True
    return folder.is_dir() and any(f.suffix in _FILES for f in folder.iterdir())
