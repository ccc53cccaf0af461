"""The reference on pages does what the guard's module does on KV, however the pages lie."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor

from lcguard.categories import CATEGORIES
from lcguard.guards.base import GuardModule
from lcguard.guards.gate import GateGuard
from lcguard.noise import noise_key, segment_noise
from lcguard.ops import dispatch, reference
from lcguard.ops.stream import NoiseStream
from lcguard.ops.work import Decision, decide, work_of
from lcguard.protocols import KVBatch, Mask
from tests.fixtures import forbid_all, random_kv
from tests.guards.every_guard import module_of as guard_module
from tests.ops.triton_cases import LAYERS, Case, module_of, rotary_of

HEADS, DIM, TOKENS, PAGE, START = 2, 16, 7, 3, 900
ROTARY = rotary_of(DIM)
KEY = noise_key(4, "segment")
SLOTS = torch.tensor([14, 0, 7, 3, 10, 6, 1])
CASES = {
    "identity": Case("identity"),
    "identity_noise": Case("identity", noise=0.3),
    "gaussian": Case("gaussian", noise=0.7),
    "residual": Case("residual"),
    "residual_noise": Case("residual", noise=0.2),
    "gate": Case("gate", noise=0.3),
    "gate_without_squeeze": Case("gate", noise=0.3, squeeze=False),
}
MASKS = {
    "all": forbid_all(1),
    "derived": forbid_all(1, derive=True),
    "some": Mask(torch.arange(len(CATEGORIES))[None] < 2, torch.arange(len(CATEGORIES))[None] < 1),
    "nothing": Mask(*torch.zeros(2, 1, len(CATEGORIES), dtype=torch.bool)),
}


def module_for(name: str) -> GuardModule:
    return module_of(replace(CASES[name], dim=DIM, heads=HEADS))


def empty_pages(blocks: int = 5, heads: int = HEADS, layers: int = LAYERS) -> Tensor:
    """NaN where nothing was written: ``[L, B, H, N, 2 D]``."""
    return torch.full((layers, blocks, heads, PAGE, 2 * DIM), torch.nan)


def placed(kv: KVBatch, slots: Tensor = SLOTS) -> list[tuple[Tensor, Tensor]]:
    """The KV of one record in pages, a pair of views per layer, at position START."""
    pages = [(page[..., :DIM], page[..., DIM:]) for page in empty_pages(heads=kv.keys.shape[2])]
    for layer, views in enumerate(pages):
        reference.place_layer(kv.keys[0, layer], kv.values[0, layer], slots, ROTARY, START, *views)
    return pages


def decision_of(module: GuardModule, kv: KVBatch, mask: Mask) -> Decision | None:
    return decide(module, module.standardise(kv)[0], mask) if type(module) is GateGuard else None


def guarded(module: GuardModule, kv: KVBatch, mask: Mask) -> Tensor:
    """By the operations: ``[2, L, H, T, D]``."""
    decision = decision_of(module, kv, mask)
    out = torch.full((2, *kv.keys.shape[1:]), torch.nan)
    for layer, views in enumerate(placed(kv)):
        work = work_of(module, layer, noise_key=KEY, decision=decision)
        dispatch.rewrite_layer(*views, SLOTS, ROTARY, START, work, out[0, layer], out[1, layer])
    return out


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CASES)
def test_does_what_the_module_does(name: str, mask: str) -> None:
    module, kv = module_for(name), random_kv((TOKENS,), (LAYERS, HEADS, DIM))
    with torch.no_grad():
        wanted, _ = module(kv, MASKS[mask], [KEY])
    found = guarded(module, kv, MASKS[mask])
    torch.testing.assert_close(found[0], wanted.keys[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], wanted.values[0], atol=1e-5, rtol=1e-5)
    if name.startswith("gate"):
        changed = float((found[1] - kv.values[0]).abs().max())
        assert (changed > 0.1) == (mask != "nothing")


@pytest.mark.parametrize("name", ["identity", "gate"])
def test_what_changes_nothing_does_not_round(name: str) -> None:
    kv = random_kv((TOKENS,), (LAYERS, HEADS, DIM))
    assert torch.equal(guarded(module_for(name), kv, MASKS["nothing"])[1], kv.values[0])


def test_the_words_and_gates_are_those_of_the_module() -> None:
    module = guard_module("gate")
    assert isinstance(module, GateGuard)
    kv = random_kv((5,))
    z = module.standardise(kv)
    for mask in MASKS.values():
        decision = decide(module, z[0], mask)
        with torch.no_grad():
            found = module.rewrite(z, kv.valid, mask)
        withheld = decision.closed.mean((1, 2))
        torch.testing.assert_close(withheld, found.withheld[0], atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="the mask has 2 records"):
        decide(module, z[0], forbid_all(2))


def test_parts_of_a_segment_fit_together() -> None:
    """Rewritten in two parts, or by two shards of heads, the segment is the same."""
    module, kv = module_for("gaussian"), random_kv((TOKENS,), (LAYERS, HEADS, DIM))
    whole, cut = guarded(module, kv, MASKS["all"]), 3
    out = torch.full_like(whole, torch.nan)
    for layer, views in enumerate(placed(kv)):
        for rows in (slice(0, cut), slice(cut, TOKENS)):
            work = work_of(module, layer, noise_key=KEY, first_token=rows.start)
            reference.rewrite_layer(
                *views, SLOTS[rows], ROTARY, START + rows.start, work, *out[:, layer, :, rows]
            )
    torch.testing.assert_close(out, whole, atol=1e-6, rtol=1e-6)
    for layer, (keys, values) in enumerate(placed(kv)):
        for head in range(HEADS):
            work = work_of(module, layer, noise_key=KEY, first_head=head, heads=1)
            own = slice(head, head + 1)
            reference.rewrite_layer(
                keys[:, own], values[:, own], SLOTS, ROTARY, START, work, *out[:, layer, own]
            )
    torch.testing.assert_close(out, whole, atol=1e-6, rtol=1e-6)


def test_placed_is_gathered_again() -> None:
    kv = random_kv((TOKENS,), (LAYERS, HEADS, DIM))
    positions = torch.arange(START, START + TOKENS)
    for layer, views in enumerate(placed(kv)):
        keys, values = reference.gather(*views, SLOTS)
        assert torch.equal(values.transpose(0, 1), kv.values[0, layer])
        assert torch.equal(keys.transpose(0, 1), ROTARY.rotate(kv.keys[0, layer], positions))


def test_padding_is_zero_and_never_written() -> None:
    kv, slots = random_kv((TOKENS,), (LAYERS, HEADS, DIM)), SLOTS.clone()
    slots[[1, 4]] = -1
    live = slots >= 0
    pages = placed(kv, slots)
    written = torch.zeros(5 * PAGE, dtype=torch.bool)
    written[slots[live]] = True
    for views in pages:
        for view in views:
            rows = view.transpose(1, 2).flatten(0, 1)  # [B * N, H, D]
            assert torch.equal(~rows.isnan().any(-1).any(-1), written)
        for x in reference.gather(*views, slots):
            assert not x[~live].any()
            assert bool(x[live].all())
    out = torch.full((2, HEADS, TOKENS, DIM), torch.nan)
    work = work_of(module_for("gaussian"), 0, noise_key=KEY)
    reference.rewrite_layer(*pages[0], slots, ROTARY, START, work, *out)
    assert not out[:, :, ~live].any()
    assert bool(out[:, :, live].all())


@pytest.mark.parametrize("order", [*permutations(range(4)), "transposed keys"])
def test_any_strides(order: tuple[int, ...] | str) -> None:
    """Every physical order of blocks, heads, rows and channels, vLLM's CPU pages among them."""
    kv, size = random_kv((TOKENS,), (1, HEADS, DIM)), (5, HEADS, PAGE, DIM)
    if isinstance(order, str):
        page = torch.zeros(*size[:2], 2 * DIM * PAGE)
        k_view = page[..., : DIM * PAGE].unflatten(-1, (DIM, PAGE)).transpose(2, 3)
        v_view = page[..., DIM * PAGE :].unflatten(-1, (PAGE, DIM))
    else:
        back = [order.index(i) for i in range(4)]
        k_view, v_view = torch.zeros(2, *[size[i] for i in order]).permute(
            0, *[b + 1 for b in back]
        )
    assert k_view.shape == v_view.shape == size
    reference.place_layer(kv.keys[0, 0], kv.values[0, 0], SLOTS, ROTARY, START, k_view, v_view)
    out = torch.full((TOKENS, 2, DIM, HEADS), torch.nan).permute(1, 3, 0, 2)
    work = work_of(module_for("identity"), 0)
    dispatch.rewrite_layer(k_view, v_view, SLOTS, ROTARY, START, work, out[0], out[1])
    torch.testing.assert_close(out[0], kv.keys[0, 0], atol=1e-5, rtol=1e-5)
    assert torch.equal(out[1], kv.values[0, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_are_rounded_once(dtype: torch.dtype) -> None:
    """As float32 on the same pages, rounded at the end."""
    kv = random_kv((TOKENS,), (LAYERS, HEADS, DIM))
    work = work_of(module_for("residual_noise"), 1, noise_key=KEY)
    pages = [view.to(dtype) for view in placed(kv)[1]]
    out = torch.empty(2, HEADS, TOKENS, DIM, dtype=dtype)
    exact = torch.empty(2, HEADS, TOKENS, DIM)
    reference.rewrite_layer(*pages, SLOTS, ROTARY, START, work, *out)
    reference.rewrite_layer(*[p.float() for p in pages], SLOTS, ROTARY, START, work, *exact)
    assert torch.equal(out, exact.to(dtype))


def test_noise_of_a_layer_is_its_part_of_the_segments() -> None:
    shape = (3, 4, 24)
    whole = segment_noise(KEY, shape, 12, first_token=5).unflatten(3, shape[1:])
    for layer in range(3):
        stream = NoiseStream(KEY, layer, 3, 4, first_head=1, first_token=5)
        assert torch.equal(stream.draw(2, 24, 12), whole[:, layer, :, 1:3].flatten(2))
    assert "key" not in repr(stream)
    end = replace(stream, first_token=(1 << 32) // (3 * 2 * 4 * 3) - 3)
    assert end.draw(3, 24, 3).shape == (3, 2, 72)
    with pytest.raises(ValueError, match="one key has 2\\^32: publish the segment in parts"):
        end.draw(3, 24, 4)
    with pytest.raises(ValueError, match="5 bytes"):
        NoiseStream(b"short", 0, 3, 4)
