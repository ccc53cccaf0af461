"""A segment continues exactly like the text it came from, and only an unaltered one loads.

Tolerance: 1e-5 of the largest logit. Float32 rounding of these two-layer models was at most 2.2e-6
of it; leaving out one rotation changed logits by at least 0.15 of it (asserted: 1e-3)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache
from transformers.cache_utils import StaticCache

from lcguard import cache as cache_module
from lcguard.cache import cache_to_kv, check_supported, check_window, kv_to_cache
from lcguard.manifest import (
    SegmentError,
)
from lcguard.protocols import KVBatch
from lcguard.rope import Rotary, UnsupportedModelError
from lcguard.segment import KVSegment, segments_to_cache
from tests.core.tiny_models import (
    FIELDS,
    FIRST,
    SECOND,
    SUFFIX,
    make_config,
    make_model,
    prefill,
    segment_of,
)

TOLERANCE = 1e-5


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
