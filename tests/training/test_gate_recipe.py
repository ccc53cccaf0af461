"""The table of the gate's recipe: what its rows train and on what they are measured."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from lcguard.commands.train import TrainRun
from lcguard.evaluation.presets import load_plan

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_gate_recipe.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gate_recipe", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runs(bench: ModuleType) -> dict[str, TrainRun]:
    return {
        name: load_plan(TrainRun, "gate-recipe", sets, None, prefix="train-")
        for name, sets in bench.ROWS.items()
        if sets is not None
    }


def test_seeds_of_the_recipe_differ_in_the_seed_alone(bench: ModuleType) -> None:
    recipe = [r for name, r in runs(bench).items() if name.startswith("recipe")]
    assert [r.train.seed for r in recipe] == [0, 1, 2]
    assert len({repr(replace(r, train=replace(r.train, seed=0))) for r in recipe}) == 1
    assert not recipe[0].init
    assert recipe[0].train.averages


def test_every_option_stands_beside_the_same_run_without_it(bench: ModuleType) -> None:
    made = runs(bench)
    base = made["a sixth of the steps"]
    options = [r for name, r in made.items() if name.startswith("+ ")]
    assert len({repr(r) for r in (base, *options)}) == 7
    for run in options:
        assert (run.data, run.init, run.train.seed) == (base.data, base.init, base.train.seed)
        assert (run.train.steps, run.train.batch) == (base.train.steps, base.train.batch)
        assert run.train.schedule == base.train.schedule


def test_it_is_measured_on_records_of_another_seed(bench: ModuleType) -> None:
    plan = bench.evaluation()
    assert [a.name for a in plan.attacks] == list(bench.EVALUATION[1])
    for run in runs(bench).values():  # the second is that of its held-out records
        assert plan.data.seed not in (run.data.seed, run.data.seed + 1)
        assert plan.data.seed + 1 not in (run.data.seed, run.data.seed + 1)
