"""From texts to hide to token ranges of the prompt, for guard ``redact``.

The engine overwrites tokens, so the ranges must be of the very tokens it reads. They are counted
with the model's tokenizer here and held against vLLM's own tokenization of the same request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lcguard.policy import Edge, PolicyError
from lcguard.server.contract_fields import FIELDS
from lcguard.server.detector import COVERED, Detector
from lcguard.server.errors import ProxyError
from lcguard.server.upstream import Upstream

Endpoint = Literal["chat", "completions"]
_CHAT_KEYS = ("messages", "add_generation_prompt", "continue_final_message", "add_special_tokens")
_COMPLETION_KEYS = ("prompt", "add_special_tokens")


class SpanFinder:
    """Spans of one model's prompts."""

    def __init__(self, upstream: Upstream, model: str) -> None:
        """``model``: folder or hub repository with the tokenizer; empty where it is not known."""
        self.upstream, self.model = upstream, model

    @cached_property
    def tokenizer(self) -> Any:
        """Raises ``ProxyError`` (400) for a model without a fast tokenizer, or none at all."""
        if not self.model:
            raise _refused("set engine.model to the served model's folder: spans need its tokens")
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(
            self.model, local_files_only=Path(self.model).is_dir()
        )
        if not found.is_fast:
            raise _refused(f"the tokenizer of {self.model} has no offsets")
        return found

    @cached_property
    def detector(self) -> Detector:
        """Raises ``ProxyError`` (400) where it is not installed."""
        try:
            return Detector()
        except PolicyError as error:
            raise _refused(str(error)) from None

    async def find(
        self, endpoint: Endpoint, body: dict[str, Any], edge: Edge, secrets: Sequence[str] | None
    ) -> list[list[int]]:
        """Token ranges ``[start, end)`` of the request's own prompt.

        Raises:
            ProxyError: 400 where a forbidden category is neither detected nor answered for by
                ``secrets``, where a secret is not in the prompt, or where tokens disagree.
        """
        counted = _CHAT_KEYS if endpoint == "chat" else _COMPLETION_KEYS
        for name, field in FIELDS[endpoint].items():
            # vLLM would render it, the count below would not, and every span would be off
            if field.kind == "guarded" and name in body and name not in counted:
                raise _refused(f"{name} has no place on an edge with guard 'redact': leave it out")
        detects = edge.detect == "presidio"
        open_ = [c for c in edge.forbid if not (detects and c in COVERED)]
        if secrets is None and open_:
            raise _refused(
                f"guard 'redact' finds no {', '.join(open_)} by itself: name the texts to hide in "
                "lcguard.publish.secrets, [] for none"
            )
        return await asyncio.to_thread(
            self._ranges, await self._rendered(endpoint, body), edge, detects, secrets or ()
        )

    async def _rendered(self, endpoint: Endpoint, body: dict[str, Any]) -> tuple[Any, list[int]]:
        """The prompt as text or tokens, and vLLM's tokens of it."""
        if endpoint == "completions":
            prompt = body["prompt"]
            if isinstance(prompt, list):
                return None, prompt
            question = {
                "prompt": prompt,
                "add_special_tokens": body.get("add_special_tokens", True),
            }
            text: Any = prompt
        else:
            question = {k: body[k] for k in _CHAT_KEYS if k in body}
            tokenizer = await asyncio.to_thread(lambda: self.tokenizer)
            text = tokenizer.apply_chat_template(
                [{**m, "content": _flat(m.get("content"))} for m in body["messages"]],
                tokenize=False, add_generation_prompt=body.get("add_generation_prompt", True),
                continue_final_message=body.get("continue_final_message", False),
            )  # fmt: skip
        answer = await self.upstream.ask("/tokenize", {"model": body.get("model"), **question})
        return text, list(answer["tokens"])

    def _ranges(
        self, rendered: tuple[Any, list[int]], edge: Edge, detects: bool, secrets: Sequence[str]
    ) -> list[list[int]]:
        text, ids = rendered
        tokenizer = self.tokenizer
        if text is None:  # a prompt of tokens: their text, each token's place in it
            pieces = [tokenizer.decode(i) for i in ids]
            text, offsets, at = "".join(pieces), [], 0
            for piece in pieces:
                offsets.append((at, at + len(piece)))
                at += len(piece)
        else:
            for special in (False, True):
                found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
                if list(found["input_ids"]) == ids:
                    offsets = found["offset_mapping"]
                    break
            else:
                raise _refused("vLLM reads this prompt as other tokens than its tokenizer here")
        places = self.detector.find(text, edge.forbid) if detects else []
        for secret in secrets:
            start = text.find(secret)
            if start < 0:
                raise _refused(
                    f"a text of {len(secret)} characters in secrets is not in the prompt"
                )
            while start >= 0:
                places.append((start, start + len(secret)))
                start = text.find(secret, start + 1)
        return _merge(
            [i, i + 1]
            for i, (a, b) in enumerate(offsets)
            if any(a < end and start < b for start, end in places)
        )


def _merge(ranges: Any) -> list[list[int]]:
    """Neighbouring ranges as one."""
    out: list[list[int]] = []
    for start, end in ranges:
        if out and out[-1][1] >= start:
            out[-1][1] = end
        else:
            out.append([start, end])
    return out


def _flat(content: Any) -> Any:
    """Text parts as one text."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content


def _refused(message: str) -> ProxyError:
    return ProxyError(400, message, code="spans")
