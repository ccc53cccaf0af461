"""Training: what it refuses, that it learns, and that a killed run ends in the same weights."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lcguard.attacks.decoder import DecoderAttack
from lcguard.categories import CATEGORIES
from lcguard.commands.train import TrainRun, adversary_factory, run_training
from lcguard.evaluation.plan import DataConfig
from lcguard.guards.base import guard_class
from lcguard.guards.frozen import FrozenGuard, weights_digest
from lcguard.records import pack_questions, value_labels
from lcguard.training import trainer
from lcguard.training.checkpoint import read_meta
from lcguard.training.config import AdversaryConfig, TrainConfig
from lcguard.training.dataset import with_policy
from lcguard.training.label_loss import closing_loss
from lcguard.training.objective import answer_weights
from lcguard.training.schedule import Phase
from lcguard.training.trainer import Run, train_guard
from tests.fixtures import World
from tests.matrix import ATTACKS, GUARDS

TRAINED = [n for n in GUARDS if guard_class(n).trained]
SMALL: dict[str, Any] = {
    "steps": 5,
    "batch": 6,
    "questions": 2,
    "checkpoint_every": 2,
    "leak_ramp": 2,
    "warmup": 2,
}


def adversary(**changes: Any) -> AdversaryConfig:
    options = {k: v for k, v in ATTACKS["decoder"].items() if k != "fit"}
    wanted: dict[str, Any] = {"count": 2, "weight": 0.5, "options": options}
    return AdversaryConfig(**(wanted | changes))


CONFIGS = {
    "gate": TrainConfig("gate", GUARDS["gate"], **SMALL),
    "regress": TrainConfig("regress", GUARDS["regress"], pair_weight=0, twin_weight=1, **SMALL),
    "residual-ce": TrainConfig(
        "residual", GUARDS["residual"], pair_weight=0, adversary=adversary(lag=2), **SMALL
    ),
    "residual-kl": TrainConfig(
        "residual",
        GUARDS["residual"],
        pair_weight=0,
        adversary=adversary(objective="kl_prior", lag=2, reset_every=3),
        **SMALL,
    ),
    "gate-probe": TrainConfig(
        "gate",
        GUARDS["gate"],
        hard_steps=3,
        label_steps=1,
        adversary=AdversaryConfig(
            count=1,
            weight=0.5,
            objective="kl_prior",
            attack="probe",
            options={"width": 16, "fit": {"lr": 0.01}},
        ),
        **SMALL,
    ),
    "gate-schedule": TrainConfig(
        "gate",
        GUARDS["gate"],
        schedule=(
            Phase(share=0.4, lr=1e-3, pair_weight=0.5),
            Phase(share=0.6, average=True, noise=0.15),
            Phase(share=0, noise=0.2),
        ),
        **SMALL,
    ),
    "gate-options": TrainConfig(
        "gate",
        GUARDS["gate"],
        teacher="twin",
        uncertain_nats=0.1,
        rare_strength=0.5,
        trace_weight=0.2,
        trace_noise=0.5,
        category_weight=0.1,
        rollback_every=1,
        rollback_slack=0.0,
        adversary=adversary(count=1, objective="least_squares"),
        **SMALL,
    ),
    "gate-all": TrainConfig(
        "gate",
        GUARDS["gate"],
        twin_weight=0.1,
        adversary=adversary(count=1, reset_every=2),
        label_steps=2,
        optimizer="muon",
        ema=0.5,
        **SMALL,
    ),
}


def train(world: World, config: TrainConfig, out: Path) -> Run:
    factory, hard = adversary_factory(config.adversary.attack), world.records[:20]
    return train_guard(
        config,
        world.records,
        world.source,
        world.special,
        out,
        factory,
        progress=False,
        hard=hard if config.hard_steps else (),
    )


def state_of(run: Run) -> dict[str, torch.Tensor]:
    """Guard and attackers together."""
    modules = {"guard": run.guard.module, **run.ensemble.modules()}
    return {f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_every_trained_guard_is_trained_here() -> None:
    # but for those with a training of their own (test_detect.py, test_single_pass.py)
    assert {c.guard for c in CONFIGS.values()} == set(TRAINED) - {"twin", "trace_gate", "kveraser"}


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Uninterrupted runs, made when asked for."""

    class Runs(dict[str, Run]):
        def __missing__(self, name: str) -> Run:
            self[name] = train(world, CONFIGS[name], tmp_path_factory.mktemp(name))
            return self[name]

    return Runs()


def make_adversary(options: dict[str, Any]) -> DecoderAttack:
    return DecoderAttack.build(options)


class Killed(Exception):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = trainer.Trainer.step

    def dying(self: trainer.Trainer, at: int) -> dict[str, float]:
        if at == step:
            raise Killed
        return real(self, at)

    monkeypatch.setattr(trainer.Trainer, "step", dying)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_killed_run_ends_in_the_same_weights(
    world: World, whole: dict[str, Run], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, attackers and figures included; from the checkpoint of step 4, not of step 2."""
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        train(world, CONFIGS[name], tmp_path)
    assert read_meta(tmp_path / "checkpoint.safetensors")["step"] == 4
    monkeypatch.undo()
    torch.manual_seed(999)  # another process
    again = train(world, CONFIGS[name], tmp_path)
    assert same(state_of(again), state_of(whole[name]))
    assert again.metrics == whole[name].metrics
    assert [row["step"] for row in again.metrics] == list(range(5))
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == again.metrics
    untrained = trainer.make_module(CONFIGS[name], world.source)
    assert weights_digest(untrained) != weights_digest(again.guard.module)


def test_sigkill_while_writing_a_checkpoint(
    world: World, whole: dict[str, Run], tmp_path: Path
) -> None:
    """The kernel ends the process between a checkpoint's bytes and its name."""
    expected = state_of(whole["gate"])
    child = os.fork()
    if child == 0:
        real, calls = os.replace, []

        def die(*args: Any) -> None:
            calls.append(Path(args[0]).name)
            if calls.count("checkpoint.part") == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        try:
            os.replace = die  # type: ignore[assignment]
            train(world, CONFIGS["gate"], tmp_path)
        finally:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert read_meta(tmp_path / "checkpoint.safetensors")["step"] == 2
    assert (tmp_path / "checkpoint.part").exists()
    assert same(state_of(train(world, CONFIGS["gate"], tmp_path)), expected)


def test_another_seed_is_another_guard(world: World, whole: dict[str, Run], tmp_path: Path) -> None:
    other = train(world, replace(CONFIGS["gate"], seed=1, steps=1), tmp_path)
    assert not same(state_of(other), state_of(whole["gate"]))


def test_the_result_is_frozen(whole: dict[str, Run]) -> None:
    guard = whole["gate"].guard
    assert isinstance(guard, FrozenGuard)
    assert guard.card.options == whole["gate"].guard.module.options()
    assert not guard.module.training
    assert not any(p.requires_grad for p in guard.module.parameters())


@pytest.mark.parametrize("change", [{"lr": 1e-4}, {"options": {**GUARDS["gate"], "width": 64}}])
def test_a_checkpoint_of_another_configuration_is_refused(
    world: World, change: dict[str, Any], tmp_path: Path
) -> None:
    train(world, replace(CONFIGS["gate"], steps=2), tmp_path)
    with pytest.raises(ValueError, match="belongs to another configuration"):
        train(world, replace(CONFIGS["gate"], steps=2, **change), tmp_path)


@pytest.mark.parametrize("name", sorted(set(GUARDS) - set(TRAINED)))
def test_guards_without_parameters_are_refused(world: World, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"guard '{name}' has nothing to train"):
        train(world, TrainConfig(name, **SMALL), tmp_path)


def test_impossible_configurations_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a factory"):
        train_guard(CONFIGS["residual-ce"], world.records, world.source, world.special, tmp_path)
    with pytest.raises(ValueError, match="without attackers: set adversary"):
        TrainConfig(adversary=AdversaryConfig(weight=1.0))
    with pytest.raises(ValueError, match="tail_share=0 must be above 0 and at most 1"):
        TrainConfig(tail_share=0)
    with pytest.raises(ValueError, match="steps=-1 must be at least 0"):
        TrainConfig(steps=-1)
    with pytest.raises(ValueError, match="without noise the pair leak is infinite"):
        train(world, TrainConfig("residual", GUARDS["residual"], **SMALL), tmp_path)
    with pytest.raises(ValueError, match="'regress' has no gates to label; set label_steps to 0"):
        train(world, replace(CONFIGS["regress"], label_steps=1), tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(world: World, tmp_path: Path) -> None:
    config = replace(CONFIGS["gate"], ce_weight=float("nan"))
    with pytest.raises(ValueError, match="loss is nan at step 0; lower lr"):
        train(world, config, tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_run_without_warm_up(world: World, tmp_path: Path) -> None:
    assert train(world, replace(CONFIGS["gate"], warmup=0, steps=1), tmp_path).metrics


def test_an_average_without_steps_is_made_of_two_guards(tmp_path: Path) -> None:
    """Weights lie between the two; the noise is the run's own; without a guard it is refused."""
    small = DataConfig(train_records=8, test_records=8)
    options = {"noise": 0.3, "width": 96, "blocks": 2, "words": 8}
    train = TrainConfig("gate", options, steps=0, certificate_pairs=8)
    run = TrainRun("nano", small, "nano:gate", 0.75, "nano:gate-full", train)
    run_training(run, tmp_path / "a", "test")
    made, first, other = (
        FrozenGuard.from_pretrained(p)
        for p in (
            tmp_path / "a" / "guard",
            "nano:gate",
            "nano:gate-full",
        )
    )
    assert made.module.config.noise == 0.3
    parts = zip(*(g.module.state_dict().values() for g in (made, first, other)), strict=True)
    for mixed, one, two in parts:
        torch.testing.assert_close(mixed, 0.75 * one + 0.25 * two)
    with pytest.raises(ValueError, match="steps=0 trains nothing"):
        run_training(replace(run, init="", average_with=""), tmp_path / "b", "test")
    wider = replace(run, train=replace(train, options=options | {"width": 64}))
    with pytest.raises(ValueError, match="the run wants"):
        run_training(wider, tmp_path / "b", "test")
    assert not (tmp_path / "b").exists()


def test_gates_are_taught_to_open_on_values_of_other_categories(world: World) -> None:
    records = [r for r in world.records if len({s.category for s in r.spans} - {None}) > 1][:4]
    tokens = max(len(r.ids) for r in records)
    own = torch.zeros(len(records), tokens, len(CATEGORIES), 2, 2, 2, requires_grad=True)
    (closing,) = torch.autograd.grad(closing_loss(own, records), own)
    (both,) = torch.autograd.grad(closing_loss(own, records, 0.5), own)
    value = value_labels(records, own).bool()
    others = value.any(2, keepdim=True) & ~value
    assert bool((closing[value][:, 0] < 0).all())
    assert not bool(closing[others].any())
    assert bool((both[others][:, 0] > 0).all())
    torch.testing.assert_close(both[value], closing[value])
    assert not bool(both[~value.any(2)].any())  # outside values the pair leak says


def test_answers_of_secret_categories_have_weights_of_their_own(world: World) -> None:
    config = TrainConfig(band_weight=3.0, allowed_weight=2.0)
    records = with_policy(world.records, ("health", "finance"), ("health", "finance"))
    packed = pack_questions(records)
    weight = answer_weights(records, packed.labels, packed.block, config)
    expected = [
        1.0 if q.category is None else 3.0 if q.category in r.forbid else 2.0
        for r in records
        for q in r.questions
        for _ in q.answer
    ]
    assert set(expected) == {1.0, 2.0, 3.0}
    assert weight.tolist() == expected


def test_a_run_ends_with_the_running_average_of_its_weights(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    step = trainer.Trainer.step

    def watched(self: trainer.Trainer, at: int) -> dict[str, float]:
        row = step(self, at)
        seen.append({k: v.detach().clone() for k, v in self.module.named_parameters()})
        return row

    monkeypatch.setattr(trainer.Trainer, "step", watched)
    run = train(world, replace(CONFIGS["gate"], ema=0.75), tmp_path)
    expected = seen[0]
    for weights in seen[1:]:
        expected = {k: 0.75 * v + 0.25 * weights[k] for k, v in expected.items()}
    for name, value in run.guard.module.named_parameters():
        torch.testing.assert_close(value, expected[name])
    assert any(not torch.equal(seen[-1][k], v) for k, v in expected.items())
