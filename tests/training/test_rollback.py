"""The game of guard and attackers: an objective that ends, and the way back to good weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lcguard.attacks.decoder import DecoderAttack
from lcguard.records import IGNORE
from lcguard.training import prepare, trainer
from lcguard.training.adversary import Ensemble
from lcguard.training.checkpoint import save_checkpoint
from lcguard.training.config import AdversaryConfig, TrainConfig
from lcguard.training.dataset import attack_data, with_policy
from lcguard.training.rollback import HeldBack, keep_or_go_back
from tests.fixtures import World
from tests.matrix import ATTACKS, GUARDS
from tests.training.test_recipe_options import SMALL, run


def game(world: World, objective: Any) -> Ensemble:
    records = world.records[:40]
    pairs = attack_data(records, world.source.prefill([r.ids for r in records]), world.special)
    options = {k: v for k, v in ATTACKS["decoder"].items() if k != "fit"}
    config = AdversaryConfig(count=1, weight=1.0, objective=objective, options=options)
    return Ensemble(config, DecoderAttack.build, pairs, seed=0)


def test_least_squares_ends_at_the_prior_where_cross_entropy_has_no_end(world: World) -> None:
    """A guard that owns the attacker's logits: by cross-entropy it drives the true token's
    probability to nothing, which says what the value is not; by least squares to the prior's."""
    team = game(world, "least_squares")
    assert team.prior is not None
    fields, labels, logp = team.members[0].log_probs(team._pairs.subset(range(6)))
    at = torch.arange(labels.shape[1]).clamp_max(team.prior.steps - 1)
    due = labels != IGNORE
    true = labels.masked_fill(~due, 0)[..., None]
    prior = team.prior.table[fields[:, None], at[None]].gather(-1, true).squeeze(-1)[due]

    def played(steps: int, least_squares: bool) -> tuple[torch.Tensor, float]:
        logits = logp.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.3)
        for _ in range(steps):
            now = logits.log_softmax(-1)
            if least_squares:
                assert team.prior is not None
                loss = team.prior.squares(fields, labels, now)
            else:
                loss = -F.cross_entropy(now[due], labels[due])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = logits.detach().log_softmax(-1)
        return found.gather(-1, true).squeeze(-1)[due], float(loss.detach())

    nats, loss = played(200, True)
    torch.testing.assert_close(nats.exp(), prior, atol=0.02, rtol=0)
    assert loss < 1e-4
    half, more = played(100, False)[0], played(200, False)[0]
    assert bool((more < half - 5).all())


def test_a_confident_attacker_leaves_a_bounded_gradient(world: World) -> None:
    team = game(world, "least_squares")
    batch = team._pairs.subset(range(6))
    term = team.guard_term(batch)
    assert 0 <= float(term.detach()) <= 1
    nothing = attack_data(with_policy(world.records[:3], ()), team._pairs.kv[:3], world.special)
    assert float(team.guard_term(nothing).detach()) == 0


def test_going_back_is_exact(tmp_path: Path) -> None:
    """Weights and what optimisers remember, to the last bit."""
    torch.manual_seed(0)
    net, path = nn.Linear(3, 2), tmp_path / "snapshot.safetensors"
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        net(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()

    def state() -> dict[str, torch.Tensor]:
        own = {k: v.clone() for k, v in net.state_dict().items()}
        for i, entry in optimizer.state_dict()["state"].items():
            own |= {f"{i}.{k}": torch.as_tensor(v).clone() for k, v in entry.items()}
        return own

    def settled(loss: float) -> bool:
        return keep_or_go_back(path, loss, 0.1, {"net": net}, [optimizer])

    step()
    good = state()
    assert not settled(1.0)
    step()
    assert not settled(1.05)  # within the slack: neither kept nor left
    step()
    assert settled(1.2)
    assert state().keys() == good.keys()
    assert all(torch.equal(v, good[k]) for k, v in state().items())
    step()
    better = state()
    assert not settled(0.9)
    step()
    assert settled(1.0)
    assert all(torch.equal(v, better[k]) for k, v in state().items())


def test_a_run_goes_back_to_its_best_weights(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guard, attacker and all; held-back losses as given."""
    losses = iter([1.0, 0.5, 0.9, 0.4])
    monkeypatch.setattr(HeldBack, "loss", lambda self, module: next(losses))
    seen: list[Any] = []
    settle = trainer.Trainer.settle

    def watched(self: trainer.Trainer, folder: Path) -> dict[str, float]:
        row = settle(self, folder)
        modules = [self.module, *self.ensemble.modules().values()]
        kept = [m.state_dict() for m in modules] + [o.state_dict() for o in self.optimizers]
        seen.append(copy.deepcopy(dict(enumerate(kept))))
        return row

    monkeypatch.setattr(trainer.Trainer, "settle", watched)
    adversary = AdversaryConfig(
        count=1,
        weight=0.5,
        objective="least_squares",
        options={k: v for k, v in ATTACKS["decoder"].items() if k != "fit"},
    )
    done = run(world, tmp_path, rollback_every=1, adversary=adversary)
    assert [row["went_back"] for row in done.metrics] == [0.0, 0.0, 1.0, 0.0]
    assert [row["held_back"] for row in done.metrics] == [1.0, 0.5, 0.9, 0.4]
    first, second, third, fourth = (flat(x) for x in seen)
    assert third.keys() == second.keys()
    assert all(torch.equal(v, second[k]) for k, v in third.items())
    for other in (first, fourth):
        assert any(not torch.equal(v, second[k]) for k, v in other.items())


def flat(tree: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested states, by their path."""
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else ()
    return {k: v for key, value in items for k, v in flat(value, f"{name}/{key}").items()}


def test_the_loss_held_back_is_the_same_each_time(world: World) -> None:
    config = TrainConfig("gate", GUARDS["gate"], rollback_every=1, **SMALL)
    made = trainer.Trainer(config, world.records, world.source, world.special, DecoderAttack.build)
    assert made.held is not None
    first = made.held.loss(made.module)
    torch.manual_seed(5)
    assert made.held.loss(made.module) == first
    made.step(0)
    assert made.held.loss(made.module) != first


def test_too_few_records_to_hold_back(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rollback_every holds back 400 records of"):
        run(world, tmp_path, batch=200, rollback_every=2)


def test_records_held_back_are_not_trained_on(world: World) -> None:
    config = replace(TrainConfig(), batch=4, rollback_every=5)
    records, held = prepare.split_held(world.records, config)
    assert len(held) == 8
    assert not {r.record_id for r in records} & {r.record_id for r in held}
    assert prepare.split_held(world.records, TrainConfig()) == (list(world.records), [])


def test_a_snapshot_of_another_guard_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.safetensors"
    save_checkpoint(path, {"net": nn.Linear(3, 2)}, (), {"loss": 1.0})
    with pytest.raises(ValueError, match="does not fit module 'net'"):
        keep_or_go_back(path, 2.0, 0.0, {"net": nn.Linear(4, 2)}, [])
