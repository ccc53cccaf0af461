"""Every supported model family and RoPE kind against transformers; every other one refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PretrainedConfig

from lcguard.cache import cache_to_kv
from lcguard.rope import MODEL_TYPES, Rotary, UnsupportedModelError
from tests.core.tiny_models import LLAMA3, SMALL, YARN

KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
}


def tiny(kind: str, **changes: Any) -> PretrainedConfig:
    """A two-layer config of model type ``kind`` with H = 2 KV heads, D = 8."""
    fields = dict(SMALL)
    if kind.startswith(("gemma", "qwen3", "llama", "mistral")):
        fields["head_dim"] = 8
    if kind in ("qwen2_moe", "qwen3_moe", "mixtral"):
        fields |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        fields |= {"num_local_experts": 4} if kind == "mixtral" else {}
        fields |= {"shared_expert_intermediate_size": 16} if kind == "qwen2_moe" else {}
    parameters = changes.pop("rope_parameters", None)
    if parameters is not None:
        fields["rope_parameters"] = {"rope_theta": 10000.0, **parameters}
    return CONFIG_MAPPING[kind](**(fields | changes))


def build(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
def keys_at(model: Any, offset: int) -> torch.Tensor:
    """Un-rotated keys ``[1, L, H, T, D]`` of one fixed text prefilled at ``offset``."""
    ids = torch.arange(3, 14)[None]
    positions = torch.arange(offset, offset + ids.shape[1])[None]
    cache = DynamicCache()
    model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache_to_kv(cache, Rotary.from_config(model.config), offset).keys


@pytest.mark.parametrize("kind", sorted(MODEL_TYPES))
def test_unrotated_keys_hold_no_position(kind: str) -> None:
    model = build(tiny(kind))
    here, there = keys_at(model, 0), keys_at(model, 101)
    # Float32 angles near 100 rad are off by 4e-6.
    assert (here - there).abs().max() < 1e-4 * here.abs().max()
    rotary = Rotary.from_config(model.config)
    moved = rotary.rotate(there, torch.arange(11) + 101)
    assert (here - moved).abs().max() > 0.05 * here.abs().max()  # negative control


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_equals_the_model_s_own_rotation(kind: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = tiny("llama", rope_parameters=KINDS[kind])
    rotary, theirs = Rotary.from_config(config), LlamaRotaryEmbedding(config)
    keys, positions = torch.randn(1, 2, 7, 8), torch.tensor([0, 1, 2, 50, 51, 200, 255])
    cos, sin = theirs(keys, positions[None])
    expected = apply_rotary_pos_emb(keys, keys, cos, sin)[1]
    assert torch.allclose(rotary.rotate(keys, positions), expected, rtol=0, atol=1e-6)
    assert torch.allclose(rotary.unrotate(expected, positions), keys, rtol=0, atol=1e-6)
    scaled = kind.startswith("yarn")
    assert (rotary.attention_scaling != 1.0) == scaled


def test_partial_rotation_leaves_the_rest() -> None:
    config = tiny("phi3", rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5})
    rotary = Rotary.from_config(config)
    assert (rotary.rotary_dim, rotary.head_dim) == (4, 8)
    keys = torch.randn(3, 8)
    turned = rotary.rotate(keys, torch.arange(5, 8))
    assert torch.equal(turned[:, 4:], keys[:, 4:])
    assert not torch.allclose(turned[:, :4], keys[:, :4])
    model = build(config)
    assert torch.allclose(keys_at(model, 0), keys_at(model, 64), rtol=0, atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    offset=st.integers(-1000, 200_000),
    seed=st.integers(0, 2**16),
)
def test_unrotate_inverts_rotate(kind: str, offset: int, seed: int) -> None:
    rotary = Rotary.from_config(tiny("llama", rope_parameters=KINDS[kind]))
    keys = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(5) + offset
    back = rotary.unrotate(rotary.rotate(keys, positions), positions)
    assert torch.allclose(back, keys, rtol=0, atol=2e-6)
    wide = keys.double()
    back = rotary.unrotate(rotary.rotate(wide, positions), positions)
    assert torch.allclose(back, wide, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_half_precision_round_trip(dtype: torch.dtype, bits: int) -> None:
    rotary = Rotary.from_config(tiny("llama", rope_parameters=YARN))
    keys, positions = torch.randn(2, 9, 8).to(dtype), torch.arange(9) + 77
    turned = rotary.rotate(keys, positions)
    assert turned.dtype == dtype
    error = (rotary.unrotate(turned, positions).float() - keys.float()).abs().max()
    # Two roundings of a pair: at most 2 * sqrt(2) half-ulps of the largest entry.
    assert error <= 2 * 2**0.5 * 2.0**-bits * keys.float().abs().max()


def test_positions_per_record_and_gradient() -> None:
    rotary = Rotary.from_config(tiny("llama"))
    keys = torch.randn(2, 3, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    positions = (torch.tensor([5, 90])[:, None] + torch.arange(4))[:, None, None]
    turned = rotary.rotate(keys, positions)
    for b, start in enumerate((5, 90)):
        alone = rotary.rotate(keys[b], torch.arange(4) + start)
        assert torch.equal(turned[b], alone)
    turned.square().sum().backward()  # a rotation keeps norms: d|Rk|^2 = 2k
    assert keys.grad is not None
    assert torch.allclose(keys.grad, 2 * keys.detach(), atol=1e-12)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.arange(4).float(), "integers"),
        (torch.arange(3), "last dimension is T"),
        (torch.tensor(1), "last dimension is T"),
    ],
)
def test_wrong_positions(positions: torch.Tensor, message: str) -> None:
    rotary = Rotary.from_config(tiny("llama"))
    with pytest.raises(ValueError, match=message):
        rotary.rotate(torch.zeros(4, 8), positions)
    with pytest.raises(ValueError, match="D=6"):
        rotary.rotate(torch.zeros(4, 6), torch.arange(4))


def test_describe_and_digest() -> None:
    import json

    yarn = Rotary.from_config(tiny("llama", rope_parameters=YARN))
    assert json.loads(json.dumps(yarn.describe())) == yarn.describe()
    assert yarn.digest == Rotary.from_config(tiny("llama", rope_parameters=YARN)).digest
    others = [{"factor": 8.0}, {"rope_theta": 5000.0}, {"beta_fast": 16}]
    digests = {
        Rotary.from_config(tiny("llama", rope_parameters=YARN | o)).digest for o in [{}, *others]
    }
    assert len(digests) == 4
    as_integer = Rotary.from_config(tiny("llama", rope_parameters={"rope_theta": 10000}))
    assert as_integer.digest == Rotary.from_config(tiny("llama")).digest
    assert hash(yarn) == hash(Rotary.from_config(tiny("llama", rope_parameters=YARN)))


def refused(config: PretrainedConfig, *words: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        Rotary.from_config(config)
    for word in (*words, "use" if "text config" not in words else "give"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "proportional"])
def test_kinds_without_one_table_are_refused(kind: str) -> None:
    config = tiny("llama")
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    refused(config, kind, "default, linear, llama3, yarn")


def test_mrope_and_layer_types_are_refused() -> None:
    config = tiny("llama")
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    refused(config, "M-RoPE", "[1, 1, 2]")
    refused(CONFIG_MAPPING["gemma3_text"](), "gemma3_text", "full_attention", "sliding_attention")


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("glm", "interleaved"),
        ("cohere", "interleaved"),
        ("hunyuan_v1_dense", "after rotation"),
        ("smollm3", "no_rope_layers"),
        ("stablelm", "not proved"),
    ],
)
def test_families_are_refused(kind: str, word: str) -> None:
    refused(CONFIG_MAPPING[kind](), kind, word)


def test_no_rope_and_an_ignored_factor_are_refused() -> None:
    refused(CONFIG_MAPPING["gpt2"](), "gpt2", "rope_parameters", "text config")
    partial = {"rope_type": "default", "partial_rotary_factor": 0.5}
    with pytest.raises(UnsupportedModelError, match=r"partial_rotary_factor=0\.5"):
        Rotary.from_config(tiny("llama", rope_parameters=partial))
