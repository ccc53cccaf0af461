"""Phases of a run: what holds when, what is averaged, and the noise that it ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lcguard.commands.train import TrainRun
from lcguard.config import ConfigError, dump_config, load_config
from lcguard.training import trainer
from lcguard.training.config import TrainConfig
from lcguard.training.schedule import Phase
from lcguard.training.trainer import Run, train_guard
from tests.fixtures import World
from tests.matrix import GUARDS

SCHEDULE = (
    Phase(share=0.25, lr=0.01, ce_weight=7.0),
    Phase(share=0.75, pair_weight=0.9, average=True),
    Phase(share=0, noise=0.3),
)
SMALL: dict[str, Any] = {"batch": 6, "questions": 2, "leak_ramp": 2, "warmup": 2}


def run(world: World, out: Path, **settings: Any) -> Run:
    config = TrainConfig("gate", GUARDS["gate"], **(SMALL | settings))
    return train_guard(config, world.records, world.source, world.special, out, progress=False)


def test_a_phase_changes_what_it_names_and_nothing_else() -> None:
    config = TrainConfig(steps=8, lr=0.5, ce_weight=1.0, pair_weight=0.2, schedule=SCHEDULE)
    first, second = config.at(1), config.at(2)
    assert (first.lr, first.ce_weight, first.pair_weight) == (0.01, 7.0, 0.2)
    assert (second.lr, second.ce_weight, second.pair_weight) == (0.5, 1.0, 0.9)
    assert config.at(7).pair_weight == 0.9
    assert config.at(8).pair_weight == 0.2  # after the last step: the phase without any
    assert TrainConfig().at(3) == TrainConfig()


def test_every_step_is_in_a_phase_at_any_length() -> None:
    third = (Phase(share=1 / 3), Phase(share=1 / 3, lr=0.1), Phase(share=1 / 3, lr=0.2))
    for steps in (3, 7, 100):
        config = TrainConfig(steps=steps, lr=0.5, schedule=third)
        rates = [config.at(s).lr for s in range(steps)]
        assert rates == sorted(rates, key=[0.5, 0.1, 0.2].index)
        assert all(abs(rates.count(r) - steps / 3) < 1 for r in (0.5, 0.1, 0.2))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{share: 0.5}, {share: 0.4}]", "shares add up to 0.9: they have to make 1"),
        ("[{share: 1.5}]", "share=1.5 must be within 0..1"),
        ("[{share: 1, pair_wieght: 2}]", "did you mean 'pair_weight'"),
    ],
)
def test_a_schedule_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(TrainRun, None, [f"train.schedule={text}"])


def test_a_schedule_survives_its_file(tmp_path: Path) -> None:
    made = TrainRun(train=TrainConfig(schedule=SCHEDULE))
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(made))
    assert load_config(TrainRun, path) == made


def test_the_guard_ends_with_the_equal_average_and_the_last_noise(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    noise: list[float] = []
    step = trainer.Trainer.step

    def watched(self: trainer.Trainer, at: int) -> dict[str, float]:
        row = step(self, at)
        seen.append({k: v.detach().clone() for k, v in self.module.named_parameters()})
        noise.append(self.module.config.noise)
        return row

    monkeypatch.setattr(trainer.Trainer, "step", watched)
    done = run(world, tmp_path, steps=4, schedule=SCHEDULE)
    for name, value in done.guard.module.named_parameters():
        expected = torch.stack([weights[name] for weights in seen[1:]]).mean(0)
        torch.testing.assert_close(value, expected)
    assert any(not torch.equal(seen[-1][k], v) for k, v in done.guard.module.named_parameters())
    assert noise == [GUARDS["gate"]["noise"]] * 4
    assert done.guard.card.options["noise"] == 0.3


def test_the_running_average_starts_with_its_phase(world: World, tmp_path: Path) -> None:
    late = (Phase(share=0.5), Phase(share=0.5, average=True))
    config = TrainConfig(steps=4, ema=0.5, schedule=late)
    assert [config.averages_at(s) for s in range(4)] == [False, False, True, True]
    assert [TrainConfig(steps=2, ema=0.5).averages_at(s) for s in range(2)] == [True, True]
    assert not TrainConfig(steps=2).averages_at(0)
    a = run(world, tmp_path / "a", steps=4, ema=0.5, schedule=late)
    b = run(world, tmp_path / "b", steps=4, ema=0.5)
    assert any(
        not torch.equal(x, y)
        for x, y in zip(a.guard.module.parameters(), b.guard.module.parameters(), strict=True)
    )
