"""Segments on disk: what is saved is loaded, and nothing that was altered or is foreign."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from lcguard import segment_folder
from lcguard.handoff.keys import deployment_key, new_key
from lcguard.manifest import (
    Manifest,
    SegmentError,
)
from lcguard.model_digest import config_digest
from lcguard.segment import KVSegment
from lcguard.segment_folder import MANIFEST_FILE, TENSOR_FILE
from tests.core.tiny_models import (
    FIRST,
    SECOND,
    YARN,
    make_config,
    segment_of,
)

KEY = bytes(range(32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copy", [False, True])
def test_round_trip(tmp_path: Path, llama: Any, dtype: torch.dtype, copy: bool) -> None:
    segment = segment_of(llama.to(dtype))
    assert segment.keys.dtype == dtype
    signed = segment.save(tmp_path / "s", KEY)
    loaded = KVSegment.load(
        tmp_path / "s",
        KEY,
        config=llama.config,
        expect_guard="b" * 64,
        expect_policy="a" * 64,
        expect={"model_id": "tiny", "edge": "clerk>analyst", "hop": 0},
        copy=copy,
    )
    assert torch.equal(loaded.keys, segment.keys)
    assert torch.equal(loaded.values, segment.values)
    assert loaded.manifest == signed.manifest
    loaded.verify(KEY, config=llama.config)
    files = sorted(p.name for p in tmp_path.rglob("*"))
    assert files == ["manifest.json", "s", "segment.safetensors"]
    if sys.platform == "linux":
        mapped = str(tmp_path / "s" / TENSOR_FILE) in Path("/proc/self/maps").read_text()
        assert mapped != copy


@pytest.fixture
def saved(tmp_path: Path, llama: Any) -> tuple[Path, PretrainedConfig]:
    segment_of(llama, FIRST[:3]).save(tmp_path / "s", KEY)
    return tmp_path / "s", llama.config


def rejected(folder: Path, message: str, key: bytes = KEY, **options: Any) -> None:
    with pytest.raises(SegmentError, match=message) as caught:
        KVSegment.load(folder, key, **options)
    assert "\n" not in str(caught.value)


def test_mismatches_name_both_sides(saved: tuple[Path, PretrainedConfig]) -> None:
    folder, config = saved
    own, other = config_digest(config), config_digest(make_config("qwen3"))
    rejected(folder, "HMAC .* another key, or altered", key=bytes(32), config=config)
    rejected(folder, f"{own}.*{other}", config=make_config("qwen3"))
    rejected(folder, f"{own}.*{'0' * 64}", expect_model_digest="0" * 64)
    guard, policy = {"expect_guard": "c" * 64}, {"expect_policy": "d" * 64}
    rejected(folder, f"guard_digest.*{'b' * 64}.*{'c' * 64}", config=config, **guard)
    rejected(folder, f"policy_digest.*{'a' * 64}.*{'d' * 64}", config=config, **policy)
    rejected(folder, "revision.*'r1'.*'r9'", config=config, expect={"revision": "r9"})
    both = {"config": make_config("qwen3"), "expect_model_digest": own}
    rejected(folder, f"{own}.*{other}", **both)
    rejected(folder.parent / "none", "manifest.json is unreadable", config=config)
    with pytest.raises(ValueError, match="no manifest field"):
        KVSegment.load(folder, KEY, config=config, expect={"edges": "x"})
    with pytest.raises(ValueError, match="give one of them"):
        KVSegment.load(folder, KEY)
    with pytest.raises(ValueError, match="16 bytes, 32 are needed"):
        KVSegment.load(folder, bytes(16), config=config)


def test_rope_of_another_model(saved: tuple[Path, PretrainedConfig]) -> None:
    folder, _ = saved
    rejected(folder, "config_digest", config=make_config("llama", rope_parameters=YARN))


def test_every_altered_byte_is_found(saved: tuple[Path, PretrainedConfig]) -> None:
    folder, config = saved
    digest = config_digest(config)
    for name, step in ((MANIFEST_FILE, 1), (TENSOR_FILE, 5)):
        path, data = folder / name, (folder / name).read_bytes()
        for index in range(0, len(data), step):
            path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
            rejected(folder, ".", expect_model_digest=digest)
        for length in (0, 7, 60, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:length])
            rejected(folder, ".", expect_model_digest=digest)
        path.write_bytes(data + b"\0")
        rejected(folder, ".", expect_model_digest=digest)
        path.unlink()
        rejected(folder, f"{name} is unreadable", expect_model_digest=digest)
        path.write_bytes(data)
    KVSegment.load(folder, KEY, expect_model_digest=digest)


def test_other_tensors_are_refused(saved: tuple[Path, PretrainedConfig]) -> None:
    folder, config = saved
    tensors = load_file(folder / TENSOR_FILE)
    tensors = {k: t.clone() for k, t in tensors.items()}
    save_file(tensors | {"more": torch.zeros(1)}, folder / TENSOR_FILE)
    rejected(folder, "found .'keys', 'more', 'values'.", config=config)
    save_file({k: t[:, :, :2].clone() for k, t in tensors.items()}, folder / TENSOR_FILE)
    rejected(folder, "keys: found .*2, 8.*the manifest says .*3, 8", config=config)
    save_file({"keys": tensors["values"], "values": tensors["keys"]}, folder / TENSOR_FILE)
    rejected(folder, "keys: SHA-256 is .* the manifest says", config=config)


def test_a_rewritten_manifest_needs_the_key(saved: tuple[Path, PretrainedConfig]) -> None:
    folder, config = saved
    path = folder / MANIFEST_FILE
    manifest = Manifest.decode(path.read_bytes())
    path.write_bytes(manifest.model_copy(update={"guard_digest": "c" * 64}).encode())
    rejected(folder, "HMAC", config=config)
    path.write_bytes(manifest.model_copy(update={"hmac": ""}).encode())
    rejected(folder, "unsigned", config=config)
    path.write_bytes(json.dumps(json.loads(manifest.encode()), indent=1).encode())
    rejected(folder, "canonical", config=config)
    path.write_bytes(manifest.encode().replace(b'"format_version":2', b'"format_version":3'))
    rejected(folder, "format_version", config=config)
    # The right HMAC must not be in a message: it would sign the forgery.
    forged = manifest.model_copy(update={"hop": 9})
    with pytest.raises(SegmentError) as caught:
        forged.verify(KEY)
    assert forged.sign(KEY).hmac[:12] not in str(caught.value)


def test_segments_are_immutable(tmp_path: Path, llama: Any) -> None:
    segment = segment_of(llama)
    segment.save(tmp_path / "s", KEY)
    before = (tmp_path / "s" / TENSOR_FILE).read_bytes()
    with pytest.raises(SegmentError, match="s exists"):
        segment_of(llama, SECOND).save(tmp_path / "s", KEY)
    assert (tmp_path / "s" / TENSOR_FILE).read_bytes() == before
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SegmentError, match="dangling exists"):
        segment.save(tmp_path / "dangling", KEY)
    segment.keys[0, 0, 0, 0] += 1
    with pytest.raises(SegmentError, match="keys: SHA-256"):
        segment.save(tmp_path / "t", KEY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "s"]


@pytest.mark.parametrize("step", ["save_file", "_flush"])
def test_nothing_is_left_after_a_failed_save(
    tmp_path: Path, llama: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment_folder, step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        segment_of(llama).save(tmp_path / "s", KEY)
    assert list(tmp_path.iterdir()) == []


def test_a_rival_writer_wins_whole(
    tmp_path: Path, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment, flush = segment_of(llama), segment_folder._flush

    def rival(path: Path) -> None:
        flush(path)
        monkeypatch.setattr(segment_folder, "_flush", flush)
        segment.save(tmp_path / "s", KEY)

    monkeypatch.setattr(segment_folder, "_flush", rival)
    with pytest.raises(SegmentError, match="s exists"):
        segment_of(llama, SECOND).save(tmp_path / "s", KEY)
    loaded = KVSegment.load(tmp_path / "s", KEY, config=llama.config)
    assert torch.equal(loaded.keys, segment.keys)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_rewrite_by_a_guard(tmp_path: Path, llama: Any) -> None:
    segment = segment_of(llama, guard_digest="").sign(KEY)
    guarded = segment.rewrite(segment.keys * 0, segment.values, guard_digest="e" * 64, hop=1)
    assert guarded.manifest.hmac == ""
    assert guarded.manifest.tensor_digests.keys != segment.manifest.tensor_digests.keys
    guarded.save(tmp_path / "s", KEY)
    loaded = KVSegment.load(tmp_path / "s", KEY, config=llama.config, expect_guard="e" * 64)
    assert loaded.manifest.hop == 1
    with pytest.raises(ValueError, match="hmac"):
        segment.rewrite(segment.keys, segment.values, hmac="0" * 64)
    with pytest.raises(SegmentError, match="keys: found"):
        KVSegment(segment.keys[:1], segment.values, segment.manifest)


def test_manifest_takes_no_text(llama: Any) -> None:
    for name, value in (("edge", "the salary is 90000"), ("source_agent", "x" * 300)):
        with pytest.raises(ValidationError, match=name):
            segment_of(llama, **{name: value})
    with pytest.raises(ValidationError, match="Extra inputs"):
        Manifest(**dict(segment_of(llama).manifest), token_ids=[1])
    with pytest.raises(ValidationError, match="created_at"):
        Manifest(**(dict(segment_of(llama).manifest) | {"created_at": "yesterday"}))
    with pytest.raises(ValidationError, match="frozen"):
        segment_of(llama).manifest.hop = 3


def test_config_digest_is_of_the_architecture() -> None:
    base = config_digest(make_config("llama"))
    assert base == config_digest(make_config("llama", use_cache=False, initializer_range=0.1))
    changes = [{"num_hidden_layers": 3}, {"rms_norm_eps": 1e-3}, {"rope_parameters": YARN}]
    digests = {config_digest(make_config("llama", **c)) for c in changes}
    assert len(digests | {base}) == 4


def test_deployment_key(monkeypatch: pytest.MonkeyPatch) -> None:
    text = new_key()
    assert text != new_key()
    monkeypatch.setenv("LCGUARD_KEY", text)
    assert deployment_key() == bytes.fromhex(text)
    for value, message in (("", "not set"), ("secret!", "hexadecimal"), ("ab" * 16, "16 bytes")):
        monkeypatch.setenv("LCGUARD_KEY", value)
        with pytest.raises(ValueError, match=message) as caught:
            deployment_key()
        assert not value or value not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
