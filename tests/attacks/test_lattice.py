"""Who tries candidates against the last bits of the noise learns no more than the noise allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch

from lcguard.noise import segment_noise
from lcguard.protocols import KVBatch
from tests.attacks.lattice import (
    Note,
    Ranks,
    advantages,
    attack,
    by_module,
    by_pages,
    gate,
    notes,
    raw_kv,
)
from tests.ops.test_ops_triton import child, needs_triton

BEFORE = "before float32"
Found = dict[str, list[Ranks]]
Route = Callable[[Note, KVBatch, torch.dtype], KVBatch]


def check(found: Found, candidates: int) -> None:
    """Under the noise of before the attack puts the number first, or nearly. Now its ranks are
    anywhere, and by no path and dtype below those of Gaussian scores by more than chance."""
    assert median(r.both for r in found[BEFORE]) <= 0.02 * candidates
    for name in set(found) - {BEFORE}:
        assert median(r.lattice for r in found[name]) > 0.05 * candidates, name
        for kind, (mean, error) in advantages(found[name]).items():
            assert mean <= 2 * error, f"{name}, {kind}: {mean:.2f} +- {error:.2f} nats"


def test_the_lattice_attack_fails_where_it_read_numbers_before() -> None:
    found = attack(6, 200, kernel=False)
    assert len(found) == 5
    assert all(len(rows) == 6 for rows in found.values())
    check(found, 200)


@pytest.mark.parametrize("path", [by_module, by_pages])
def test_what_is_sent_is_the_certificates_grid_point_and_the_draw(path: Route) -> None:
    """With the shipped gate, through its expansion and the pages' rotation: whole numbers, and but
    for a mean near a tie those that the certificate reckons with."""
    (note,) = notes(1)
    raw = raw_kv(note)
    points = gate().grid_points(path(note, raw, torch.float32), note.mask)
    draws = segment_noise(note.key, tuple(gate().shape), points.shape[1])
    apart = (points - gate().grid_mean(raw, note.mask) - draws).abs()
    assert float((points - points.round()).abs().max()) < 0.2
    assert float(apart.max()) < 1.2
    assert float((apart > 0.5).double().mean()) < 0.01


@needs_triton
@pytest.mark.slow
def test_twenty_notes_by_every_path(tmp_path: Path) -> None:
    """The kernels too; ``python -m tests.attacks.lattice 20 10000`` tries all numbers there are."""
    printed = child("tests.attacks.lattice", tmp_path, "20", "200", TRITON_INTERPRET="1")
    found = {name: [Ranks(*row) for row in rows] for name, rows in printed.items()}
    assert len(found) == 7
    assert all(len(rows) == 20 for rows in found.values())
    check(found, 200)
