"""An engine whose rewriting differs from the guard's module does not start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lcguard.guards.frozen import FrozenGuard
from lcguard.ops import reference
from tests.ops.triton_cases import LAYERS, Case, module_of, rotary_of
from tests.vllm.cpu_pages import Writer

pytest.importorskip("vllm")

from lcguard.protocols import KVBatch
from lcguard.vllm import rank_pages, rewrite, selfcheck
from lcguard.vllm.errors import StartError
from lcguard.vllm.pages import LayerPages

pytestmark = pytest.mark.vllm

HEADS, DIM, BLOCK = 2, 16, 16
ROTARY = rotary_of(DIM)
GUARDS = {
    name: FrozenGuard(module_of(Case(name, dim=DIM, heads=HEADS, noise=noise)))
    for name, noise in {"identity": 0.0, "gaussian": 0.5, "residual": 0.2, "gate": 0.3}.items()
}


def layers(dtype: torch.dtype = torch.float32) -> list[LayerPages]:
    """Pages of two blocks with content that is not to be lost."""
    layer = SimpleNamespace(isa="vec", impl=Writer())
    generator = torch.Generator().manual_seed(5)
    return [
        LayerPages(
            f"layer {i}",
            layer,
            torch.randn(2, HEADS, BLOCK, 2 * DIM, generator=generator).to(dtype),
        )
        for i in range(LAYERS)
    ]


@pytest.fixture
def by_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: rewritten from the pages, by the kernels' reference."""
    monkeypatch.setenv("LCGUARD_OPS", "reference")


@pytest.mark.parametrize("ops", ["", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", GUARDS)
def test_right_rewriting_starts_and_leaves_the_pages(
    name: str, dtype: torch.dtype, ops: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCGUARD_OPS", ops)
    made = layers(dtype)
    before = [layer.pages.clone() for layer in made]
    selfcheck.check_rewriting({name: GUARDS[name]}, made, ROTARY)
    assert all(torch.equal(a.pages, b) for a, b in zip(made, before, strict=True))


def wrong_position(*args: Any) -> None:
    reference.rewrite_layer(*args[:4], args[4] + 1, *args[5:])


def wrong_rows(*args: Any) -> None:
    reference.rewrite_layer(*args[:2], args[2].roll(1), *args[3:])


def without_noise(*args: Any) -> None:
    reference.rewrite_layer(*args[:5], replace(args[5], noise=0.0), *args[6:])


def without_the_guard(*args: Any) -> None:
    raw = [x.transpose(0, 1) for x in reference.gather(*args[:3])]
    args[6].copy_(ROTARY.unrotate(raw[0], torch.arange(args[4], args[4] + len(args[2]))))
    args[7].copy_(raw[1])


def keys_for_values(*args: Any) -> None:
    reference.rewrite_layer(*args[:6], args[7], args[6])


@pytest.mark.usefixtures("by_pages")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("wrong", "guard"),
    [
        (wrong_position, "identity"),
        (wrong_rows, "gate"),
        (without_noise, "gaussian"),
        (without_noise, "gate"),
        (without_the_guard, "gate"),
        (without_the_guard, "residual"),
        (keys_for_values, "identity"),
    ],
)
def test_wrong_rewriting_does_not_start(
    wrong: Any, guard: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "rewrite_layer", wrong)
    made = layers(dtype)
    before = [layer.pages.clone() for layer in made]
    with pytest.raises(StartError, match=f"guard '{guard}': rewriting this engine's pages"):
        selfcheck.check_rewriting({guard: GUARDS[guard]}, made, ROTARY)
    assert all(torch.equal(a.pages, b) for a, b in zip(made, before, strict=True))


class WrongRows(rank_pages.PageTokens):
    def read(self, start: int, end: int, layers: Sequence[int] | None = None) -> KVBatch:
        kv = super().read(start, end, layers)
        return KVBatch(kv.keys.roll(1, 3), kv.values, kv.valid)

    def copy(self, keys: Tensor, values: Tensor) -> None:
        super().copy(keys, values)
        keys.copy_(keys.roll(1, 2))


class WrongPosition(rank_pages.PageTokens):
    def read(self, start: int, end: int, layers: Sequence[int] | None = None) -> KVBatch:
        self.start += 1
        try:
            return super().read(start, end, layers)
        finally:
            self.start -= 1

    def copy(self, keys: Tensor, values: Tensor) -> None:
        self.start += 1
        super().copy(keys, values)


@pytest.mark.parametrize("wrong", [WrongRows, WrongPosition])
@pytest.mark.parametrize("guard", ["identity", "gate"])
def test_pages_that_are_read_wrong_do_not_start(
    wrong: Any, guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "PageTokens", wrong)
    with pytest.raises(StartError, match=f"guard '{guard}': rewriting this engine's pages"):
        selfcheck.check_rewriting({guard: GUARDS[guard]}, layers(), ROTARY)


def not_finite(*args: Any) -> None:
    args[6].fill_(torch.nan)


def does_not_compile(*args: Any) -> None:
    raise RuntimeError("no such instruction\nand a long trace")


@pytest.mark.usefixtures("by_pages")
@pytest.mark.parametrize("wrong", [not_finite, does_not_compile])
def test_failing_rewriting_does_not_start(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "rewrite_layer", wrong)
    with pytest.raises(StartError, match=r"guard 'gate': .* failed: [^\n]*$"):
        selfcheck.check_rewriting({"gate": GUARDS["gate"]}, layers(), ROTARY)


class Theirs(FrozenGuard):
    """A guard of another make."""


def test_a_guard_that_runs_as_a_module_needs_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "rewrite_layer", None)
    theirs = Theirs(GUARDS["identity"].module)
    selfcheck.check_rewriting({"theirs": theirs}, layers(), ROTARY)
