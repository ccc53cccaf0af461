"""The guard contract as data: what becomes of every field of a request and of its answer.

Written for vLLM 0.32; a test holds it against the request and response models of the vLLM that is
installed. What no line names is refused in a request and taken out of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Endpoint = Literal["chat", "completions"]
ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)
PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

Class = Literal[
    "guarded", "opaque", "dropped", "refused", "refused_on_consume", "refused_on_publish",
    "refused_on_handoff",
]  # fmt: skip
MEANING: dict[Class, str] = {
    "guarded": "shapes the prompt: its tokens become KV, and a published prompt's KV is rewritten",
    "opaque": "goes to the engine as it is; tells the receiver nothing of consumed tokens",
    "dropped": "not forwarded: the proxy has its own value",
    "refused": "400, always",
    "refused_on_consume": "400 where segments are consumed, opaque otherwise",
    "refused_on_publish": "400 where the prompt is published, opaque otherwise",
    "refused_on_handoff": "400 where segments are consumed or published, opaque otherwise",
}

AnswerClass = Literal["passed", "added", "removed", "removed_on_consume"]
ANSWER_MEANING: dict[AnswerClass, str] = {
    "passed": "as the engine sent it",
    "added": "by the proxy",
    "removed": "never reaches the client",
    "removed_on_consume": "does not reach a client that consumed segments",
}


@dataclass(frozen=True)
class Field:
    """One field of a request."""

    kind: Class
    types: frozenset[type]
    """Of its JSON value, exactly. vLLM would take ``"true"`` for a boolean and ``"2"`` for a
    number, and the proxy would then have decided on another request than the engine runs."""
    why: str
    fix: str = ""
    """What a refused client does instead."""
    neutral: Any = None
    """The value that asks for nothing, as does null: allowed even where the field is refused."""


B, I, N = frozenset({bool}), frozenset({int}), frozenset({int, float})  # noqa: E741
S, L, O = frozenset({str}), frozenset({list}), frozenset({dict})  # noqa: E741
_NEUTRAL: dict[str, Any] = {
    "n": 1, "echo": False, "top_logprobs": 0, "prompt_logprobs": None, "return_token_ids": False,
    "return_tokens_as_token_ids": False, "return_prompt_text": False, "use_beam_search": False,
    "return_token_offsets": False, "routed_experts_prompt_start": 0, "priority": 0,
    "mm_payload": "tensors", "suffix": "", "best_of": 1, "modalities": ["text"],
}  # fmt: skip
"""Compared by type as well: for text completions ``logprobs: false`` is 0, which asks for some."""

FIELDS: dict[Endpoint, dict[str, Field]] = {"chat": {}, "completions": {}}


def _add(
    kind: Class, why: str, fix: str = "", only: Endpoint | None = None, **types: frozenset[type]
) -> None:
    for name, type_ in types.items():
        field = Field(kind, type_, why, fix, _NEUTRAL.get(name))
        for endpoint in ENDPOINTS if only is None else (only,):
            assert name not in FIELDS[endpoint], name
            FIELDS[endpoint][name] = field


_TEXT = "text parts only: a guard rewrites what tokens left, and media leave none of their own"
_add("guarded", f"the prompt; {_TEXT}", only="chat", messages=L)
_add("guarded", "the prompt, as text or tokens; exactly one in a handoff", only="completions",
     prompt=S | L)  # fmt: skip
_add("guarded", "the model's chat template writes it into the prompt", only="chat",
     tools=L, tool_choice=S | O, documents=L, reasoning_effort=S, response_format=O,
     add_generation_prompt=B, continue_final_message=B)  # fmt: skip
_add("guarded", "read by the model's chat template; plain values under names that are no options "
     "of the renderer", only="chat", chat_template_kwargs=O)  # fmt: skip
_add("guarded", "adds the tokenizer's special tokens to the prompt", add_special_tokens=B)

_add("opaque", "which model answers; the key must allow it", model=S)
_add("opaque", "how the answer is sent", stream=B, stream_options=O, stream_interval=I)
_add("opaque", "how long the answer may be; counted against the key's limits",
     max_tokens=I, min_tokens=I)  # fmt: skip
_add("opaque", "how long the answer may be; counted against the key's limits", only="chat",
     max_completion_tokens=I)  # fmt: skip
_add("opaque", "how an answer is sampled",
     temperature=N, top_p=N, top_k=I, min_p=N, frequency_penalty=N, presence_penalty=N,
     repetition_penalty=N, length_penalty=N, seed=I, watermarking=B)  # fmt: skip
_add("opaque", "constrains what is sampled. Many answers under chosen constraints estimate "
     "log-probabilities, as many samples do: the key's limits bound how many",
     logit_bias=O, allowed_token_ids=L, bad_words=L, structured_outputs=O)  # fmt: skip
_add("opaque", "the form of the answer", only="completions", response_format=O)
_add("opaque", "where the answer ends",
     stop=S | L, stop_token_ids=L, include_stop_str_in_output=B, ignore_eos=B,
     repetition_detection=O, thinking_token_budget=I)  # fmt: skip
_add("opaque", "how the answer's tokens are written as text",
     skip_special_tokens=B, spaces_between_special_tokens=B)  # fmt: skip
_add("opaque", "which parts of the answer are sent", only="chat",
     include_reasoning=B, parallel_tool_calls=B)  # fmt: skip

_add("dropped", "the proxy salts the prefix cache for each agent with a secret", cache_salt=S)
_add("dropped", "the proxy's own: an id of another's choice could meet another tenant's",
     request_id=S, session_id=S)  # fmt: skip
_add("dropped", "the key says who asks", user=S)
_add("dropped", "the handoff, read by the proxy", lcguard=O)

_add("refused", "orders handoffs inside the engine, past policy, budget and audit",
     "use the field lcguard", kv_transfer_params=O)  # fmt: skip
_add("refused", "reaches the connectors of the engine", "leave it out",
     ec_transfer_params=O, vllm_xargs=O)  # fmt: skip
_add("refused", "a template of the client's can write anything for the guard to miss",
     "the model's own is used: leave it out", only="chat", chat_template=S)  # fmt: skip
_add("refused", "embeddings have no tokens that a guard or a policy could name",
     "send prompt", only="completions", prompt_embeds=S | L)  # fmt: skip
_add("refused", "there are no media in a prompt here", "leave it out", mm_payload=S,
     return_mm_kwargs=B)  # fmt: skip
_add("refused", "there are no media in a prompt here", "leave it out", only="chat",
     media_io_kwargs=O, mm_processor_kwargs=O)  # fmt: skip
_add("refused", "shows the inner state at each token, consumed ones too", "leave it out",
     routed_experts_prompt_start=I)  # fmt: skip
_add("refused", "of vLLM's rendering endpoints, which are not served here", "leave it out",
     return_token_offsets=B)  # fmt: skip
_add("refused", "would push other tenants' requests back", "leave it out", priority=I)
_add("refused", "vLLM has no infilling", "leave it out", only="completions", suffix=S)

# Of OpenAI's service alone: its clients send some of them unasked.
_add("dropped", "OpenAI keeps answers and finds them again by it; nothing is kept here",
     only="chat", store=B, metadata=O)  # fmt: skip
_add("dropped", "a wish of OpenAI's models alone", only="chat", verbosity=S)
_add("dropped", "chooses among OpenAI's own services and caches", only="chat",
     service_tier=S, prompt_cache_key=S, prompt_cache_retention=S, prompt_cache_options=O,
     safety_identifier=S)  # fmt: skip
_add("refused", "answers are text", "leave it out", only="chat", audio=O, modalities=L)
_add("refused", "a service of OpenAI's that is not here", "leave it out", only="chat",
     prediction=O, web_search_options=O, moderation=O)  # fmt: skip
_add("refused", "OpenAI's older way to say it", "use tools and tool_choice", only="chat",
     functions=L, function_call=S | O)  # fmt: skip
_add("refused", "chooses among answers that nobody sees and that count", "send n",
     only="completions", best_of=I)  # fmt: skip

_LOG = "log-probabilities tell far more of consumed tokens than one sampled answer does"
_add("refused_on_consume", _LOG, "leave it out", only="chat", logprobs=B, top_logprobs=I)
_add("refused_on_consume", _LOG, "leave it out", only="completions", logprobs=I)
_add("refused_on_consume", _LOG, "leave it out",
     logprob_token_ids=L, return_tokens_as_token_ids=B)  # fmt: skip
_add("refused_on_handoff", "scores the prompt, which a handoff does not compute as a whole",
     "leave it out, or send the prompt without a handoff", prompt_logprobs=I, echo=B)  # fmt: skip
_add("refused_on_consume", "shows the prompt as the engine holds it", "leave it out",
     return_token_ids=B)  # fmt: skip
_add("refused_on_consume", "shows the prompt as the engine holds it", "leave it out", only="chat",
     return_prompt_text=B)  # fmt: skip
_add("refused_on_publish", "one request publishes one segment", "send n: 1", n=I)
_add("refused_on_handoff", "each step is a request of its own, which the handoff does not reach",
     "leave it out", use_beam_search=B)  # fmt: skip
_add("refused_on_handoff", "moves tokens after the spans to redact were counted",
     "shorten the prompt", truncate_prompt_tokens=I, truncation_side=S)  # fmt: skip
# False asks for nothing in a chat; as a number of log-probabilities it would be 0.
FIELDS["chat"]["logprobs"] = Field("refused_on_consume", B, _LOG, "leave it out", False)

ANSWER: dict[str, AnswerClass] = {
    **dict.fromkeys(
        ("id", "object", "created", "model", "choices", "service_tier", "system_fingerprint",
         "usage", "error"), "passed",
    ),
    **dict.fromkeys(
        ("metrics", "prompt_logprobs", "prompt_token_ids", "prompt_text"), "removed_on_consume"
    ),
    **dict.fromkeys(("kv_transfer_params", "ec_transfer_params"), "removed"),
    "lcguard": "added",
}  # fmt: skip
"""Of an answer, and of each piece of a stream."""
CHOICE: dict[str, AnswerClass] = {
    **dict.fromkeys(
        ("index", "message", "delta", "text", "finish_reason", "stop_reason"), "passed"
    ),
    **dict.fromkeys(
        ("logprobs", "token_ids", "prompt_logprobs", "prompt_token_ids"), "removed_on_consume"
    ),
    "routed_experts": "removed",
}
"""Of each of its ``choices``."""
USAGE: dict[str, AnswerClass] = {
    **dict.fromkeys(
        ("prompt_tokens", "completion_tokens", "total_tokens", "completion_tokens_details"),
        "passed",
    ),
    # what was found in the prefix cache is as long as what was consumed
    "prompt_tokens_details": "removed_on_consume",
}  # fmt: skip
"""Of its ``usage``. Where segments are consumed, prompt and total count them as far as their
audience may know (``length_bucket`` of the policy)."""

MESSAGE: dict[str, frozenset[type]] = {
    "content": frozenset({str, list}),
    "tool_calls": frozenset({list}),
    "tools": frozenset({list}),
    **dict.fromkeys(
        ("role", "name", "tool_call_id", "reasoning", "reasoning_content", "refusal", "task"),
        frozenset({str}),
    ),
    # An answer's message sent back has them: these as null,
    **dict.fromkeys(("audio", "function_call"), frozenset[type]()),
    # and these with a value, which the engine does not get.
    "annotations": frozenset({list}),
    "lcguard": frozenset({dict}),
}
"""Of each of ``messages``, with the types of its value; null is allowed."""
UNSENT = frozenset({"annotations", "lcguard"})
"""Of each of ``messages``: no part of the prompt."""
RENDERER_OPTIONS = frozenset({
    "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "messages",
})  # fmt: skip
"""Parameters of ``apply_chat_template``: in ``chat_template_kwargs`` they would be another way to
say a template, a truncation or a document that was refused under its own name."""
