"""What of an engine request changes what is computed for its prompt, and goes with no handoff.

A consumed token was computed elsewhere, and a published prompt may partly stand in the prefix
cache: what vLLM derives from a prompt's own forward pass does not exist there, and vLLM would
answer with memory that nobody wrote.
"""

from __future__ import annotations

from typing import Any, Literal

from lcguard.handoff.errors import HandoffError

Kind = Literal["answer", "prompt", "handoff"]
_ANSWER = """
    presence_penalty frequency_penalty repetition_penalty temperature watermarking top_p
    top_k min_p seed stop stop_token_ids ignore_eos max_tokens min_tokens logprobs
    logprob_token_ids flat_logprobs detokenize skip_special_tokens
    spaces_between_special_tokens include_stop_str_in_output output_kind stream_interval
    skip_clone output_text_buffer_length _eos_token_id _all_stop_token_ids
    _watermarking_skipped structured_outputs logit_bias allowed_token_ids bad_words
    _bad_words_token_ids thinking_token_budget repetition_detection
"""
_PROMPT = """
    prompt_logprobs prompt_logprob_token_ids prompt_logprob_start
    routed_experts_prompt_start trace_decode_token_ids
"""
_HANDOFF = "n extra_args skip_reading_prefix_cache"
SAMPLING: dict[str, Kind] = {
    **dict.fromkeys(_ANSWER.split(), "answer"),
    **dict.fromkeys(_PROMPT.split(), "prompt"),
    **dict.fromkeys(_HANDOFF.split(), "handoff"),
}
"""Every field of vLLM's ``SamplingParams``: it shapes the answer alone, it reads or scores the
prompt (refused with a handoff), or the handoff itself decides. A field that no line names is
refused with a handoff, so that a later vLLM opens nothing."""


def reads_prompt(params: Any) -> bool:
    """Whether these ``SamplingParams`` ask for what only the prompt's own forward pass gives: the
    prefix cache must then not be read for them."""
    return any(
        getattr(params, name, None) is not None
        for name in ("prompt_logprobs", "prompt_logprob_token_ids")
    )


def check_params(params: Any) -> None:
    """Raises ``HandoffError`` (400) for sampling parameters that do not go with a handoff."""
    if not hasattr(type(params), "__struct_fields__") or not hasattr(params, "temperature"):
        raise HandoffError(400, "a handoff takes a request that generates, not one that pools")
    kind: Any = type(params)
    unset = kind()
    for name in kind.__struct_fields__:
        if SAMPLING.get(name) in ("answer", "handoff"):
            continue
        value, default = getattr(params, name), getattr(unset, name)
        if value is default or (type(value) is type(default) and value == default):
            continue
        what = "prompt log-probabilities (echo, prompt_logprobs)"
        raise HandoffError(
            400,
            f"{what if name == 'prompt_logprobs' else name}: a handoff's prompt is not all "
            "computed in its own request, so there is nothing to answer; leave it out",
        )


def check_request(request: Any) -> None:
    """The engine's own look at a request with a handoff. Raises ``HandoffError`` (400)."""
    check_params(request.sampling_params)
    for name, why in (
        ("prompt_embeds", "embeddings have no tokens that a guard could name"),
        ("mm_features", "media leave no tokens that a guard could name"),
        ("lora_request", "guards are made for the weights of the base model"),
        ("resumable", "a prompt that goes on later has no end to publish at"),
    ):
        value = getattr(request, name, None)
        if not (value is None or value is False or value == []):
            raise HandoffError(400, f"a handoff takes no request with {name}: {why}")
