"""From texts to hide to token ranges of the prompt, for guard ``redact``.

The engine overwrites tokens, so vLLM itself is asked which tokens a request is: it renders messages
and splits text with the code that the request will meet. The ranges are counted on the text that
these tokens stand for, and travel with a digest of the tokens: an engine that reads the request as
others refuses it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lcguard.detokenize import TokenTextError, TokenTexts
from lcguard.handoff.policy import Edge, PolicyError
from lcguard.handoff.redaction import RedactionError, redact
from lcguard.handoff.request import tokens_digest
from lcguard.normalise import skeleton
from lcguard.server.detection.cpu_worker import CpuWorker
from lcguard.server.detection.detector import Detector, vouched
from lcguard.server.detection.response_chat import chat_of
from lcguard.server.errors import ProxyError
from lcguard.server.gateway.contract_fields import Endpoint
from lcguard.server.gateway.upstream import Upstream
from lcguard.value_search import Range

T = TypeVar("T")
_HANDOFF = "kv_transfer_params"
"""vLLM's field, present where the request consumes: its prompt then begins no conversation."""
_CHAT_KEYS = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    _HANDOFF,
)


@dataclass(frozen=True)
class Spans:
    """What is overwritten in a request's own prompt."""

    spans: list[list[int]]
    """Token ranges ``[start, end)``."""
    n_occurrences: int
    """Values that they cover, every occurrence counted."""
    digest: str
    """Of the tokens on which they were counted."""


class TextFinder(Protocol):
    """Finds what is private in a text by itself."""

    def find(self, text: str, forbid: Collection[str], /) -> Sequence[Any]:
        """Spans with ``start`` and ``end``, in order, none overlapping."""
        ...


class SpanFinder:
    """Spans of one model's prompts."""

    def __init__(
        self,
        upstream: Upstream,
        model: str,
        timeout_s: float = 30.0,
        text_finder: Callable[[], TextFinder] | None = None,
    ) -> None:
        """``model``: folder or hub repository with the tokenizer; empty where it is not known.
        ``text_finder``: loads what edges with ``detect: lcguard`` or learned categories use, at the
        first of them."""
        self.upstream, self.model, self._load = upstream, model, text_finder
        self._loading = asyncio.Lock()
        # what is searched is bounded by the model's context, the search grows with it
        self._worker = CpuWorker(timeout_s, "looking for what to redact")

    def close(self) -> None:
        """What waits is not begun."""
        self._worker.close()

    @cached_property
    def texts(self) -> TokenTexts:
        """Raises ``ProxyError`` (400) for a model without a tokenizer that can be read back."""
        if not self.model:
            raise _refused("set engine.model to the served model's folder: spans need its tokens")
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(
            self.model, local_files_only=Path(self.model).is_dir()
        )
        try:
            return TokenTexts(found)
        except TokenTextError as error:
            raise _refused(f"the tokenizer of {self.model}: {error}") from None

    @cached_property
    def detector(self) -> Detector:
        """Raises ``ProxyError`` (400) where it is not installed."""
        try:
            return Detector()
        except PolicyError as error:
            raise _refused(str(error)) from None

    @cached_property
    def text_finder(self) -> TextFinder:
        """Raises ``ProxyError`` (400) where it cannot be loaded."""
        if self._load is None:
            raise _refused("this server has no detector for detect: lcguard")
        try:
            return self._load()
        except ValueError as error:
            raise _refused(f"detect: lcguard: {error}") from None

    def detect(self, text: str, edge: Edge) -> list[Range]:
        """What the edge's detector finds, by itself. Raises ``ProxyError`` (400) where it cannot be
        loaded."""
        if edge.detector == "none":
            return []
        if edge.detector == "presidio":
            return self.detector.find(text, edge.forbid)
        return [(s.start, s.end) for s in self.text_finder.find(text, edge.forbid)]

    async def work(self, work: Callable[..., T], *args: Any) -> T:
        """``work`` beside the event loop. Raises ``ProxyError`` (503) where it takes too long."""
        return await self._worker.run(work, *args)

    async def run(self, edge: Edge, work: Callable[..., T], *args: Any) -> T:
        """``work`` beside the event loop, once what the edge detects with is loaded.

        Raises ``ProxyError``: 503 where it takes too long, and as ``detect``.
        """
        if edge.reads_text:
            async with self._loading:  # once, and not on the time of who comes first
                await asyncio.to_thread(lambda: self.text_finder)
        return await self.work(work, *args)

    async def find(
        self, endpoint: Endpoint, body: dict[str, Any], edge: Edge, secrets: Sequence[str] | None
    ) -> Spans:
        """What to overwrite in the request's own prompt, given ``kv_transfer_params`` in ``body``
        where it consumes: vLLM renders it otherwise then. With another guard than ``redact`` that
        is what the edge's detector finds, and what belongs to the policy's own categories.

        Raises:
            ProxyError: 400 where a forbidden category is neither detected nor answered for by
                ``secrets``, where a secret is not in the prompt, where vLLM refuses the prompt,
                or where its tokens cannot be read back; 503 where it takes too long.
        """
        known = (*vouched(edge.detect), *edge.custom)
        open_ = [c for c in edge.forbid if c not in known]
        if secrets is None and open_:
            raise _refused(
                f"guard 'redact' finds not all {', '.join(open_)} by itself: name the texts to "
                "hide in lcguard.publish.secrets, [] for none, or choose another guard for "
                f"{edge.name.in_words} in the policy"
            )
        texts = await self.run(edge, lambda: self.texts)
        ids = await self._tokens(texts, endpoint, body)
        return await self._worker.run(self._spans, texts, ids, edge, secrets or ())

    async def _tokens(
        self, texts: TokenTexts, endpoint: Endpoint, body: dict[str, Any]
    ) -> list[int]:
        """vLLM's tokens of the prompt. Raises ``ProxyError`` where its vocabulary is another."""
        model, prompt = body.get("model"), body.get("prompt")
        if endpoint == "completions" and isinstance(prompt, list):
            try:
                own = texts.tokenizer.decode(prompt)
            except (OverflowError, TypeError, ValueError):
                raise _refused("the prompt holds a number that is no token") from None
            said = await self.upstream.ask("/detokenize", {"model": model, "tokens": prompt})
            if skeleton(own).text != skeleton(str(said["prompt"])).text:
                raise _other_tokenizer(self.model)
            return prompt
        if endpoint == "responses":
            body = chat_of(body)
        asked = (
            _chat(body)
            if endpoint != "completions"
            else {
                "prompt": prompt,
                "add_special_tokens": body.get("add_special_tokens", _HANDOFF not in body),
            }
        )
        said = await self.upstream.ask(
            "/tokenize", {"model": model, **asked, "return_token_strs": True}
        )
        ids = list(said["tokens"])
        if len(ids) >= said["max_model_len"]:
            raise _refused(
                f"the prompt has {len(ids)} tokens, the model takes {said['max_model_len']} with "
                "its answer: shorten it"
            )
        if texts.tokenizer.convert_ids_to_tokens(ids) != said["token_strs"]:
            raise _other_tokenizer(self.model)
        return ids

    def _spans(
        self, texts: TokenTexts, ids: list[int], edge: Edge, secrets: Sequence[str]
    ) -> Spans:
        try:
            prompt = texts.of(ids)
            found = redact(
                prompt,
                ids,
                texts.tokenizer,
                secrets,
                lambda text: self.detect(text, edge),
                edge.custom,
            )
        except (TokenTextError, RedactionError) as error:
            raise _refused(str(error)) from None
        return Spans(found.spans, found.n_occurrences, tokens_digest(ids))


def _chat(body: dict[str, Any]) -> dict[str, Any]:
    """A chat request as vLLM's tokenizing route takes it: what only the template reads are options
    of the template there, and ``reasoning_content`` goes by its newer name."""
    asked = {k: body[k] for k in _CHAT_KEYS if k in body}
    asked["messages"] = [_renamed(m) for m in body["messages"]]
    options = dict(body.get("chat_template_kwargs") or {})
    options |= {k: body[k] for k in ("documents", "reasoning_effort") if k in body}
    if "reasoning_effort" in body:
        options.setdefault("enable_thinking", body["reasoning_effort"] != "none")
    return asked | ({"chat_template_kwargs": options} if options else {})


def _renamed(message: dict[str, Any]) -> dict[str, Any]:
    out = {k: v for k, v in message.items() if k != "reasoning_content"}
    old = message.get("reasoning_content")
    if old is not None and out.get("reasoning") is None:
        out["reasoning"] = old
    return out


def _other_tokenizer(model: str) -> ProxyError:
    return _refused(f"vLLM's tokenizer is another than that of engine.model={model}")


def _refused(message: str) -> ProxyError:
    return ProxyError(400, message, code="spans")
