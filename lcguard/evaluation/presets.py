"""Configurations by file or by the name of a shipped preset, of the kind that the file says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from lcguard.config import load_config, read_mapping
from lcguard.evaluation.multihop_plan import MultihopConfig
from lcguard.evaluation.plan import EvalConfig

T = TypeVar("T")
PRESETS = Path(__file__).parent.parent / "agents" / "nano" / "presets"
AnyPlan = EvalConfig | MultihopConfig
_KINDS: dict[str, type[EvalConfig] | type[MultihopConfig]] = {
    "hop": EvalConfig,
    "multihop": MultihopConfig,
}


def preset(name: str) -> Path:
    """A configuration shipped with the nano agent. Raises ``ValueError`` naming those there are."""
    path = PRESETS / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ValueError(f"preset {name!r} is unknown; shipped: {known}")
    return path


def load_plan(
    schema: type[T], config: str | Path, sets: Sequence[str], data: Path | None, prefix: str = ""
) -> T:
    """A configuration from a YAML file, or from the preset ``prefix + config``, with overrides."""
    path = Path(config) if Path(config).suffix else preset(f"{prefix}{config}")
    return load_config(schema, path, [*sets, *([f"data.path={data}"] if data else [])])


def load_evaluation(config: Path, sets: Sequence[str] = (), data: Path | None = None) -> AnyPlan:
    """An evaluation's. Raises ``ValueError`` in one line for anything wrong with it."""
    path = config if config.suffix else preset(str(config))
    name = read_mapping(path).get("kind", "hop")
    if name not in _KINDS:
        raise ValueError(f"{path}: kind {name!r} is unknown; use one of: {', '.join(_KINDS)}")
    schema: type[AnyPlan] = _KINDS[name]
    return load_plan(schema, path, sets, data)
