"""Training: what it refuses, that it learns, and that a killed run ends in the same weights."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lcguard.attacks.decoder import DecoderAttack
from lcguard.categories import CATEGORIES, DERIVABLE
from lcguard.commands.train import TrainRun, adversary_factory, run_training
from lcguard.evaluation.plan import DataConfig
from lcguard.guards.base import GuardModule, KVShape, guard_class
from lcguard.guards.frozen import FrozenGuard, weights_digest
from lcguard.guards.gate import GateGuard
from lcguard.protocols import KVBatch
from lcguard.records import TokenRecord, masks, pack_questions, value_labels
from lcguard.training import checkpoint as checkpoint_module
from lcguard.training import prepare, trainer
from lcguard.training.adversary import Ensemble, FieldPrior
from lcguard.training.certificate import pair_leaks
from lcguard.training.checkpoint import load_checkpoint, read_meta, save_checkpoint
from lcguard.training.config import AdversaryConfig, PolicyMix, TrainConfig
from lcguard.training.dataset import attack_data, guard_all, with_policy
from lcguard.training.label_loss import closing_loss
from lcguard.training.objective import answer_weights
from lcguard.training.schedule import Phase
from lcguard.training.shards import ALONE
from lcguard.training.steps import draw_batch, permitted, sample_policy
from lcguard.training.trainer import Run, train_guard
from lcguard.training.twins import ValuePool, fixed_length_twin, neutral_twin
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
    # but for twin, whose detector has a training of its own (test_guard_twin.py, test_detect.py)
    assert {c.guard for c in CONFIGS.values()} == set(TRAINED) - {"twin"}


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


# -- what it learns


def leak(world: World, module: GuardModule) -> float:
    """Nats per pair on records that nothing was fitted on."""
    module.eval()
    values = pair_leaks(module, world.others, ValuePool(world.others), world.source, seed=3)
    return sum(values) / len(values)


def leak_alone(**settings: Any) -> TrainConfig:
    """A gate that is trained on little but a leak."""
    return TrainConfig(
        "gate",
        {**GUARDS["gate"], "noise": 0.3},
        batch=8,
        questions=2,
        lr=1e-2,
        warmup=2,
        leak_ramp=1,
        gate_weight=0.0,
        kl_weight=0.1,
        ce_weight=0.0,
        policies=PolicyMix(all_rate=1.0, none_rate=0.0),
        **settings,
    )


def test_gate_training_removes_the_pair_leak(world: World, tmp_path: Path) -> None:
    """Held out, against an untrained gate and against noise of the same size alone."""
    config = leak_alone(steps=90, pair_weight=1.0)
    run = train(world, config, tmp_path)
    shape = KVShape(*world.source.shape)
    skipped = guard_class("gaussian").build(shape, len(CATEGORIES), {"noise": 0.3})
    skipped.fit_statistics(world.source.prefill([r.ids for r in world.records]))
    untrained = trainer.make_module(config, world.source)
    prepare.prepare(untrained, world.records, world.source, world.special, ValuePool(world.records))
    before, after, none = (leak(world, m) for m in (untrained, run.guard.module, skipped))
    assert after < 0.1 * before
    assert after < 0.1 * none
    assert before > 0.3 * none
    first, last = run.metrics[0]["pair_nats"], run.metrics[-1]["pair_nats"]
    assert last < 0.1 * first


def test_the_tail_is_the_mean_of_the_worst() -> None:
    leaks = torch.tensor([0.0, 8.0, 1.0, 3.0, 2.0], requires_grad=True)
    assert ALONE.worst_mean(leaks, 0.4) == 5.5
    assert ALONE.worst_mean(leaks, 0.6) == ALONE.worst_mean(leaks, 0.5) == (8.0 + 3.0 + 2.0) / 3
    assert ALONE.worst_mean(leaks, 1.0) == leaks.mean()
    assert ALONE.worst_mean(leaks, 0.01) == 8.0
    ALONE.worst_mean(leaks, 0.4).backward()
    assert leaks.grad is not None
    assert leaks.grad.tolist() == [0.0, 0.5, 0.0, 0.5, 0.0]  # the others are left alone


def test_training_on_the_tail_of_single_secrets(world: World, tmp_path: Path) -> None:
    """The term alone closes what single secrets leak, and of a path as of one hop."""
    config = leak_alone(steps=60, pair_weight=0.0, tail_weight=1.0)
    rows = train(world, config, tmp_path / "a").metrics
    assert "pair_nats" not in rows[0]
    assert rows[-1]["tail_nats"] < 0.2 * rows[0]["tail_nats"]
    path = replace(config, steps=1, path_hops=2)
    assert train(world, path, tmp_path / "b").metrics[0]["tail_nats"] > 1


def test_regress_training_nears_the_twin(world: World, tmp_path: Path) -> None:
    config = replace(
        CONFIGS["regress"],
        steps=25,
        batch=8,
        lr=5e-3,
        kl_weight=0.0,
        ce_weight=0.0,
        gate_weight=0.0,
        policies=PolicyMix(all_rate=1.0, none_rate=0.0),
    )
    errors = [row["twin_mse"] for row in train(world, config, tmp_path).metrics]
    assert sum(errors[-5:]) < 0.7 * sum(errors[:5])


def test_labels_teach_each_gate_its_category(world: World, tmp_path: Path) -> None:
    """Held out: values of a category are withheld where it is forbidden, and little else."""
    config = TrainConfig(
        "gate",
        GUARDS["gate"],
        steps=80,
        label_steps=80,
        batch=12,
        lr=1e-2,
        warmup=2,
        checkpoint_every=80,
    )
    run = train(world, config, tmp_path)
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    shares = {}
    for forbid in (("person",), tuple(c for c in CATEGORIES if c != "person")):
        records = with_policy(world.others, forbid)
        raw = world.source.prefill([r.ids for r in records])
        withheld = run.guard(raw, masks(records)).withheld
        for own in (True, False):
            at = [
                withheld[i, s.start : s.end]
                for i, r in enumerate(records)
                for s in r.spans
                if (s.category == "person") == own and s.category is not None
            ]
            shares[len(forbid) == 1, own] = float(torch.cat(at).mean())
    # before, the two are alike
    assert shares[True, True] > 2 * shares[True, False]
    assert shares[False, False] > 1.5 * shares[False, True]


def test_codebook_starts_at_placeholders(world: World) -> None:
    """Constants that the receiver reads as tokens, not as noise."""
    module = trainer.make_module(CONFIGS["gate"], world.source)
    assert isinstance(module, GateGuard)
    random_words = module.codebook.detach().clone()
    prepare.prepare(module, world.records, world.source, world.special, ValuePool(world.records))
    fill = world.source.prefill([(world.special.neutral_id,) * 4])
    torch.testing.assert_close(module.codebook[0], module.standardise(fill)[0, 3])
    assert not torch.allclose(module.codebook, random_words, atol=0.1)


def banded(records: Sequence[TokenRecord], pool: ValuePool, words: int) -> list[Any]:
    """(record, span, word) of every secret whose band has a word."""
    return [
        (i, s, w)
        for i, r in enumerate(records)
        for s in r.spans
        if s.category is not None and (w := pool.word(s, words)) is not None
    ]


def test_words_are_dealt_to_bands(world: World) -> None:
    pool = ValuePool(world.records)
    assert pool.bands
    assert {c for c, _ in pool.bands} <= set(DERIVABLE)
    words = {(s.category, s.band): w for _, s, w in banded(world.records, pool, 32)}
    assert sorted(words.values()) == [1 + pool.bands.index(b) for b in sorted(words)]
    assert {w for _, _, w in banded(world.records, pool, 2)} == {1}
    assert banded(world.records, pool, 1) == []


def test_words_of_bands_start_at_the_mean_of_their_values(world: World) -> None:
    pool = ValuePool(world.records)
    raw = world.source.prefill([r.ids for r in world.records])
    z = torch.randn(len(world.records), raw.keys.shape[3], 2, 2, 32)
    book = torch.zeros(40, 2, 2, 32)
    made = prepare.band_means(z, world.records, pool, book)
    found = banded(world.records, pool, 40)
    word = found[0][2]
    mine = [z[i, s.start : s.end] for i, s, w in found if w == word]
    torch.testing.assert_close(made[word], torch.cat(mine).mean(0))
    assert torch.equal(made[0], book[0])
    assert float(book.abs().max()) == 0  # the book given is not changed


def test_labels_teach_the_words_of_bands(world: World, tmp_path: Path) -> None:
    options = {**GUARDS["gate"], "words": 9}
    config = TrainConfig(
        "gate", options, steps=60, label_steps=60, batch=12, lr=1e-2, warmup=2, checkpoint_every=60
    )
    pool = ValuePool(world.records)
    raw = world.source.prefill([r.ids for r in world.records])

    def right(module: GuardModule) -> float:
        out = module.rewrite(module.standardise(raw), raw.valid, masks(world.records))
        assert out.words is not None
        said = out.words.argmax(-1)
        hits = [
            said[i, s.start : s.end, CATEGORIES.index(s.category)] == w
            for i, s, w in banded(world.records, pool, 9)
        ]
        return float(torch.cat(hits).float().mean())

    untrained = trainer.make_module(config, world.source)
    prepare.prepare(untrained, world.records, world.source, world.special, pool)
    assert right(train(world, config, tmp_path).guard.module) > max(0.6, 1.5 * right(untrained))


def test_batches_are_of_like_length_and_all_records_come(world: World) -> None:
    records = sorted(world.records, key=lambda r: len(r.ids)) * 8
    records = sorted(records, key=lambda r: len(r.ids))
    rng = random.Random(0)
    seen, spread = set(), []
    for _ in range(300):
        batch = draw_batch(rng, records, 4)
        assert len(batch) == 4
        lengths = [len(r.ids) for r in batch]
        spread.append(max(lengths) - min(lengths))
        seen |= {r.record_id for r in batch}
    assert seen == {r.record_id for r in records}
    whole = len(records[-1].ids) - len(records[0].ids)
    assert sum(spread) / len(spread) < whole / 3
    assert len(draw_batch(rng, records[:3], 8)) == 3


# -- adversaries


def ensemble(world: World, **changes: Any) -> Ensemble:
    records = world.records[:40]
    pairs = attack_data(records, world.source.prefill([r.ids for r in records]), world.special)
    return Ensemble(adversary(**changes), make_adversary, pairs, seed=0)


def test_every_attacker_is_reset_in_turn(world: World) -> None:
    """Also where resets fall on steps that the lag leaves out."""
    team = ensemble(world, lag=2, reset_every=3)
    batch = team._pairs.subset(range(4))
    nets = [m.network for m in team.members]
    fresh: list[int] = []
    for step in range(13):
        learned = team.learn(batch, step)
        assert bool(learned) == (step % 2 == 0)
        now = [m.network for m in team.members]
        fresh += [i for i, (a, b) in enumerate(zip(nets, now, strict=True)) if a is not b]
        nets = now
    assert fresh == [1, 0, 1, 0]


def test_attackers_differ_and_learn(world: World) -> None:
    team = ensemble(world)
    first, second = (weights_digest(m.network) for m in team.members)
    assert first != second
    batch = team._pairs.subset(range(8))
    losses = [team.learn(batch, step)["attacker_nats"] for step in range(12)]
    assert losses[-1] < losses[0]


def test_guard_term_rewards_what_the_attackers_lose(world: World) -> None:
    team = ensemble(world, weight=0.5)
    batch = team._pairs.subset(range(6))
    loss = sum(m.loss(batch, auxiliary=False) for m in team.members) / 2
    torch.testing.assert_close(team.guard_term(batch), -0.5 * torch.as_tensor(loss))
    keys = batch.kv.keys.clone().requires_grad_()
    term = team.guard_term(batch.with_kv(KVBatch(keys, batch.kv.values, batch.kv.valid)))
    term.backward()
    assert keys.grad is not None
    assert float(keys.grad.abs().sum()) > 0


def test_prior_divergence_is_zero_at_the_prior(world: World) -> None:
    team = ensemble(world, objective="kl_prior")
    prior = FieldPrior(team._pairs, team.members[0].fields)
    torch.testing.assert_close(prior.table.sum(-1), torch.ones(prior.table.shape[:2]))
    fields, labels, logp = team.members[0].log_probs(team._pairs.subset(range(6)))
    at = torch.arange(labels.shape[1]).clamp_max(7)
    own = prior.table[fields[:, None], at[None]].log()
    assert float(prior.divergence(fields, labels, own)) == pytest.approx(0, abs=1e-4)
    assert float(prior.divergence(fields, labels, logp).detach()) > 0.1
    nothing = attack_data(with_policy(world.records[:3], ()), team._pairs.kv[:3], world.special)
    assert float(team.guard_term(nothing).detach()) == 0


# -- policies and data


def test_policies_are_drawn_as_configured() -> None:
    rng = random.Random(0)
    mix = PolicyMix(all_rate=0.4, none_rate=0.1, derive_rate=0.25)
    drawn = [sample_policy(rng, mix) for _ in range(4000)]
    everything = sum(set(f) == set(CATEGORIES) for f, _ in drawn) / 4000
    assert 0.36 < everything < 0.45
    assert 0.08 < sum(not f for f, _ in drawn) / 4000 < 0.13
    for forbid, derive in drawn:
        assert set(derive) <= set(forbid) & set(DERIVABLE)
    kept = [c in d for f, d in drawn for c in f if c in DERIVABLE]
    assert 0.22 < sum(kept) / len(kept) < 0.28


def test_a_forbidden_answer_is_never_asked_for(world: World) -> None:
    kinds = set()
    for forbid, derive in ((CATEGORIES, ()), (CATEGORIES, DERIVABLE), ((), ())):
        for r in with_policy(world.records, forbid, derive):
            for q in r.questions:
                hidden = q.category in r.forbid
                free = not hidden or (q.kind == "derived" and q.category in r.derive)
                assert permitted(r, q) == free
                kinds.add((hidden, q.kind, free))
    assert (True, "derived", True) in kinds
    assert (True, "derived", False) in kinds
    assert (True, "direct", False) in kinds
    assert (True, "direct", True) not in kinds


@pytest.mark.parametrize("fixed", [False, True])
def test_guard_all_redacts_with_the_right_twin(world: World, fixed: bool) -> None:
    records = world.others[:5]
    shape = KVShape(*world.source.shape)
    guard = FrozenGuard(guard_class("redact").build(shape, len(CATEGORIES), {}))
    raw = world.source.prefill([r.ids for r in records])
    out = guard_all(guard, records, raw, world.source, world.special, fixed_length=fixed, batch=2)
    make = fixed_length_twin if fixed else neutral_twin
    twins = [make(r, r.forbid, world.special.neutral_id) for r in records]
    assert torch.equal(out.keys, world.source.prefill(twins).keys)
    assert not torch.equal(out.keys, raw.keys)


def test_guard_all_is_the_guard_under_each_records_policy(world: World) -> None:
    records = [*with_policy(world.others[:3], ()), *with_policy(world.others[3:6], CATEGORIES)]
    options = {**GUARDS["gate"], "noise": 0.0}
    module = GateGuard.build(KVShape(*world.source.shape), len(CATEGORIES), options)
    with torch.no_grad():
        module.gate.weight.normal_()
    guard = FrozenGuard(module)
    raw = world.source.prefill([r.ids for r in records])
    parts = guard_all(guard, records, raw, world.source, world.special, batch=2)
    torch.testing.assert_close(parts.keys, guard(raw, masks(records)).kv.keys, atol=1e-5, rtol=1e-4)
    strict = guard_all(guard, with_policy(records, CATEGORIES), raw, world.source, world.special)
    assert not torch.allclose(parts.keys[:3], strict.keys[:3], atol=1e-3)
    torch.testing.assert_close(parts.keys[3:], strict.keys[3:], atol=1e-5, rtol=1e-4)


# -- checkpoints


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embed(x)))  # type: ignore[no-any-return]


def make_tied(seed: int) -> tuple[Tied, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    module = Tied()
    return module, [
        torch.optim.Muon([module.mix.weight], lr=0.02),
        torch.optim.AdamW([module.mix.bias, module.embed.weight], lr=1e-2),
    ]


def steps(module: Tied, optimizers: list[torch.optim.Optimizer], n: int) -> None:
    for i in range(n):
        x = (torch.arange(5) + i) % 7
        loss = nn.functional.cross_entropy(module(x), (x + 1) % 7)
        for o in optimizers:
            o.zero_grad()
        loss.backward()
        for o in optimizers:
            o.step()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Tied]:
    """A checkpoint after 3 steps, and the module as it is after 3 more."""
    path = tmp_path / "deep" / "checkpoint.safetensors"
    module, optimizers = make_tied(0)
    steps(module, optimizers, 3)
    save_checkpoint(path, {"tied": module}, optimizers, {"step": 3})
    steps(module, optimizers, 3)
    return path, module


def test_checkpoints_continue_exactly(saved: tuple[Path, Tied]) -> None:
    """Tied weights stay tied; Muon's momentum and AdamW's moments and step count come back."""
    path, wanted = saved
    module, optimizers = make_tied(1)
    assert load_checkpoint(path, {"tied": module}, optimizers) == {"step": 3}
    assert module.head.weight is module.embed.weight
    steps(module, optimizers, 3)
    assert same(module.state_dict(), wanted.state_dict())
    # without the optimisers' state it would not
    bare, fresh = make_tied(1)
    load_checkpoint(path, {"tied": bare})
    steps(bare, fresh, 3)
    assert not same(bare.state_dict(), wanted.state_dict())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_damaged_checkpoints_are_refused(saved: tuple[Path, Tied], keep: int) -> None:
    path, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    module, optimizers = make_tied(1)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors cannot be read") as error:
        load_checkpoint(path, {"tied": module}, optimizers)
    assert "\n" not in str(error.value)


def test_foreign_checkpoints_are_refused(saved: tuple[Path, Tied]) -> None:
    path, _ = saved
    foreign: list[dict[str, nn.Module]] = [{"tied": nn.Linear(2, 2)}, {"other": make_tied(1)[0]}]
    for modules in foreign:
        with pytest.raises(ValueError, match="does not fit module") as error:
            load_checkpoint(path, modules)
        assert "\n" not in str(error.value)


def test_a_failed_save_keeps_the_last_checkpoint(
    saved: tuple[Path, Tied], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, module = saved
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint_module, "save", full)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"tied": module})
    assert path.read_bytes() == before


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
