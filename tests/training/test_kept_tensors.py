"""What a long job computed is found again, and half a file is not."""

from __future__ import annotations

from pathlib import Path

import torch

from lcguard.training.kept_tensors import KeptTensors


def test_tensors_come_back_by_their_key_and_owner(tmp_path: Path) -> None:
    kept, x = KeptTensors(tmp_path / "a", "model"), torch.arange(6.0).view(2, 3).T
    assert kept.get(["x", (1, 2)]) is None
    kept.put(["x", (1, 2)], {"x": x})
    found = KeptTensors(tmp_path / "a", "model").get(["x", (1, 2)])
    assert found is not None
    assert torch.equal(found["x"], x)
    assert kept.get(["x", (2, 1)]) is None
    assert KeptTensors(tmp_path / "a", "another").get(["x", (1, 2)]) is None


def test_a_broken_file_counts_as_nothing(tmp_path: Path) -> None:
    kept = KeptTensors(tmp_path)
    kept.put("x", {"x": torch.ones(3)})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert kept.get("x") is None


def test_without_a_folder_nothing_is_kept() -> None:
    kept = KeptTensors()
    kept.put("x", {"x": torch.ones(1)})
    assert kept.get("x") is None
