"""Agents on transformers: loads a causal LM and its tokenizer from a folder or the hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from lcguard.agents.models import model_location, reader_folder
from lcguard.agents.scenarios.encode import Encoder
from lcguard.agents.scenarios.schema import category_values
from lcguard.cache import check_supported
from lcguard.categories import CATEGORIES
from lcguard.detokenize import TokenTexts
from lcguard.handoff.redaction import redact
from lcguard.hub import local_folder, quiet_hub, read_tokenizer, why_not_loaded
from lcguard.model_digest import checkpoint_digest
from lcguard.model_files import ModelFolderError, check_texts, check_weights, refuse_packed
from lcguard.noise import new_noise_key
from lcguard.protocols import Guard, KVBatch
from lcguard.records import mask_of
from lcguard.rope import UnsupportedModelError
from lcguard.rule import Rule
from lcguard.source import ModelSource
from lcguard.tokens import Special
from lcguard.training.fit_reader import load_reader
from lcguard.training.twins import found_twin


@dataclass(frozen=True)
class HFBackend:
    """A model ready to prefill, answer and be attacked."""

    name: str
    source: ModelSource
    encoder: Encoder
    special: Special
    digest: str
    """Digest of the weights: guards are bound to it."""

    @property
    def tokenizer(self) -> Any:
        return self.encoder.tokenizer

    def decode(self, ids: Any) -> str:
        return str(self.tokenizer.decode(list(ids)))

    def read(self, text: str, hide: Sequence[str] = ()) -> KVBatch:
        """KV ``[1, L, H, T, D]`` of a context as this agent reads it before a question.

        ``hide``: values that are read as neutral tokens instead, wherever they stand in the text
        and in every spelling: the twin that guard ``redact`` sends. Raises ``RedactionError`` for
        one that is not in the text.
        """
        return self.source.prefill([self._ids(text, hide)])

    def publish(
        self,
        text: str,
        guard: Guard,
        forbid: Sequence[str] = CATEGORIES,
        derive: Sequence[str] = (),
        secrets: Sequence[str] = (),
    ) -> KVBatch:
        """KV ``[1, L, H, T, D]`` of a context as this agent hands it over: through a guard, which
        finds the forbidden itself or hides it everywhere, and without ``secrets``, values that are
        read as neutral tokens.

        Raises ``ValueError`` for unknown categories, and for a guard that has to be told what to
        hide and is not; ``RedactionError`` for a secret that is not in the text.
        """
        ids, mask = self._ids(text, secrets), mask_of([Rule.of(forbid, derive)])
        kv = self.source.prefill([ids])
        twin = kv if guard.needs_twin else None
        if guard.needs_twin:
            found = guard.marks(kv, mask)
            if found is None and not secrets:
                raise ValueError(
                    f"guard {guard.name!r} is told what to hide: give secrets=[...], or take one "
                    "that finds it"
                )
            if found is not None:
                marks, special = found[0].tolist(), self.special
                shown = found_twin(ids, marks, guard.placeholder, special, new_noise_key())
                twin = self.source.prefill([shown])
        return guard(kv, mask, twin=twin).kv

    def _ids(self, text: str, hide: Sequence[str]) -> list[int]:
        ids = list(self.encoder.context(text))
        if hide:
            found = redact(TokenTexts(self.tokenizer).of(ids), ids, self.tokenizer, hide)
            for start, end in found.spans:
                ids[start:end] = [self.special.neutral_id] * (end - start)
        return ids

    def answer(self, kv: KVBatch, question: str, max_tokens: int = 24) -> str:
        """Greedy answer to a question after a context of which only ``kv``, one record, is
        known."""
        asked = self.encoder.prompt(question)
        (ids,) = self.source.generate(kv, [asked], max_tokens, self.special.end_id)
        return self.decode(ids).strip()


def load_backend(
    name: str = "nano", device: str | None = None, *, reader: bool = True, first_layers: int = 0
) -> HFBackend:
    """Loads a model that goes by a name (``lcguard models list``), a folder or a hub repository.

    ``reader``: a model that comes with adapters for answering answers with them; what it publishes
    is the plain model's either way. ``first_layers``: run no more than these, to read text with,
    not to answer; 0: all.

    Raises ``ValueError`` in one line where the model cannot be loaded or is not supported, or has
    not that many layers.
    """
    path = model_location(name, lambda text: print(text, file=sys.stderr))
    folder, chosen = Path(path), chosen_device(device)
    hf_logging.disable_progress_bar()
    try:
        with quiet_hub():
            if folder.is_dir():
                check_texts(folder)
            # before gigabytes of weights are fetched
            config = AutoConfig.from_pretrained(path)
            check_supported(config.get_text_config())
            refuse_packed(config.to_dict(), path)
            if folder.is_dir():
                check_weights(folder)
            tokenizer = read_tokenizer(path)
            model: Any = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
            digest = checkpoint_digest(local_folder(path))
    except (ModelFolderError, UnsupportedModelError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {error}") from error
    except Exception as error:  # tokenizers and packages for rare formats raise what they like
        raise ValueError(why_not_loaded(name, error)) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"model {name!r} comes with an adapter: merge it into the weights")
    if first_layers:
        _keep_first_layers(model, first_layers)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.to(chosen)
    if chosen == "cpu" and model.dtype is torch.bfloat16 and not _fast_bfloat16():
        model.float()  # the same values; this processor would emulate every product
    adapters = reader_folder(name) if reader and not first_layers else None
    answering = load_reader(model, adapters) if adapters else None
    return HFBackend(
        name,
        ModelSource(model, int(pad), reader=answering),
        Encoder(tokenizer),
        Special.of(tokenizer, model.config.vocab_size, [category_values(c) for c in CATEGORIES]),
        digest,
    )


def _keep_first_layers(model: Any, n: int) -> None:
    layers = getattr(getattr(model, model.base_model_prefix), "layers", None)
    if layers is None or not 0 < n <= len(layers):
        has = "no list of layers" if layers is None else f"{len(layers)} layers"
        raise ValueError(f"first_layers = {n}: the model has {has}; use 0 for all of it")
    del layers[n:]
    # Its keys and values are read, and nothing that comes after them: most of a layer's work.
    if isinstance(getattr(getattr(layers[-1], "mlp", None), "down_proj", None), torch.nn.Linear):
        layers[-1].mlp = torch.nn.Identity()
    model.config.num_hidden_layers = n
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:n]


def chosen_device(wanted: str | None) -> str:
    """The device that is wanted, or the first GPU, or the CPU.

    Raises ``ValueError`` for one that this machine or this build of torch does not have.
    """
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    # torch raises what it likes, in many lines
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0][:120]
        known = f"cpu or cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        fix = known if torch.cuda.is_available() else "cpu: torch finds no CUDA device"
        raise ValueError(f"device {wanted!r} cannot be used ({first}): use {fix}") from None
    return wanted


def _fast_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
