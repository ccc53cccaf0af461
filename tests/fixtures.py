"""Tiny models and records, made once per session: seconds on two cores, no download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from lcguard.agents.nano.tokenizer import train_tokenizer
from lcguard.agents.nano.training import NanoConfig, model_config
from lcguard.agents.scenarios.encode import Encoder
from lcguard.agents.scenarios.generator import GeneratorConfig, make_scenario
from lcguard.agents.scenarios.types import hops_of
from lcguard.categories import CATEGORIES
from lcguard.protocols import KVBatch, Mask
from lcguard.records import TokenRecord
from lcguard.source import ModelSource
from lcguard.tokens import Special

VOCAB = 640
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    # with a cap small enough to bend the logits of a random model
    "gemma2": {
        "sliding_window": 128,
        "final_logit_softcapping": 0.5,
        "attn_logit_softcapping": 0.5,
        "query_pre_attn_scalar": 16,
    },
    "phi3": {"sliding_window": None},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
}


def tiny_model(kind: str, **changes: Any) -> Any:
    """Two layers, H = 2 KV heads, D = 16, random weights, float32."""
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "attn_implementation": "eager",
    }
    config = CONFIG_MAPPING[kind](**(options | KINDS[kind] | changes))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def random_kv(
    lengths: Sequence[int], shape: tuple[int, int, int] = (2, 2, 8), seed: int = 0
) -> KVBatch:
    """Normal KV of ``(L, H, D)``, right-padded with zeros."""
    layers, heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    size = len(lengths), layers, heads, max(lengths), dim
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    live = valid[:, None, None, :, None]
    keys, values = (torch.randn(size, generator=generator) * live for _ in range(2))
    return KVBatch(keys, values, valid)


def forbid_all(n: int, *, derive: bool = False) -> Mask:
    size = n, len(CATEGORIES)
    return Mask(
        torch.ones(size, dtype=torch.bool), torch.full(size, fill_value=derive, dtype=torch.bool)
    )


def make_records(encoder: Encoder, n: int, seed: int, **changes: Any) -> list[TokenRecord]:
    """Short generated records, everything forbidden."""
    options: dict[str, Any] = {
        "min_fields": 2,
        "max_fields": 3,
        "filler": 0,
        "generic_rate": 0.0,
        "max_agents": 1,
        "absent_questions": 0,
    }
    config = GeneratorConfig(seed=seed, **(options | changes))
    return encoder.encode(hops_of(make_scenario(config, i) for i in range(n)))


@dataclass(frozen=True)
class World:
    """A random agent of the nano architecture and what it has read."""

    tokenizer: PreTrainedTokenizerFast
    encoder: Encoder
    source: ModelSource
    special: Special
    records: list[TokenRecord]
    """The attacker's and trainer's own."""
    others: list[TokenRecord]
    """Records that nothing was fitted on."""

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))


@pytest.fixture(scope="session")
def world() -> World:
    tokenizer = train_tokenizer(VOCAB, 300)
    nano = NanoConfig(vocab_size=VOCAB, hidden=64, layers=2, heads=2, kv_heads=1, mlp=96)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(nano, tokenizer))
    encoder = Encoder(tokenizer)
    return World(
        tokenizer,
        encoder,
        ModelSource(model, pad_id=int(tokenizer.pad_token_id)),
        Special.of(tokenizer, VOCAB),
        make_records(encoder, 150, 0),
        make_records(encoder, 60, 1),
    )
