"""Gauss-Newton inversion: bijections fall in a few steps, constants do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lcguard.agents.backends.hf import load_backend
from lcguard.attacks.base import Knowledge
from lcguard.attacks.gauss_newton import GaussNewtonAttack
from lcguard.categories import CATEGORIES
from lcguard.guards.base import GuardModule, KVShape, Rewrite
from lcguard.guards.frozen import FrozenGuard
from lcguard.source import ModelSource
from lcguard.training.dataset import attack_data, blind
from tests.attacks.test_attacks_analytic import SPECIAL, data_of, flat, guard_of, share, texts, walk
from tests.fixtures import KINDS, forbid_all, tiny_model


class Linear(GuardModule):
    """Every token's entry, all layers together, through one random matrix of rank ``keep``."""

    name = "linear"

    def __init__(self, shape: KVShape, keep: int | None = None) -> None:
        super().__init__(shape, len(CATEGORIES))
        n = shape.channels
        draw = torch.randn(n, n, generator=torch.Generator().manual_seed(7)) / n**0.5
        if keep is not None:
            draw = draw[:, :keep] @ draw[:keep]
        self.register_buffer("matrix", draw)

    matrix: torch.Tensor

    def rewrite(self, z: torch.Tensor, valid: torch.Tensor, mask: Any) -> Rewrite:
        moved = (z.flatten(2) @ self.matrix).view_as(z)
        return Rewrite(moved, torch.zeros(valid.shape))


def linear(source: ModelSource, keep: int | None = None) -> FrozenGuard:
    module = Linear(KVShape(*source.shape), keep)
    module.fit_statistics(source.prefill([r.ids for r in texts(20, 20, 5)]))
    return FrozenGuard(module)


def attack_of(source: ModelSource, guard: FrozenGuard | None = None, **options: Any) -> Any:
    attack = GaussNewtonAttack.build(options)
    attack.equip(Knowledge(source, str, guard))
    return attack


SHORT = {"steps": 4, "iterations": 20}
"""Enough where the search succeeds at all, for tests in which it must not."""


@pytest.fixture(scope="module")
def llama() -> ModelSource:
    return ModelSource(tiny_model("llama"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_inverted(kind: str) -> None:
    source, victims = ModelSource(tiny_model(kind)), texts(1, 8, 1)
    data = data_of(source, victims)
    attack = attack_of(source).fit(data_of(source, texts(5, 20, 0)))
    assert share(walk(attack, data), victims) >= 0.95
    assert attack.misfit < 1e-8
    assert attack.steps_done <= 8


@pytest.mark.parametrize("name", ["cloak", "cloak in blocks", "residual", "linear"])
def test_bijective_guards_fall_in_eight_steps(llama: ModelSource, name: str) -> None:
    """The cloak to who holds its key, by its derivative alone: ``unlock`` is not called."""
    guard = {
        "cloak": lambda: guard_of("cloak", llama, key="5a" * 32),
        "cloak in blocks": lambda: guard_of("cloak", llama, key="5a" * 32, block=3),
        "residual": lambda: guard_of("residual", llama, weights=0.3, bottleneck=4),
        "linear": lambda: linear(llama),
    }[name]()
    victims = texts(1, 12, 1)
    pairs, data = data_of(llama, texts(5, 20, 0), guard), data_of(llama, victims, guard)
    attack = attack_of(llama, guard, steps=8).fit(pairs)
    assert attack.read(data.kv, data.mask) == victims[0].ids
    assert attack.misfit < 1e-8
    assert attack.steps_done <= 8


def test_another_key_reads_nothing(llama: ModelSource) -> None:
    guards = [guard_of("cloak", llama, key=k * 32) for k in ("5a", "5b")]
    victims = texts(2, 8, 1)
    data = data_of(llama, victims, guards[0])
    attack = attack_of(llama, guards[1], **SHORT).fit(data_of(llama, texts(5, 20, 0), guards[1]))
    assert share(walk(attack, data), victims) < 0.2
    assert attack.misfit > 0.1


def test_the_nano_agent_is_inverted() -> None:
    nano = load_backend("nano")
    ids = nano.encoder.context("Employee record. The name is Quella Brandt. SSN: 941-22-7310.")
    kv = nano.source.prefill([ids])
    pairs = data_of(nano.source, texts(5, 20, 0, 2048), special=nano.special)
    attack = attack_of(nano.source).fit(pairs)
    assert attack.read(kv, forbid_all(1)) == tuple(ids)


def test_constants_and_redaction_give_nothing(llama: ModelSource) -> None:
    victims = texts(2, 10, 2)
    pairs, data = data_of(llama, texts(5, 20, 0)), data_of(llama, victims)
    attack = attack_of(llama, **SHORT).fit(pairs)
    assert share(walk(attack, flat(data)), victims) < 0.15
    redact = guard_of("redact", llama)
    found = attack_of(llama, redact).fit(pairs).recover(data_of(llama, victims, redact))
    assert [g.ids for g in found] == [(SPECIAL.neutral_id,) * 3] * 4


def test_noise_is_searched_by_its_mean(llama: ModelSource) -> None:
    victims = texts(1, 10, 1)
    guard = guard_of("gaussian", llama, noise=0.2)
    pairs, data = data_of(llama, texts(5, 20, 0), guard), data_of(llama, victims, guard, seed=1)
    attack = attack_of(llama, guard, **SHORT).fit(pairs)
    assert share(walk(attack, data), victims) >= 0.9
    assert 0.005 < attack.misfit < 0.2  # the noise


def test_behind_consumed_segments(llama: ModelSource) -> None:
    victims = texts(2, 8, 1)
    on = llama.prefill([[5, 6, 7, 8], [9, 10]])
    data = attack_data(victims, llama.prefill([r.ids for r in victims], on=on), SPECIAL)
    attack = attack_of(llama).fit(blind(data_of(llama, texts(5, 20, 0))))
    behind = replace(data, on=on)
    assert all(g.token_accuracy == 1 for g in attack.recover(behind))
    assert attack.misfit < 1e-8
    alone = attack_of(llama, **SHORT).fit(blind(data_of(llama, texts(5, 20, 0))))
    alone.recover(data)
    assert alone.misfit > 1e-3


def test_what_is_not_attempted_is_not_scored(llama: ModelSource) -> None:
    data = data_of(llama, [*texts(1, 30, 1), *texts(3, 10, 2)])
    attack = attack_of(llama, max_tokens=12, max_records=1).fit(data_of(llama, texts(3, 12, 0)))
    assert [g.record_id for g in attack.recover(data)] == ["2-0", "2-0"]


@pytest.mark.parametrize("options", [{"steps": 0}, {"iterations": 0}, {"damping": 0.0}])
def test_refuses_what_cannot_be(llama: ModelSource, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} 0"):
        attack_of(llama, **options).fit(data_of(llama, texts(2, 8, 0)))
