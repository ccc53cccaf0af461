"""A model that cannot be had: one line that names it and says where it was looked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub.utils import logging

from lcguard.agents.backends.hf import load_backend
from lcguard.hub import quiet_hub, why_not_loaded


def test_verbosity_comes_back_after_an_error() -> None:
    def fail() -> None:
        with quiet_hub():
            assert logging.get_verbosity() > logging.WARNING
            raise OSError("gone")

    before = logging.get_verbosity()
    with pytest.raises(OSError, match="gone"):
        fail()
    assert logging.get_verbosity() == before


def test_a_folder_is_not_called_a_repository(tmp_path: Path) -> None:
    assert why_not_loaded(str(tmp_path), OSError("a\nb")).endswith("cannot be loaded: a")
    assert "is no folder here" in why_not_loaded(str(tmp_path / "typo"), OSError())


def test_a_mistyped_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="model 'my-modl' is no folder here"):
        load_backend("my-modl")


def test_an_unsupported_architecture_is_refused_before_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"model_type='mamba' .* use a model with"):
        load_backend(str(tmp_path))
