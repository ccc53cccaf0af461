"""How much a request may generate: what it states, times its copies, bounded and said to vLLM.

vLLM generates up to the end of its context where a request states no maximum, and as much again for
every further prompt and copy. So the proxy states one for each sequence, and its whole is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lcguard.server.errors import ProxyError
from lcguard.server.gateway.contract_fields import Endpoint

_STATED: dict[Endpoint, tuple[str, ...]] = {
    "chat": ("max_tokens", "max_completion_tokens"),
    "completions": ("max_tokens",),
    "responses": ("max_output_tokens",),
}
_DEFAULT: dict[Endpoint, int | None] = {"chat": None, "completions": 16, "responses": None}
"""OpenAI's where a request states none; none: whatever there is room for."""
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Size:
    """Of one request, in tokens."""

    prompt: int
    """Estimated from its bytes: vLLM's count is charged in the end."""
    output: int
    """The most that it can generate, all prompts and copies together."""

    @property
    def total(self) -> int:
        """Set aside before it runs."""
        return self.prompt + self.output


def bounded_size(
    endpoint: Endpoint,
    body: dict[str, Any],
    n_bytes: int,
    most: int,
    context: int | None,
    per_min: int | None,
) -> Size:
    """The request's size; writes the maximum of each sequence into ``body``.

    Args:
        n_bytes: of the body as it came.
        most: tokens that a request may generate.
        context: of the model, which vLLM lets no request exceed; None where it is not known.
        per_min: the key's tokens a minute; None: no limit.

    Raises:
        ProxyError: 400 for more than ``most``.
    """
    prompt_tokens, sequences = n_bytes // _BYTES_PER_TOKEN, _sequences(body)
    stated = {k: v for k in _STATED[endpoint] if isinstance(v := body.get(k), int)}
    if stated:
        name, each = max(stated.items(), key=lambda item: item[1])
        each = max(0, each)
        if each * sequences > most:
            times = f" for each of {sequences} answers" if sequences > 1 else ""
            raise ProxyError(
                400,
                f"{name}={each}{times}: at most {most} tokens in all here",
                code="max_tokens",
                param=name,
            )
        return Size(prompt_tokens, each * sequences)
    room = most if per_min is None else min(most, max(1, per_min - prompt_tokens))
    each = room // sequences
    if not each:
        raise ProxyError(
            400,
            f"{sequences} answers of a token each: at most {room} tokens in all here",
            code="max_tokens",
            param="n" if "n" in body else "prompt",
        )
    each = min(x for x in (each, _DEFAULT[endpoint], context) if x is not None)
    body[_STATED[endpoint][-1]] = each
    return Size(prompt_tokens, each * sequences)


def _sequences(body: dict[str, Any]) -> int:
    """Answers that vLLM computes."""
    copies, prompt = body.get("n"), body.get("prompt")
    many = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    prompts = len(prompt) if many and isinstance(prompt, list) else 1
    return prompts * (copies if isinstance(copies, int) and copies > 1 else 1)
