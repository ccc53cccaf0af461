"""The agents' model as training and evaluation use it: prefill contexts, ask about segments.

The receiver may answer with an adapted copy of the model (``lcguard.training.fit_reader``); what a
sender reads passes through the plain one.

Works with any transformers causal LM that ``lcguard.cache`` supports; nothing here knows the nano
agent. Loss and exact match are teacher-forced: a greedy answer is right exactly when the argmax is
right at every answer token given the right ones before, so one forward pass tells what greedy
decoding would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lcguard.cache import cache_to_kv, check_supported, kv_shape, kv_to_cache
from lcguard.protocols import KVBatch
from lcguard.records import (
    IGNORE,
    PackedQuestions,
    TokenQuestion,
    TokenRecord,
    additive,
    pack_questions,
    pad,
)
from lcguard.rope import Rotary

Wanted = Callable[[TokenRecord, TokenQuestion], bool]


class ModelSource:
    """A frozen model with its rotary embedding.

    Raises ``UnsupportedModelError`` for models whose KV cannot cross a hop exactly.
    """

    def __init__(self, model: Any, pad_id: int = 0, *, reader: Any = None) -> None:
        """``reader``: the model, adapted, that answers; it shares shapes and vocabulary."""
        check_supported(model.config)
        self.model = model.eval().requires_grad_(False)
        self.reader = self.model if reader is None else reader
        self.config = model.config
        self.rotary = Rotary.from_config(model.config)
        self.shape = kv_shape(model.config)
        self.pad_id = pad_id
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype

    @torch.no_grad()
    def prefill(
        self, contexts: Sequence[Sequence[int]], batch: int = 64, on: KVBatch | None = None
    ) -> KVBatch:
        """KV of the contexts' own tokens, right-padded ``[B, L, H, T, D]``.

        Each context starts at position 0, or follows its row of ``on``: consumed segments, that
        its tokens attend to.
        """
        width = max(len(c) for c in contexts)
        layers, heads, dim = self.shape
        keys = torch.zeros(
            len(contexts), layers, heads, width, dim, dtype=self.dtype, device=self.device
        )
        values = torch.zeros_like(keys)
        valid = pad([[1] * len(c) for c in contexts], 0).bool().to(self.device)
        # similar lengths together: less padding
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            ids = pad([contexts[i] for i in rows], self.pad_id).to(self.device)
            kv = self._fresh(ids) if on is None else self._behind(ids, on[rows].trim())
            n = ids.shape[1]
            keys[rows, :, :, :n], values[rows, :, :, :n] = kv.keys, kv.values
        live = valid[:, None, None, :, None]
        return KVBatch(keys * live, values * live, valid)

    def _fresh(self, ids: Tensor) -> KVBatch:
        cache = DynamicCache(config=None)
        # causal attention: padding on the right never reaches the tokens before it
        _backbone(self.model)(input_ids=ids, past_key_values=cache, use_cache=True)
        return cache_to_kv(cache, self.rotary)

    def _behind(self, ids: Tensor, on: KVBatch) -> KVBatch:
        """The same with ``ids [B, S]`` behind consumed segments."""
        n, seen = ids.shape[1], on.valid.shape[1]
        lengths = on.valid.sum(1)
        causal = torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
        past = on.valid[:, None, :].expand(-1, n, -1)
        mask = torch.cat((past, causal.expand(len(ids), -1, -1)), -1)[:, None]
        cache = kv_to_cache(on, self.rotary, self.config, suffix_tokens=n)
        _backbone(self.model)(
            input_ids=ids,
            position_ids=lengths[:, None] + torch.arange(n, device=ids.device),
            attention_mask=additive(mask, self.dtype),
            past_key_values=cache,
            use_cache=True,
        )
        # entry `seen` of the cache stands at position `lengths`: padding lies between
        return cache_to_kv(cache, self.rotary, lengths - seen, start=seen)

    def answer_logits(self, kv: KVBatch, packed: PackedQuestions) -> Tensor:
        """Logits ``[N, V]`` at the answer tokens of packed questions asked after ``kv``.

        Differentiable in ``kv``.
        """
        packed = _to(packed, self.device)
        lengths = kv.valid.sum(1)
        hidden = _backbone(self.reader)(
            input_ids=packed.ids,
            position_ids=packed.positions(lengths),
            attention_mask=additive(packed.mask(kv.valid), self.dtype),
            past_key_values=kv_to_cache(
                kv, self.rotary, self.config, suffix_tokens=_longest(packed)
            ),
            use_cache=True,
        ).last_hidden_state
        return self._head(hidden[packed.labels != IGNORE])

    def _head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.reader.get_output_embeddings()(hidden)
        scaling = getattr(self.config, "logits_scaling", None)  # Granite
        logits = logits / scaling if scaling else logits
        cap = getattr(self.config, "final_logit_softcapping", None)  # Gemma 2
        return torch.tanh(logits / cap) * cap if cap else logits

    @torch.no_grad()
    def exact_match(
        self,
        records: Sequence[TokenRecord],
        kv: KVBatch,
        wanted: Wanted = lambda r, q: True,
        batch: int = 64,
    ) -> list[list[bool]]:
        """Per record and wanted question: would greedy decoding give the answer exactly?"""
        out: list[list[bool]] = []
        for first in range(0, len(records), batch):
            part = records[first : first + batch]
            packed = pack_questions(part, wanted, self.pad_id)
            if packed.ids.shape[1] == 0:
                out += [[] for _ in part]
                continue
            logits = self.answer_logits(kv[first : first + batch].trim(), packed)
            right = torch.ones_like(packed.labels, dtype=torch.bool)
            due = packed.labels != IGNORE
            right[due] = logits.argmax(-1).cpu() == packed.labels[due]
            for row, blocks in zip(right, packed.block, strict=True):
                n = int(blocks.max()) + 1
                out.append([bool(row[blocks == i].all()) for i in range(n)])
        return out

    @torch.no_grad()
    def generate(
        self,
        kv: KVBatch,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_id: int,
        allowed: Tensor | None = None,
    ) -> list[tuple[int, ...]]:
        """Greedy answers to one prompt a record, without the end token.

        Args:
            allowed: optional ``[B, V]`` bool; tokens outside are never produced (the end token
                always may be).
        """
        n = len(prompts)
        finished = torch.zeros(n, dtype=torch.bool)
        rows: list[list[int]] = [list(p) for p in prompts]
        answers: list[list[int]] = [[] for _ in rows]
        longest = max((len(r) for r in rows), default=0) + max_new_tokens
        cache = kv_to_cache(kv, self.rotary, self.config, suffix_tokens=longest)
        # masks and positions are made on the CPU, wherever the model is
        seen = kv.valid.cpu()
        lengths = seen.sum(1)
        ids, valid = pad(rows, self.pad_id), pad([[1] * len(r) for r in rows], 0).bool()
        step = torch.arange(ids.shape[1]).expand(n, -1)
        last = valid.sum(1) - 1
        for _ in range(max_new_tokens):
            width = ids.shape[1]
            causal = torch.ones(width, width, dtype=torch.bool).tril()
            own = (causal & valid[:, None, :]) | torch.eye(width, dtype=torch.bool)
            mask = torch.cat((seen[:, None, :].expand(-1, width, -1), own), -1)[:, None]
            hidden = _backbone(self.reader)(
                input_ids=ids.to(self.device),
                position_ids=(lengths[:, None] + step).to(self.device),
                attention_mask=additive(mask, self.dtype).to(self.device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            logits = self._head(hidden[torch.arange(n), last]).float().cpu()
            if allowed is not None:
                keep = allowed.clone()
                keep[:, end_id] = True
                logits = logits.masked_fill(~keep, -torch.inf)
            token = logits.argmax(-1)
            finished |= token == end_id
            if bool(finished.all()):
                break
            for i in (~finished).nonzero().flatten().tolist():
                answers[i].append(int(token[i]))
            seen = torch.cat((seen, valid), 1)
            step = step[torch.arange(n), last][:, None] + 1
            ids, last = token[:, None], torch.zeros(n, dtype=torch.long)
            valid = torch.ones(n, 1, dtype=torch.bool)
        return [tuple(a) for a in answers]


def _backbone(model: Any) -> nn.Module:
    return getattr(model, model.base_model_prefix)  # type: ignore[no-any-return]


def _longest(packed: PackedQuestions) -> int:
    """Tokens of the longest question with its answer."""
    return int(packed.step.max()) + 1 if packed.step.numel() else 0


def _to(packed: PackedQuestions, device: torch.device) -> PackedQuestions:
    return PackedQuestions(*(t.to(device) for t in vars(packed).values()))
