"""The public API's three functions: an agent, a guard that fits it, an evaluation.

agent = lcguard.load_agent("nano")
gate = lcguard.load_guard("nano:gate", agent)
safe = gate(agent.read(text), forbid=["health"]).kv
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.commands.script import existing
from lcguard.evaluation.load import load_guard as load_spec
from lcguard.evaluation.plan import GuardSpec
from lcguard.evaluation.presets import load_evaluation
from lcguard.evaluation.run import evaluate as run
from lcguard.guards import FrozenGuard, names


def load_agent(model: str = "nano", device: str | None = None) -> HFBackend:
    """An agent on transformers, which reads texts into KV and answers from KV.

    Args:
        model: ``nano`` (comes with the package), another name of ``lcguard models list``, a model
            folder or a Hugging Face repository.
        device: ``cpu``, ``cuda``, ...; None takes the first GPU where there is one.

    Raises ``ValueError`` in one line where the model cannot be loaded or is not supported.
    """
    return load_backend(model, device)


def load_guard(name: str, agent: HFBackend, **options: Any) -> FrozenGuard:
    """A guard for the agent's KV: ``guard(agent.read(text), forbid=["health"])``.

    Args:
        name: ``nano:gate`` (one that comes with the package), a guard's folder or repository, or
            the registered name of a guard without weights, such as ``redact``.
        options: of a guard without weights, such as ``noise=1.0`` for ``gaussian``; of a saved one
            that replaces values, its ``placeholder``.

    Raises ``ValueError`` for an unknown guard, and for one made for another model or revision.
    """
    known = name in names()
    source = (name, "") if known else ("", name)
    return load_spec(GuardSpec(name, *source, options=options), agent)


def evaluate(
    config: str | Path,
    out: str | Path,
    *,
    sets: Sequence[str] = (),
    data: str | Path | None = None,
    device: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures guards with fresh attackers, as ``lcguard eval run`` does; the report.

    Args:
        config: a YAML file, or the name of a preset such as ``demo`` or ``main``.
        out: folder for journal and reports; a run that was interrupted goes on there.
        sets: overrides such as ``seeds=[0]``.
        data: folder or file of the records, for sources that need one.
        say: told what is being done.

    Raises ``ValueError`` for a configuration that cannot be run, and where ``out`` holds a run
    with another one.
    """
    plan = load_evaluation(Path(config), sets, existing(Path(data) if data is not None else None))
    words = ["lcguard", "eval", "run", str(config), "--out", str(out)]
    words += [word for change in sets for word in ("--set", change)]
    words += ["--data", str(data)] if data is not None else []
    return run(plan, Path(out), shlex.join(words), say, device=device)
