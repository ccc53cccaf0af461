"""The whole evaluation on other architectures: tiny random models, saved and loaded by path.

Nothing here is the nano agent's but its tokenizer. The budgets are too small for figures; what is
asserted is that attacks read raw KV, that redaction stops them, and that no guard of another
model is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lcguard.agents.backends.hf import load_backend
from lcguard.attacks.base import names
from lcguard.categories import CATEGORIES
from lcguard.evaluation.plan import AttackSpec, DataConfig, EvalConfig, GuardSpec
from lcguard.evaluation.run import evaluate, load
from lcguard.guards import FrozenGuard, KVShape, guard_class
from tests.fixtures import World, tiny_model
from tests.matrix import ATTACKS, GUARDS

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {},
    "gemma2": {"sliding_window": 1024},  # as long as any context here
}
TRAINED = ("residual", "gate")
NOT_LISTED = {"injection": "the evaluation runs it beside the first attack of each guard"}
ON_EVERY_GUARD = ("probe", "decoder")
"""The others on raw KV alone, or the test would take minutes."""
SHORTER: dict[str, dict[str, Any]] = {
    "decoder": {"width": 32, "max_tokens": 12, "fit": {"steps": 12, "batch": 16}},
    "probe": {"width": 96, "fit": {"steps": 160, "batch": 256, "lr": 4e-3, "warmup": 5}},
    "composition": {"width": 32, "max_tokens": 12, "fit": {"steps": 12, "batch": 16}},
    "collision": {"max_records": 1, "calibration": 2},
    "gauss_newton": {"max_records": 1},
    "gradient_prediction": {"records": 16, "steps": 20},
    "trigger": {
        "length": 1,
        "max_perplexity": 5000.0,
        "rounds": 1,
        "candidates": 2,
        "records": 8,
        "width": 48,
        "fit": {"steps": 40, "batch": 256, "warmup": 5},
    },
}
LISTED = [*ON_EVERY_GUARD, *sorted(set(names()) - {*ON_EVERY_GUARD, *NOT_LISTED})]


@dataclass(frozen=True)
class Run:
    config: EvalConfig
    report: dict[str, Any]

    def row(self, guard: str) -> dict[str, Any]:
        return next(r for r in self.report["results"] if r["guard"] == guard)


def save_model(folder: Path, kind: str, world: World, **changes: Any) -> str:
    tiny_model(kind, **(MODELS[kind] | changes)).save_pretrained(folder)
    world.tokenizer.save_pretrained(folder)
    return str(folder)


def save_guards(folder: Path, model: str, world: World) -> tuple[GuardSpec, ...]:
    """Guards as initialised, with the model's channel statistics, bound to its weights."""
    backend = load_backend(model, "cpu")
    raw = backend.source.prefill([r.ids for r in world.records[:32]])
    specs = []
    for name in TRAINED:
        torch.manual_seed(0)
        shape = KVShape(*backend.source.shape)
        module = guard_class(name).build(shape, len(CATEGORIES), GUARDS[name])
        module.fit_statistics(raw)
        FrozenGuard(module).with_card(model_digest=backend.digest).save_pretrained(folder / name)
        specs.append(GuardSpec(name, path=str(folder / name), attacks=ON_EVERY_GUARD))
    return tuple(specs)


@pytest.fixture(scope="module", params=MODELS)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, world: World
) -> Run:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_model(folder / "model", request.param, world)
    config = EvalConfig(
        title=request.param,
        model=model,
        data=DataConfig(seed=7, train_records=64, test_records=16, min_fields=2, max_fields=3),
        guards=(
            GuardSpec("identity", guard="identity"),
            GuardSpec("gaussian", guard="gaussian", options={"noise": 1.0}, attacks=ON_EVERY_GUARD),
            GuardSpec("redact", guard="redact", attacks=ON_EVERY_GUARD),
            *save_guards(folder, model, world),
        ),
        attacks=tuple(
            AttackSpec(name, name, SHORTER.get(name, ATTACKS.get(name, {}))) for name in LISTED
        ),
        broken_at=None,
        explain=0,
    )
    return Run(config, evaluate(config, folder / "run", "test", print, device="cpu"))


def test_report_has_every_guard_and_attack(run: Run) -> None:
    assert [r["guard"] for r in run.report["results"]] == [g.name for g in run.config.guards]
    for spec in run.config.guards:
        row, attacks = run.row(spec.name), spec.attacks or LISTED
        assert set(row["asr_fresh_by_attack"]) == set(attacks) - {"likelihood"}
        assert bool(row["likelihood"]) == ("likelihood" in attacks)
        assert row["asr_injection"] is not None
        assert row["utility"] is not None
        assert row["counts"]["error"] == 0
        tried, secrets = sum(row["counts"].values()), run.report["data"]["secrets"]
        # slow attacks look at a few records alone
        assert tried >= len(ON_EVERY_GUARD) * secrets > 0
        if spec.attacks:
            assert tried == len(ON_EVERY_GUARD) * secrets


def test_raw_kv_is_read_and_redacted_kv_is_not(run: Run) -> None:
    raw = run.row("identity")["asr_fresh_by_attack"]["probe"]
    floor = run.row("identity")["floor"]
    assert raw["asr"] > floor + 0.3
    redacted = run.row("redact")["asr_fresh_by_attack"]["probe"]
    assert redacted["asr"] <= floor + 0.1
    assert redacted["token_accuracy"] < raw["token_accuracy"] / 2


def test_a_guard_of_another_model_is_refused(run: Run, tmp_path: Path, world: World) -> None:
    """The same architecture and shape, other weights."""
    assert load_backend(run.config.model, "cpu").source.config.model_type == run.config.title
    other = save_model(tmp_path / "other", run.config.title, world, initializer_range=0.2)
    for name in TRAINED:
        spec = next(g for g in run.config.guards if g.name == name)
        with pytest.raises(ValueError, match=r"was made for model weights .* train a guard for"):
            load(replace(run.config, model=other, guards=(spec,)), lambda text: None, "cpu")
