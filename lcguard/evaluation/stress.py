"""``--stress``: the same evaluation with attackers that have far more of everything.

Ten times the steps, decoders twice as wide, and a probe on every single layer: a guard that only
holds against the attackers it is usually shown falls here. The result is an ordinary
configuration, and as such it is written beside the figures.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import AutoConfig

from lcguard.agents.nano.load import model_path
from lcguard.attacks.base import attack_class
from lcguard.evaluation.plan import AttackSpec, EvalConfig, GuardSpec

STEPS, WIDTH = 10, 2


def stressed(config: EvalConfig, layers: int | None = None) -> EvalConfig:
    """``config`` with stronger attackers; ``layers`` is the model's, read from it where not given.

    Raises ``ValueError`` where the attacks are stressed already.
    """
    probe = next((a for a in config.attacks if a.attack == "probe"), None)
    probes = tuple(
        replace(
            probe or AttackSpec("probe", "probe"),
            name=f"probe-layer{i}",
            options={**(probe.options if probe else {}), "layers": [i]},
        )
        for i in range(layers if layers is not None else layers_of(config.model))
    )
    return replace(
        config,
        title=f"{config.title} (stress)",
        attacks=tuple(stronger(a) for a in (*config.attacks, *probes)),
        guards=tuple(_probed(g, config, [p.name for p in probes]) for g in config.guards),
    )


def stronger(spec: AttackSpec) -> AttackSpec:
    """More steps for whatever is fitted by steps, twice the width for what decodes."""
    cls = attack_class(spec.attack)
    options, clean = cls.stressed(spec.options, STEPS, WIDTH), dict(spec.clean_fit)
    if spec.warm and cls.starts_from:
        clean = cls.stressed({"fit": clean}, STEPS, WIDTH)["fit"]
    return replace(spec, options=options, clean_fit=clean)


def layers_of(model: str) -> int:
    """Number of layers, from the model's configuration alone.

    Raises ``ValueError`` in one line where it cannot be read.
    """
    try:
        found = AutoConfig.from_pretrained(str(model_path()) if model == "nano" else model)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"model {model!r}: its layers cannot be counted: {first}") from error
    return int(found.get_text_config().num_hidden_layers)


def _probed(guard: GuardSpec, config: EvalConfig, probes: list[str]) -> GuardSpec:
    """A guard with attacks of its own gets the probes where it had one."""
    kinds = {a.name: a.attack for a in config.attacks}
    if not any(kinds[name] == "probe" for name in guard.attacks):
        return guard
    return replace(guard, attacks=(*guard.attacks, *probes))
