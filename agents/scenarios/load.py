"""Hops from any source, for the command line and the scripts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lcguard.agents.scenarios.agentleak import read_agentleak
from lcguard.agents.scenarios.forms import NOTE, check_forms
from lcguard.agents.scenarios.generator import GeneratorConfig, make_scenario
from lcguard.agents.scenarios.jsonl import read_jsonl
from lcguard.agents.scenarios.magpie import read_magpie
from lcguard.agents.scenarios.privacylens import read_privacylens
from lcguard.agents.scenarios.schema import RECORD_TYPES
from lcguard.agents.scenarios.types import Hop, Scenario, hops_of
from lcguard.agents.scenarios.values import SPLITS
from lcguard.nearest import unknown

Source = Literal["generator", "agentleak", "privacylens", "magpie", "jsonl"]
SOURCES: tuple[Source, ...] = get_args(Source)
_READERS: dict[str, Callable[[Any], list[Scenario]]] = {
    "agentleak": read_agentleak,
    "privacylens": read_privacylens,
    "magpie": read_magpie,
    "jsonl": read_jsonl,
}


def load_hops(
    source: Source,
    *,
    path: Path | None = None,
    seed: int = 0,
    split: str = "test",
    n: int | None = None,
    min_fields: int = GeneratorConfig.min_fields,
    max_fields: int = GeneratorConfig.max_fields,
    forms: Sequence[str] = (NOTE,),
) -> list[Hop]:
    """The hops of a source's scenarios.

    ``n`` is the number of scenarios: how many the generator makes, or how many are drawn from a
    file (None: all; drawn by ``seed``, kept in the file's order). ``split``, ``forms`` and the
    field counts are the generator's; ``path`` is the file's (benchmarks: LCGUARD_DATA).

    Raises ``ValueError`` for an unknown source or split, a missing ``n`` or ``path``, counts out
    of range, and whatever the readers refuse.
    """
    if source not in SOURCES:
        raise ValueError(unknown("source", source, SOURCES))
    if n is not None and n < 1:
        raise ValueError(f"n = {n}: ask for at least one scenario")
    if source == "generator":
        if n is None:
            raise ValueError("the generator never ends; pass n, the number of scenarios")
        most = min(len(kind.fields) for kind in RECORD_TYPES)
        if not 2 <= min_fields <= min(max_fields, most):
            raise ValueError(
                f"min_fields = {min_fields}, max_fields = {max_fields}: use 2 <= min <= max and a "
                f"min of at most {most}, what the smallest record type has"
            )
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
        check_forms(forms)
        config = GeneratorConfig(seed, split, min_fields, max_fields, forms=tuple(forms))
        return hops_of(make_scenario(config, i) for i in range(n))
    if source == "jsonl" and path is None:
        raise ValueError("source 'jsonl' reads your own file; pass its path")
    scenarios = _READERS[source](path)
    if n is None or n >= len(scenarios):
        return hops_of(scenarios)
    drawn = random.Random(f"load/{seed}").sample(range(len(scenarios)), n)
    return hops_of(scenarios[i] for i in sorted(drawn))


def split_hops(
    hops: Sequence[Hop], train_share: float = 0.5, seed: int = 0
) -> tuple[list[Hop], list[Hop]]:
    """Two disjoint parts, by scenario: hops of one scenario share people and policy.

    Raises ``ValueError`` where the share is not between 0 and 1 or there are fewer than two
    scenarios to divide.
    """
    if not 0 < train_share < 1:
        raise ValueError(f"train_share = {train_share}: use a share between 0 and 1")
    names = sorted({h.scenario_id for h in hops})
    if len(names) < 2:
        raise ValueError(f"{len(names)} scenario(s) cannot be split in two; load more")
    random.Random(f"split/{seed}").shuffle(names)
    wanted = round(train_share * len(names))
    train = set(names[: min(max(wanted, 1), len(names) - 1)])
    return (
        [h for h in hops if h.scenario_id in train],
        [h for h in hops if h.scenario_id not in train],
    )
