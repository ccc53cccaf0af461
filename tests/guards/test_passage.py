"""A segment that goes through a guard in tiles: the same bytes however it is asked for, the same
guard, and memory for a tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lcguard.categories import CATEGORIES
from lcguard.discrete_gaussian import STEPS
from lcguard.guards import base
from lcguard.guards.base import GuardModule, KVShape, guard_class
from lcguard.guards.context import ContextNetwork
from lcguard.guards.frozen import FrozenGuard, GuardError
from lcguard.guards.gate import GateGuard
from lcguard.guards.passage import HeldTokens, Passage
from lcguard.guards.twin import TwinGuard
from lcguard.manifest import TensorDigests
from lcguard.noise import noise_key
from lcguard.protocols import KVBatch, Mask
from tests.fixtures import forbid_all, random_kv
from tests.guards.every_guard import SHAPE, guard_of, module_of
from tests.matrix import GUARDS

TOKENS, TILE = 70, 16
KEY = noise_key(6, "segment")
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in GUARDS},
    "gate, near": ("gate", {"reach_tokens": 5}),
    "gate, whole": ("gate", {"reach_tokens": 0}),
    "gate, per head": ("gate", {"maps": "per_head"}),
    "gate, low rank": ("gate", {"maps": "low_rank", "rank": 3}),
    "regress, near": ("regress", {"reach_tokens": 5}),
    "cloak, in order": ("cloak", {"block": 0}),
    "compose, gate first": (
        "compose",
        {"parts": [{"guard": "gate", "options": GUARDS["gate"]}, {"guard": "gaussian"}]},
    ),
}
WHOLE = {"gate, whole", "cloak", "trace_gate", "kveraser"}
"""Rows that are one tile."""


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "TILE_BYTES", 1)
    monkeypatch.setattr(base, "TILE_TOKENS", TILE)


def passage_of(guard: FrozenGuard, kv: KVBatch, mask: Mask, **options: Any) -> Passage:
    tokens = HeldTokens(kv)
    return guard.passage(tokens, mask, twin=tokens if guard.needs_twin else None, **options)


def joined(blocks: list[KVBatch]) -> KVBatch:
    keys, values = (torch.cat([getattr(b, n) for b in blocks], 3) for n in ("keys", "values"))
    return KVBatch(keys, values, torch.cat([b.valid for b in blocks], 1))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("row", ROWS)
def test_what_is_sent_does_not_depend_on_the_size_of_the_blocks(row: str) -> None:
    name, options = ROWS[row]
    guard, kv, mask = guard_of(name, **options), random_kv((TOKENS,)), forbid_all(1, derive=True)
    made = {}
    for block in (1, 7, 64, TOKENS):
        passage = passage_of(guard, kv, mask, dtype=torch.bfloat16)
        assert len(passage.tiles) == (1 if row in WHOLE else -(-TOKENS // TILE))
        out = joined(list(passage.blocks(KEY, block)))
        made[block] = TensorDigests.of(out.keys, out.values)
    assert len(set(made.values())) == 1
    other = joined(list(passage.blocks(noise_key(7, "segment"), 64)))
    assert (TensorDigests.of(other.keys, other.values) != made[64]) == guard.is_noisy(True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("row", ROWS)
def test_tiles_are_the_guard(row: str) -> None:
    """As on the whole segment, but for the last bits of sums in another order: of grid points one
    in fifty may lie next to the other's."""
    name, options = ROWS[row]
    guard, kv, mask = guard_of(name, **options), random_kv((TOKENS,)), forbid_all(1, derive=True)
    wanted = guard(kv, mask, keys=[KEY], twin=kv).kv
    keys, values = (torch.full_like(x[0], torch.nan) for x in (kv.keys, kv.values))
    passage_of(guard, kv, mask).fill(KEY, keys, values)
    found = KVBatch(keys[None], values[None], kv.valid)
    if guard.module.config.noise and row != "trace_gate":  # whose grid is not of channels
        points = [guard.module.grid_points(x, mask) for x in (found, wanted)]
        apart = (points[0] - points[1]).abs()
        assert float(apart.max()) < 1.5
        assert float((apart > 0.5).double().mean()) < 0.02
        return
    step = 0.3 * 2 / STEPS if name == "compose" else 0.0  # of a channel as wide as 2
    torch.testing.assert_close(found.keys, wanted.keys, atol=2e-5 + step, rtol=1e-4)
    torch.testing.assert_close(found.values, wanted.values, atol=2e-5 + step, rtol=1e-4)


@pytest.mark.usefixtures("small_tiles")
def test_a_policy_that_forbids_nothing_is_not_rounded_in_tiles_either() -> None:
    kv, nothing = random_kv((TOKENS,)), forbid_all(1)
    nothing = Mask(torch.zeros_like(nothing.forbid), nothing.derive)
    module = guard_class("gate").build(SHAPE, len(CATEGORIES), GUARDS["gate"])
    out = joined(list(passage_of(FrozenGuard(module), kv, nothing).blocks(KEY, 64)))
    torch.testing.assert_close(out.keys, kv.keys, atol=1e-5, rtol=1e-5)


# -- what a token sees


def test_a_token_sees_as_far_as_its_blocks_reach() -> None:
    """Two blocks of reach 5: ten tokens, and not one more."""
    torch.manual_seed(0)
    network = ContextNetwork(SHAPE, 0, 32, 2, reach_tokens=5).eval()
    z = torch.randn(1, TOKENS, 2, 2, 16)
    changed = z.clone()
    changed[:, 30] = torch.randn(2, 2, 16)
    valid = torch.ones(1, TOKENS, dtype=torch.bool)
    with torch.no_grad():
        moved = (network(z, valid) - network(changed, valid)).abs().amax((0, 2))
    assert moved.gt(1e-6).nonzero().flatten().tolist() == list(range(20, 41))


def test_within_reach_it_is_attention_to_everything() -> None:
    """What a shipped guard was measured on, it reads as it did when it was."""
    torch.manual_seed(0)
    near, far = (ContextNetwork(SHAPE, 0, 32, 2, reach_tokens=r).eval() for r in (29, 0))
    far.load_state_dict(near.state_dict())
    z, valid = torch.randn(2, 30, 2, 2, 16), torch.arange(30) < torch.tensor([[30], [11]])
    with torch.no_grad():
        assert torch.equal(near(z, valid), far(z, valid))
        longer = torch.cat((z, z[:, :1]), 1)
        more = torch.cat((valid, valid[:, :1]), 1)
        assert not torch.allclose(near(longer, more), far(longer, more))


def test_padding_beyond_reach_harms_nobody() -> None:
    torch.manual_seed(0)
    network = ContextNetwork(SHAPE, 0, 32, 2, reach_tokens=5).eval()
    z = torch.randn(2, 60, 2, 2, 16)
    valid = torch.arange(60) < torch.tensor([[60], [20]])
    with torch.no_grad():
        both = network(z, valid)
        alone = network(z[1:, :20], valid[1:, :20])
    assert bool(both.isfinite().all())
    torch.testing.assert_close(both[1:, :20], alone, atol=1e-5, rtol=1e-4)


def test_a_guard_that_was_applied_can_be_trained_on() -> None:
    """What is kept from one call to the next belongs to no mode of PyTorch's."""
    torch.manual_seed(0)
    network = ContextNetwork(SHAPE, 0, 32, 1, reach_tokens=6)
    z, valid = torch.randn(1, TOKENS, 2, 2, 16), torch.ones(1, TOKENS, dtype=torch.bool)
    with torch.inference_mode():
        list(network.stream(z.split(16, 1)))
    network(z, valid).square().sum().backward()
    assert network.read.weight.grad is not None
    assert bool(network.read.weight.grad.isfinite().all())


@pytest.mark.parametrize("sizes", [(TOKENS,), (16, 16, 16, 16, 6), (1, 40, 2, 27)])
@pytest.mark.parametrize("reach", [1, 5, 16, 200])
def test_a_stream_of_tiles_is_read_like_the_whole(sizes: tuple[int, ...], reach: int) -> None:
    torch.manual_seed(0)
    network = ContextNetwork(SHAPE, 0, 32, 2, reach_tokens=reach).eval()
    z, valid = torch.randn(1, TOKENS, 2, 2, 16), torch.ones(1, TOKENS, dtype=torch.bool)
    with torch.no_grad():
        made = list(network.stream(z.split(sizes, 1)))
        wanted = network(z, valid)
    assert [m.shape[1] for m in made] == list(sizes)
    torch.testing.assert_close(torch.cat(made, 1), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("small_tiles")
def test_a_detector_marks_tile_by_tile_what_it_marks_at_once() -> None:
    kv, mask, options = random_kv((TOKENS,)), forbid_all(1), {"reach_tokens": 7, "peak": 0.0}
    module = module_of("twin", **options).eval()
    assert isinstance(module, TwinGuard)
    with torch.no_grad():
        logits = module.logits(kv)
    middle = float(logits.amax(2).median()) + 1e-3
    guard = guard_of("twin", **options, thresholds=[middle] * len(CATEGORIES))
    whole, tiles = guard.marks(kv, mask), passage_of(guard, kv, mask).marks()
    assert whole is not None
    assert tiles is not None
    assert torch.equal(whole, tiles)
    assert 0 < int((whole >= 0).sum()) < TOKENS
    assert passage_of(guard_of("gate"), kv, mask).marks() is None


# -- who may


def test_a_guard_that_says_nothing_is_given_the_whole_segment() -> None:
    """Also one that inherits from a guard by token: it may do more."""

    class Theirs(GateGuard):
        def forward(self, kv: KVBatch, mask: Mask, generator: Any = None) -> Any:
            out, rewrite = super().forward(kv, mask, generator)
            return KVBatch(out.keys * 0 + 1, out.values, out.valid), rewrite

    guard = FrozenGuard(Theirs.build(SHAPE, len(CATEGORIES), GUARDS["gate"]))
    passage = passage_of(guard, random_kv((TOKENS,)), forbid_all(1))
    assert passage.tiles == [(0, TOKENS)]
    assert bool((passage.block(KEY, 3, 9).keys == 1).all())

    class Called(FrozenGuard):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    with pytest.raises(GuardError, match="has a call of its own: override passage too"):
        passage_of(Called(guard.module), random_kv((TOKENS,)), forbid_all(1))


def test_what_does_not_fit_is_refused() -> None:
    guard, kv = guard_of("gate"), random_kv((TOKENS,))
    with pytest.raises(GuardError, match=r"\(2, 2, 8\), the segment has \(2, 1, 8\)"):
        passage_of(guard, random_kv((TOKENS,), (2, 1, 8)), forbid_all(1))
    with pytest.raises(GuardError, match="mask of shape"):
        passage_of(guard, kv, forbid_all(2))
    with pytest.raises(GuardError, match="sends the twin's KV"):
        guard_of("redact").passage(HeldTokens(kv), forbid_all(1))
    with pytest.raises(ValueError, match=r"2 segments of \[5, 3\] tokens in 5 places"):
        HeldTokens(random_kv((5, 3)))
    with pytest.raises(ValueError, match=r"tokens 60\.\.71 are not of 70"):
        passage_of(guard, kv, forbid_all(1)).block(KEY, 60, 71)


@pytest.mark.usefixtures("small_tiles")
def test_a_tile_that_is_not_finite_is_withheld() -> None:
    kv = random_kv((TOKENS,))
    kv.values[0, 0, 0, 40, 2] = float("nan")
    passage = passage_of(guard_of("gaussian"), kv, forbid_all(1))
    passage.block(KEY, 0, 32)
    with pytest.raises(GuardError, match="not finite; withheld"):
        passage.block(KEY, 30, 41)
    huge = guard_of("gaussian")
    huge.module.center.fill_(1e6)  # finite here, and not in the dtype that is sent
    with pytest.raises(GuardError, match="not finite; withheld"):
        passage_of(huge, random_kv((4,)), forbid_all(1), dtype=torch.float16).block(KEY, 0, 4)


# -- memory

WIDE = KVShape(8, 4, 64)
"""16 KiB a token in float32: larger, as in a model, than what the context network keeps of it."""


FITTED_OR_WHOLE = {"erasure", "compose", "cloak", "trace_gate", "kveraser"}


def module_for(name: str) -> GuardModule:
    options = {**GUARDS[name], **({"reach_tokens": 32} if "width" in GUARDS[name] else {})}
    return guard_class(name).build(WIDE, len(CATEGORIES), options)


@pytest.mark.parametrize("name", [n for n in GUARDS if n not in FITTED_OR_WHOLE])
def test_more_tokens_take_hardly_more_memory(name: str) -> None:
    """Beside the segment: 5% of what was added, for what a guard knows of each token."""
    from scripts.publish_memory import peak_bytes

    guard, taken = FrozenGuard(module_for(name)), []
    sizes = 256, 512
    for n in sizes:
        kv = random_kv((n,), (*WIDE,))
        keys, values = (torch.empty_like(x[0]) for x in (kv.keys, kv.values))
        passage = passage_of(guard, kv, forbid_all(1))
        taken.append(peak_bytes(lambda p=passage, k=keys, v=values: p.fill(KEY, k, v)))
    added = (sizes[1] - sizes[0]) * WIDE.channels * 4
    assert taken[1] - taken[0] < 0.05 * added
    assert taken[0] < 8 * guard.module.tile_tokens(sizes[0]) * WIDE.channels * 4
