"""Random requests in which every sampling and log-probability option of vLLM's appears, on plain
requests and on every kind of handoff, with what must become of each."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

AGENTS = ("ann", "ben", "cid", "dot")
"""Who sends; each may consume what is published to it."""
GUARDED, BARE = ("dot",), ("ann", "ben", "cid")
"""Audiences behind the gate, and those whom everything may be told."""
KINDS = ("plain", "publish", "consume", "both")
POLICY: dict[str, Any] = {
    "version": 1,
    "edges": [
        *({"source": "*", "audience": a, "forbid": [], "guard": "identity"} for a in BARE),
        *(
            {"source": "*", "audience": a, "forbid": ["health", "person"], "guard": "gate"}
            for a in GUARDED
        ),
    ],
}
N_TEXTS, VOCABULARY = 24, 2048
INTERNAL = frozenset(
    {
        "skip_clone",
        "output_text_buffer_length",
        "_eos_token_id",
        "_all_stop_token_ids",
        "_watermarking_skipped",
        "_bad_words_token_ids",
        "extra_args",
    }
)
"""Fields that vLLM sets itself, and the one that carries the handoff."""
READING: dict[str, Callable[[random.Random], Any]] = {
    "prompt_logprobs": lambda r: r.choice([0, 1, 5, 20, -1]),
    "prompt_logprob_token_ids": lambda r: [[1, 2]],
    "prompt_logprob_start": lambda r: r.choice([1, 3]),
    "routed_experts_prompt_start": lambda r: 1,
    "trace_decode_token_ids": lambda r: [7, 8],
}
"""Options that read the prompt."""
ANSWER: dict[str, Callable[[random.Random], Any]] = {
    "presence_penalty": lambda r: r.uniform(-2, 2),
    "frequency_penalty": lambda r: r.uniform(-2, 2),
    "repetition_penalty": lambda r: r.uniform(0.5, 2),
    "temperature": lambda r: r.choice([0.0, 0.01, 0.7, 1.0, 2.0]),
    "watermarking": lambda r: r.choice([True, False]),
    "top_p": lambda r: r.choice([0.1, 0.9, 1.0]),
    "top_k": lambda r: r.choice([-1, 0, 1, 50]),
    "min_p": lambda r: r.choice([0.0, 0.1, 1.0]),
    "seed": lambda r: r.choice([-1, 0, r.getrandbits(31)]),
    "stop": lambda r: r.choice(["e", ["the", "."], ["<|end|>"]]),
    "stop_token_ids": lambda r: r.sample(range(VOCABULARY), 3),
    "ignore_eos": lambda r: r.choice([True, False]),
    "max_tokens": lambda r: r.randint(1, 6),
    "min_tokens": lambda r: 1,
    "logprobs": lambda r: r.choice([0, 1, 5, 20, -1]),
    "logprob_token_ids": lambda r: r.sample(range(VOCABULARY), r.randint(1, 8)),
    "flat_logprobs": lambda r: True,
    "detokenize": lambda r: r.choice([True, False]),
    "skip_special_tokens": lambda r: r.choice([True, False]),
    "spaces_between_special_tokens": lambda r: r.choice([True, False]),
    "include_stop_str_in_output": lambda r: True,
    "output_kind": lambda r: r.randint(0, 2),
    "stream_interval": lambda r: r.randint(1, 4),
    "logit_bias": lambda r: {t: r.uniform(-100, 100) for t in r.sample(range(VOCABULARY), 3)},
    "allowed_token_ids": lambda r: r.sample(range(VOCABULARY), r.randint(1, 40)),
    "bad_words": lambda r: r.choice([["the"], ["patient", "name of"]]),
    "structured_outputs": lambda r: {"choice": ["yes", "no"]},
    "repetition_detection": lambda r: {"max_pattern_size": 3, "min_count": 2},
    "thinking_token_budget": lambda r: 4,
}
"""Options that shape the answer alone."""
HANDOFF: dict[str, Callable[[random.Random], Any]] = {
    "n": lambda r: r.choice([1, 2, 3]),
    "skip_reading_prefix_cache": lambda r: r.choice([True, False]),
}
OPTIONS = ANSWER | READING | HANDOFF


@dataclass(frozen=True)
class Segment:
    """A published segment that its audience may consume."""

    handle: str
    grant: str
    audience: str
    n_tokens: int
    raw: bool
    """Published where everything may be told."""
    origins: frozenset[str]
    """Whose text it stands on."""


@dataclass
class Asked:
    """One request."""

    kind: str
    agent: str
    text: int
    """Which of the shared prompts."""
    ids: list[int]
    options: dict[str, Any]
    handoff: dict[str, Any] | None = None
    refused: bool = False
    """The front end must refuse it."""
    consumed: tuple[Segment, ...] = ()
    owner: tuple[Any, ...] = ()
    """Who may meet its blocks in the prefix cache."""
    seen: bool = False
    """Whether its blocks may be there: sent by its owner before, or shared by its answers."""

    @property
    def n_consumed(self) -> int:
        return sum(s.n_tokens for s in self.consumed)

    @property
    def origins(self) -> frozenset[str]:
        return frozenset({self.agent}).union(*(s.origins for s in self.consumed))


class Sender:
    """Draws requests; one seed, one sequence as long as the same segments come back."""

    def __init__(self, texts: Sequence[Sequence[int]], seed: int) -> None:
        """``texts``: prompts that all agents send, no two with the same first block."""
        self.texts, self._random = texts, random.Random(seed)
        self.segments: dict[str, list[Segment]] = {agent: [] for agent in AGENTS}

    def keep(self, segment: Segment) -> None:
        """For its audience to consume from now on."""
        self.segments[segment.audience] = [*self.segments[segment.audience][-15:], segment]

    def draw(self) -> Asked:
        r = self._random
        agent, text = r.choice(AGENTS), r.randrange(len(self.texts))
        kind = r.choice(KINDS)
        if not self.segments[agent] and kind in ("consume", "both"):
            kind = "publish"
        one = Asked(kind, agent, text, list(self.texts[text]), self._options())
        one.owner = (kind, agent, text)
        if kind != "plain":
            self._hand_over(one)
            reads = any(name in one.options for name in READING)
            many = kind != "consume" and one.options.get("n", 1) != 1
            unnamed = kind != "consume" and "stop" in one.options
            one.refused = one.refused or reads or many or unnamed
        return one

    def _options(self) -> dict[str, Any]:
        r = self._random
        names = [n for n in ANSWER if r.random() < 0.12]
        names += [n for n in (*READING, *HANDOFF) if r.random() < 0.04]
        out = {name: OPTIONS[name](r) for name in names}
        out.setdefault("max_tokens", r.randint(1, 4))
        if out.get("temperature", 1.0) == 0:
            out.pop("n", None)  # vLLM takes one greedy answer
        if "stop" in out or "structured_outputs" in out or "bad_words" in out:
            out.pop("detokenize", None)
        if "structured_outputs" in out:  # no token may be left that both allow
            out.pop("allowed_token_ids", None)
            out.pop("logit_bias", None)
        return out

    def _hand_over(self, one: Asked) -> None:
        r, handoff = self._random, dict[str, Any]()
        consumed: list[Segment] = []
        if one.kind in ("consume", "both"):
            consumed = r.sample(
                self.segments[one.agent], min(len(self.segments[one.agent]), r.randint(1, 2))
            )
            shown = [{"handle": s.handle, "grant": s.grant} for s in consumed]
            if r.random() < 0.05:  # somebody else's grant
                shown[0]["grant"] = shown[0]["grant"][:-4] + "beef"
                one.refused = True
            handoff["consume"] = {"agent": one.agent, "segments": shown}
            one.consumed = tuple(consumed)
            one.owner += tuple(s.handle for s in consumed)
        if one.kind in ("publish", "both"):
            audience = r.choice(AGENTS)
            handoff["publish"] = {"source": one.agent, "audience": audience}
            # what was guarded is passed on where nothing guards only to whom it came from
            others = [s for s in consumed if not s.raw and s.origins != {audience}]
            one.refused |= audience in BARE and bool(others)
        one.handoff = handoff
