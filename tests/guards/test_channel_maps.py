"""The three sizes of a gate's linear maps: each starts as the identity and is undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lcguard.categories import CATEGORIES
from lcguard.guards import channel_maps
from lcguard.guards.base import KVShape, guard_class
from lcguard.guards.channel_maps import OF_INVERSE, Kind
from tests.fixtures import forbid_all, random_kv
from tests.guards.every_guard import SHAPE, guard_of, module_of

KINDS: tuple[Kind, ...] = ("full", "per_head", "low_rank")
QWEN3_8B = KVShape(36, 8, 128)


def some(kind: Kind) -> Tensor:
    torch.manual_seed(0)
    start = channel_maps.identity(kind, SHAPE, 3)
    return start + 0.1 * torch.randn_like(start)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_identity(kind: Kind) -> None:
    start, z = channel_maps.identity(kind, SHAPE, 3), torch.randn(2, 5, 2, 2, 16)
    torch.testing.assert_close(channel_maps.apply(kind, z, start), z)
    assert all(channel_maps.is_identity(kind, layer) for layer in start)
    assert not any(channel_maps.is_identity(kind, layer) for layer in some(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_matrix_that_it_says_and_is_undone(kind: Kind) -> None:
    matrix, z = some(kind).double(), torch.randn(2, 5, 2, 2, 16, dtype=torch.float64)
    out = channel_maps.apply(kind, z, matrix)
    dense = torch.stack([channel_maps.dense(kind, layer) for layer in matrix])
    torch.testing.assert_close(out, channel_maps.apply("full", z, dense))
    back = channel_maps.inverse(kind, matrix)
    torch.testing.assert_close(channel_maps.apply(OF_INVERSE[kind], out, back), z)


def test_keeps_to_the_head_or_does_not() -> None:
    z = torch.zeros(1, 1, 2, 2, 16)
    z[..., 3] = 1  # of head 0
    for kind in KINDS:
        reached = (channel_maps.apply(kind, z, some(kind)) != 0)[..., 8:].any()
        assert bool(reached) == (kind != "per_head")


@pytest.mark.parametrize(
    ("options", "most"),
    [({"maps": "per_head"}, 80e6), ({"maps": "low_rank"}, 20e6), ({"maps": "full"}, 610e6)],
)
def test_weights_at_the_size_of_a_large_model(options: dict[str, Any], most: float) -> None:
    """Of both maps, counted without making them."""
    with torch.device("meta"):
        module = guard_class("gate").build(QWEN3_8B, len(CATEGORIES), options)
    taken = sum(p.nbytes for n, p in module.named_parameters() if n in ("squeeze", "expand"))
    assert most / 2 < taken < most


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_of_any_kind_tells_its_grid_points(kind: Kind) -> None:
    """What an attacker of a gate undoes: the map, and nothing else."""
    guard = guard_of("gate", maps=kind, rank=3, noise=0.2)
    kv, mask = random_kv((6,)), forbid_all(1)
    points = guard.module.grid_points(guard(kv, mask).kv, mask)
    assert float((points - points.round()).abs().max()) < 0.45


def test_unknown_maps_and_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="maps 'tiny' are unknown: use full, per_head, low_rank"):
        module_of("gate", maps="tiny")
    with pytest.raises(ValueError, match="rank 17 must be within 1 and the 16 channels"):
        module_of("gate", maps="low_rank", rank=17)
