"""A segment continues exactly like the text it came from, and only an unaltered one loads.

Tolerance: 1e-5 of the largest logit. Float32 rounding of these two-layer models was at most 2.2e-6
of it; leaving out one rotation changed logits by at least 0.15 of it (asserted: 1e-3).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PretrainedConfig
from transformers.cache_utils import StaticCache

from lcguard import cache as cache_module
from lcguard import segment_folder
from lcguard.cache import cache_to_kv, check_supported, check_window, kv_to_cache
from lcguard.handoff.keys import deployment_key, new_key
from lcguard.manifest import (
    Manifest,
    SegmentError,
)
from lcguard.model_digest import config_digest
from lcguard.protocols import KVBatch
from lcguard.rope import Rotary, UnsupportedModelError
from lcguard.segment import KVSegment, segments_to_cache
from lcguard.segment_folder import MANIFEST_FILE, TENSOR_FILE

TOLERANCE = 1e-5
KEY = bytes(range(32))
FIRST, SECOND, SUFFIX = torch.arange(3, 14), torch.arange(40, 25, -1), torch.tensor([7, 50, 9])
FIELDS: dict[str, Any] = {
    "model_id": "tiny",
    "revision": "r1",
    "source_agent": "clerk",
    "edge": "clerk>analyst",
    "policy_digest": "a" * 64,
    "guard_digest": "b" * 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-partial": (
        "phi3",
        {"sliding_window": None, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
    "gemma2": ("gemma2", {"sliding_window": 64}),
}


def make_config(kind: str, **changes: Any) -> PretrainedConfig:
    """Two layers, H = 2 KV heads, D = 8."""
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind != "phi3":
        fields["head_dim"] = 8
    if "rope_parameters" in changes:
        changes["rope_parameters"] = {"rope_theta": 1e4, **changes["rope_parameters"]}
    return CONFIG_MAPPING[kind](**(fields | changes))


def make_model(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    kind, changes = MODELS[request.param]
    return make_model(make_config(kind, **changes))


@pytest.fixture
def llama() -> Any:
    return make_model(make_config("llama"))


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor, offset: int = 0, cache: Any = None) -> DynamicCache:
    cache = DynamicCache(config=model.config) if cache is None else cache
    positions = torch.arange(offset, offset + len(ids))[None]
    model(input_ids=ids[None], position_ids=positions, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, cache: Any, offset: int) -> torch.Tensor:
    """``[len(ids), V]`` of ``ids`` at positions ``offset ..`` behind ``cache``."""
    positions = torch.arange(offset, offset + len(ids))[None]
    output = model(input_ids=ids[None], position_ids=positions, past_key_values=cache)
    return output.logits[0]


def greedy(model: Any, cache: Any, offset: int, n_tokens: int = 12) -> list[int]:
    ids, found = SUFFIX, []
    for _ in range(n_tokens):
        found.append(int(logits(model, ids, cache, offset)[-1].argmax()))
        offset, ids = offset + len(ids), torch.tensor(found[-1:])
    return found


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((a - b).abs().max() / a.abs().max())


def segment_of(model: Any, ids: torch.Tensor = FIRST, offset: int = 0, **changes: Any) -> KVSegment:
    cache = prefill(model, ids, offset)
    return KVSegment.from_cache(cache, model.config, offset=offset, **(FIELDS | changes))


def test_continues_like_the_full_text(model: Any) -> None:
    n = len(FIRST)
    full = logits(model, torch.cat((FIRST, SUFFIX)), DynamicCache(), 0)[n:]
    # Prefilled elsewhere, so that un-rotation and rotation both have work to do.
    segment = segment_of(model, offset=23)
    found = logits(model, SUFFIX, segment.to_cache(model.config, suffix_tokens=3), n)
    assert distance(full, found) < TOLERANCE
    expected = greedy(model, prefill(model, FIRST), n)
    assert greedy(model, segment.to_cache(model.config, suffix_tokens=15), n) == expected

    raw = cache_to_kv(prefill(model, FIRST, 23), Rotary.from_config(model.config), 0)
    wrong = kv_to_cache(raw, Rotary.from_config(model.config), model.config)
    assert distance(full, logits(model, SUFFIX, wrong, n)) > 1e-3


def test_two_segments_are_block_diagonal_contexts(model: Any) -> None:
    n, m = len(FIRST), len(SECOND)
    reference = prefill(model, FIRST)
    second = prefill(model, SECOND, offset=n)
    for index, layer in enumerate(second.layers):
        reference.update(layer.keys, layer.values, index)
    expected = logits(model, SUFFIX, reference, n + m)

    segments = [segment_of(model, FIRST), segment_of(model, SECOND)]
    found = logits(model, SUFFIX, segments_to_cache(segments, model.config), n + m)
    assert distance(expected, found) < TOLERANCE

    alone = segments[1].to_cache(model.config, offset=n)
    for mine, theirs in zip(alone.layers, second.layers, strict=True):
        assert distance(theirs.keys, mine.keys) < TOLERANCE

    stale = prefill(model, FIRST)  # the second segment's keys left at position 0
    for index, layer in enumerate(prefill(model, SECOND).layers):
        stale.update(layer.keys, layer.values, index)
    assert distance(expected, logits(model, SUFFIX, stale, n + m)) > 1e-3


def test_generate_continues_from_a_segment(llama: Any) -> None:
    ids = torch.cat((FIRST, SUFFIX))[None]
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = llama.generate(ids, attention_mask=torch.ones_like(ids), **options)
    cache = segment_of(llama).to_cache(llama.config, suffix_tokens=11)
    mask = torch.ones_like(ids)
    found = llama.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(expected, found)


def test_padded_batch_and_offset_per_record(llama: Any) -> None:
    rotary, n = Rotary.from_config(llama.config), len(FIRST)
    short = n - 4
    ids = torch.stack((FIRST, torch.cat((FIRST[:short], torch.zeros(4, dtype=torch.long)))))
    valid = torch.arange(n) < torch.tensor([[n], [short]])
    cache = DynamicCache()
    with torch.no_grad():
        llama(input_ids=ids, attention_mask=valid.long(), past_key_values=cache)
    kv = cache_to_kv(cache, rotary, 0, valid)
    assert torch.equal(kv.valid, valid)
    offset = torch.tensor([0, 30])
    moved = kv_to_cache(kv, rotary, llama.config, offset)
    for b, length in enumerate((n, short)):
        alone = prefill(llama, ids[b, :length], int(offset[b]))
        for mine, theirs in zip(moved.layers, alone.layers, strict=True):
            assert distance(theirs.keys[0], mine.keys[b, :, :length]) < TOLERANCE
    back = cache_to_kv(moved, rotary, offset)
    assert torch.allclose(back.keys, kv.keys, atol=1e-5)
    suffix_positions = torch.arange(3) + (offset + valid.sum(1))[:, None]
    with torch.no_grad():
        found = llama(
            input_ids=SUFFIX.expand(2, -1),
            position_ids=suffix_positions,
            attention_mask=torch.cat((valid, torch.ones(2, 3, dtype=torch.bool)), 1).long(),
            past_key_values=moved,
        ).logits
    full = logits(llama, torch.cat((FIRST[:short], SUFFIX)), DynamicCache(), 0)[short:]
    assert distance(full, found[1]) < TOLERANCE


def test_part_of_a_cache_keeps_its_positions(llama: Any) -> None:
    rotary = Rotary.from_config(llama.config)
    cache = prefill(llama, FIRST)
    part = cache_to_kv(cache, rotary, start=4, stop=9)
    again = kv_to_cache(part, rotary, llama.config, offset=4)
    for mine, theirs in zip(again.layers, cache.layers, strict=True):
        assert torch.allclose(mine.keys, theirs.keys[..., 4:9, :], atol=1e-5)
        assert torch.equal(mine.values, theirs.values[..., 4:9, :])
    for start, stop in ((3, 3), (0, 12), (-1, 4)):
        with pytest.raises(ValueError, match="are not in a cache of 11 tokens"):
            cache_to_kv(cache, rotary, start=start, stop=stop)


def test_gradient_reaches_keys_and_values(llama: Any) -> None:
    rotary = Rotary.from_config(llama.config)
    kv = cache_to_kv(prefill(llama, FIRST), rotary)
    keys, values = (t.detach().requires_grad_() for t in (kv.keys, kv.values))
    cache = kv_to_cache(KVBatch(keys, values, kv.valid), rotary, llama.config)
    positions = torch.arange(11, 14)[None]
    output = llama(input_ids=SUFFIX[None], position_ids=positions, past_key_values=cache)
    output.logits.square().mean().backward()
    for grad in (keys.grad, values.grad):
        assert grad is not None
        assert bool((grad.abs().amax((0, 2, 3, 4)) > 0).all())


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_sliding_window_is_exact_or_refused(kind: str) -> None:
    window = len(FIRST) + len(SUFFIX)
    model = make_model(make_config(kind, sliding_window=window))
    wide = make_model(make_config(kind, sliding_window=200))
    segment = segment_of(model)
    cache = segment.to_cache(model.config, suffix_tokens=3)
    full = logits(wide, torch.cat((FIRST, SUFFIX)), DynamicCache(), 0)[11:]
    assert distance(full, logits(model, SUFFIX, cache, 11)) < TOLERANCE
    message = rf"11 segment \+ 4 suffix tokens = 15 exceed sliding_window={window}"
    with pytest.raises(UnsupportedModelError, match=message):
        segment.to_cache(model.config, suffix_tokens=4)
    # The window is where exactness ends: one token more and the models part.
    long = torch.cat((FIRST, SUFFIX, torch.tensor([33])))
    narrow = logits(model, long, DynamicCache(), 0)
    assert distance(narrow[-1], logits(wide, long, DynamicCache(), 0)[-1]) > 1e-3
    dropped = prefill(model, torch.cat((FIRST, SECOND)))
    with pytest.raises(UnsupportedModelError, match=f"saw 26 tokens and kept {window - 1}"):
        cache_to_kv(dropped, Rotary.from_config(model.config))
    # A cache without config keeps all tokens, of which the sender's layers did not see all.
    kept = prefill(model, torch.cat((FIRST, SECOND)), cache=DynamicCache())
    with pytest.raises(UnsupportedModelError, match=f"exceed sliding_window={window}"):
        KVSegment.from_cache(kept, model.config, **FIELDS)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mla": ("deepseek_v3", {}, "kv_lora_rank=512"),
    "encoder-decoder": ("t5", {}, "encoder-decoder"),
    "mamba": ("jamba", {}, "attn_layer_period=8"),
    "linear-attention": ("qwen3_next", {}, "recurrent"),
    "conv": ("lfm2", {}, "conv_L_cache"),
    "shared-kv": ("gemma3n_text", {}, "shares KV between layers"),
    "multimodal": ("gemma3", {}, "get_text_config"),
    "chunked": ("llama", {"attention_chunk_size": 32}, "chunked_attention"),
    "quantised": (
        "llama",
        {"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}},
        "kv_cache_scheme",
    ),
    "rope": ("glm", {}, "interleaved"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_unsupported_models_are_refused_by_name(name: str) -> None:
    kind, changes, words = REFUSED[name]
    config = CONFIG_MAPPING[kind](**changes)
    with pytest.raises(UnsupportedModelError) as caught:
        check_supported(config)
    for word in (words, kind, ":"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unsupported_caches_are_refused_by_name(llama: Any) -> None:
    rotary = Rotary.from_config(llama.config)
    with pytest.raises(UnsupportedModelError, match="StaticLayer: prefill a DynamicCache"):
        cache_to_kv(StaticCache(config=llama.config, max_cache_len=16), rotary)
    with pytest.raises(ValueError, match="layer 0 of the cache is empty"):
        cache_to_kv(DynamicCache(config=llama.config), rotary)

    class QuantizedLike(cache_module.DynamicLayer):
        """Subclasses may keep their tensors in another form."""

    cache = prefill(llama, FIRST)
    cache.layers[1].__class__ = QuantizedLike
    with pytest.raises(UnsupportedModelError, match="layer 1 of the cache is a QuantizedLike"):
        cache_to_kv(cache, rotary)
    with pytest.raises(ValueError, match="valid is"):
        cache_to_kv(prefill(llama, FIRST), rotary, valid=torch.ones(1, 3, dtype=torch.bool))


def test_kv_of_another_shape(llama: Any) -> None:
    kv = segment_of(llama).kv()
    wrong = KVBatch(kv.keys[:, :1], kv.values[:, :1], kv.valid)
    with pytest.raises(ValueError, match="do not fit a model"):
        kv_to_cache(wrong, Rotary.from_config(llama.config), llama.config)
    check_window(llama.config, 10**9)


def test_segments_of_two_models_do_not_mix(llama: Any) -> None:
    other = make_config("llama", num_attention_heads=2, head_dim=8)
    with pytest.raises(SegmentError, match="of tiny, the receiver's is"):
        segment_of(llama).to_cache(other)
    with pytest.raises(SegmentError, match="revision='r2', segment 0 has 'r1'"):
        segments_to_cache([segment_of(llama), segment_of(llama, revision="r2")], llama.config)
    with pytest.raises(ValueError, match="no segments"):
        segments_to_cache([], llama.config)


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
