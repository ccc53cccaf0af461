"""Configurations by file or by the name of a shipped preset, of the kind that the file says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from lcguard.config import load_config, read_mapping
from lcguard.evaluation.multihop_plan import MultihopConfig
from lcguard.evaluation.plan import EvalConfig

T = TypeVar("T")
MODELS = Path(__file__).parent.parent / "agents"
EMBEDDED = "nano"
AnyPlan = EvalConfig | MultihopConfig
_KINDS: dict[str, type[EvalConfig] | type[MultihopConfig]] = {
    "hop": EvalConfig,
    "multihop": MultihopConfig,
}


def shipped(model: str = EMBEDDED) -> list[Path]:
    """The configurations that come with a model; none for a model that has none."""
    return sorted((MODELS / model / "presets").glob("*.yaml")) if model.isidentifier() else []


def preset(name: str, model: str = EMBEDDED) -> Path:
    """A configuration shipped with the model, or else with the nano agent. Raises ``ValueError``
    naming those there are."""
    own, plain = shipped(model), shipped()
    for path in (*own, *plain):
        if path.stem == name:
            return path
    known = ", ".join(p.stem for p in plain)
    if model != EMBEDDED and own:
        known += f"; with model={model} also: {', '.join(p.stem for p in own)}"
    raise ValueError(f"preset {name!r} is unknown; shipped: {known}")


def _model_of(sets: Sequence[str]) -> str:
    """The model that an override names last."""
    named = [s.partition("=")[2] for s in sets if s.partition("=")[0] == "model"]
    return named[-1] if named else EMBEDDED


def load_plan(
    schema: type[T], config: str | Path, sets: Sequence[str], data: Path | None, prefix: str = ""
) -> T:
    """A configuration from a YAML file, or from the preset ``prefix + config`` of the model that
    is set, with overrides."""
    given = Path(config)
    path = given if given.suffix else preset(f"{prefix}{config}", _model_of(sets))
    return load_config(schema, path, [*sets, *([f"data.path={data}"] if data else [])])


def load_evaluation(config: Path, sets: Sequence[str] = (), data: Path | None = None) -> AnyPlan:
    """An evaluation's. Raises ``ValueError`` in one line for anything wrong with it."""
    path = config if config.suffix else preset(str(config), _model_of(sets))
    name = read_mapping(path).get("kind", "hop")
    if name not in _KINDS:
        raise ValueError(f"{path}: kind {name!r} is unknown; use one of: {', '.join(_KINDS)}")
    schema: type[AnyPlan] = _KINDS[name]
    return load_plan(schema, path, sets, data)
