"""Agents' histories on edges with guard ``redact``: rendered by vLLM itself, covered or refused.

Here against vLLM's rendering server and templates such as real models have; CI runs a share.
All of them: ``LCGUARD_CAMPAIGN=1 pytest tests/vllm/test_histories.py``.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lcguard.handoff.policy import Edge
from lcguard.handoff.request import tokens_digest
from lcguard.server.detection.span_finder import SpanFinder
from lcguard.server.errors import ProxyError
from lcguard.server.gateway.contract import check
from lcguard.server.gateway.contract_error import ContractError
from lcguard.server.gateway.upstream import Upstream
from lcguard.server.settings import UpstreamSettings
from tests.engine import needs_vllm
from tests.histories import SECRET, history
from tests.small_tokenizers import tokenizer
from tests.vllm.rendering import model_folder, rendering

pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
N = 1000 if os.environ.get("LCGUARD_CAMPAIGN") else 60
EDGE = Edge.model_validate(
    {"source": "a", "audience": "b", "forbid": ("government_id",), "guard": "redact"}
)


class Rendered:
    """One model behind vLLM's rendering server."""

    def __init__(self, url: str, model: Path, kind: str) -> None:
        self.url, self.model, self.kind = url, model, kind

    def ask(self, bodies: list[dict[str, Any]], secrets: list[str]) -> list[tuple[int, str]]:
        """What becomes of each request: its status, and what can be read of a covered one."""

        async def all_of_them() -> list[tuple[int, str]]:
            upstream = Upstream(UpstreamSettings(), self.url, "")
            await upstream.start()
            try:
                finder = SpanFinder(upstream, str(self.model))
                return [await self._one(upstream, finder, b, secrets) for b in bodies]
            finally:
                await upstream.close()

        return asyncio.run(all_of_them())

    async def _one(
        self, upstream: Upstream, finder: SpanFinder, body: dict[str, Any], secrets: list[str]
    ) -> tuple[int, str]:
        try:
            body = check("chat", body, consuming=False, publishing=True)
            found = await finder.find("chat", body, EDGE, secrets)
            # the very code that renders a chat request for the engine
            ids = (await upstream.ask("/v1/chat/completions/render", body))["token_ids"]
        except ContractError as error:
            return 400, error.message
        except ProxyError as error:
            return error.status, error.whole
        assert tokens_digest(ids) == found.digest, json.dumps(body)
        left = [i for i in range(len(ids)) if not any(a <= i < b for a, b in found.spans)]
        return 200, tokenizer(self.kind).decode([ids[i] for i in left])


@pytest.fixture(
    scope="module", params=[("Metaspace BPE", "calls"), ("byte-level BPE", "parts")], ids=str
)
def rendered(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rendered]:
    kind, template = request.param
    folder = tmp_path_factory.mktemp("model")
    model = model_folder(folder / "model", kind, template)
    with rendering(model, folder / "log") as running:
        yield Rendered(running.url, model, kind)


def letters(text: str) -> str:
    return "".join(c for c in text if c.isalnum())


def test_agents_histories_are_covered_or_refused(rendered: Rendered) -> None:
    bodies = [history(seed) for seed in range(N)]
    answers = rendered.ask(bodies, [SECRET])
    seen = Counter(status for status, _ in answers)
    print(dict(seen))
    for body, (status, text) in zip(bodies, answers, strict=True):
        assert status in (200, 400), (text, json.dumps(body))
        if status == 200:
            assert letters(SECRET) not in letters(text), json.dumps(body)
    why = Counter(text[:60] for status, text in answers if status == 400)
    # most of the refused name a secret that their template left out or nobody said
    assert seen[200] > 0.4 * N, why.most_common(8)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": None, "reasoning_content": f"it is {SECRET}"},
        {"role": "developer", "content": "be brief"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {
                        "name": "f",
                        "arguments": json.dumps({"ssn": "912\u201155\u20111029"}),
                    },
                }
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "a"}]},
    ],
)
def test_ordinary_messages_are_no_error(rendered: Rendered, message: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": f"I am {SECRET}"}, message]
    if message["role"] == "developer":  # vLLM makes it a system message, which comes first
        messages.reverse()
    ((status, text),) = rendered.ask([{"model": "nano", "messages": messages}], [SECRET])
    assert status == 200, text
    assert letters(SECRET) not in letters(text)


def test_a_templates_error_is_a_400_with_its_message(rendered: Rendered) -> None:
    body = {"model": "nano", "messages": [{"role": "user", "content": SECRET}] * 2}
    expected = "Conversation roles must alternate"
    if "Metaspace" in rendered.kind:
        body["messages"] = [{"role": "alien", "content": SECRET}]
        expected = "unknown role alien"
    ((status, text),) = rendered.ask([body], [SECRET])
    assert status == 400
    assert expected in text


def test_a_number_split_over_two_parts_is_covered(rendered: Rendered) -> None:
    parts = [{"type": "text", "text": t} for t in ("it is 912-55-", "1029, I think")]
    body = {"model": "nano", "messages": [{"role": "user", "content": parts}]}
    ((status, text),) = rendered.ask([body], [SECRET])
    assert status == 200
    assert "1029" not in text
    assert "912" not in text


def test_null_where_vllm_takes_none_is_refused_by_name(rendered: Rendered) -> None:
    for role in ("user", "system", "developer", "tool"):
        messages = [{"role": "user", "content": "a"}, {"role": role, "content": None}]
        ((status, text),) = rendered.ask([{"model": "nano", "messages": messages}], [])
        assert (status, text.partition(" ")[0]) == (400, "messages[1].content")
