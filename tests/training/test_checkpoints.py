"""Checkpoints: whole, refused where damaged or foreign, and never half-written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lcguard.training import checkpoint as checkpoint_module
from lcguard.training.checkpoint import load_checkpoint, save_checkpoint
from tests.training.test_training import same

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
