"""``python -m lcguard.commands.campaign --requests 10000``: one real vLLM under mixed requests.

Every option of ``campaign_requests`` on plain requests, publishes, consumes and both at once, many
at a time, with chunked prefill, preemption and a warm prefix cache. Nothing may die, nothing may
meet another agent's blocks, and every number of every answer must be one that was computed.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lcguard.commands.campaign_requests import (
    KINDS,
    N_TEXTS,
    OPTIONS,
    POLICY,
    VOCABULARY,
    Asked,
    Segment,
    Sender,
)
from lcguard.commands.script import run_script

IN_FLIGHT = 24
TOLERANCE = 2e-3
"""Between two computations of the same log-probability, in other batches and chunks."""


@dataclass
class Report:
    """What was seen."""

    requests: int = 0
    refused: int = 0
    by_vllm: Counter[str] = field(default_factory=Counter)
    """Refusals of vLLM's own, by their message's beginning."""
    answered: int = 0
    hits: int = 0
    """Answers that met blocks of their own owner: the cache is at work."""
    scored: int = 0
    """Prompt log-probabilities that were checked against another computation of them."""
    options: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(kind, option) of requests that were sent."""
    faults: list[str] = field(default_factory=list)

    def missing(self) -> list[str]:
        """Options that did not appear on some kind of request."""
        return [f"{o} on {k}" for k in KINDS for o in OPTIONS if not self.options[k, o]]

    def lines(self) -> Iterator[str]:
        yield (
            f"{self.requests} requests: {self.answered} answered, {self.refused} refused as they "
            f"must be, {sum(self.by_vllm.values())} refused by vLLM's own checks"
        )
        yield f"{self.hits} met their own prefix-cache blocks, {self.scored} scores checked twice"
        yield from (f"missing: {m}" for m in self.missing())
        yield from (f"FAULT: {f}" for f in self.faults[:20])
        yield f"{len(self.faults)} faults"


class Campaign:
    """Against one in-process engine, ``vllm.LLM`` with the connector and ``POLICY``."""

    def __init__(self, llm: Any, texts: Sequence[Sequence[int]], seed: int) -> None:
        self.engine, self.sender, self.report = llm.llm_engine, Sender(texts, seed), Report()
        self._running: dict[str, Asked] = {}
        self._owners: set[tuple[Any, ...]] = set()
        self._scores: dict[tuple[int, int], float] = {}

    def run(self, n: int) -> Report:
        """Sends ``n`` requests. Whatever the engine raises is raised."""
        while self.report.requests < n or self._running:
            while self.report.requests < n and len(self._running) < IN_FLIGHT:
                self._send(self.sender.draw())
            for output in self.engine.step():
                self._take(output)
        return self.report

    def _send(self, one: Asked) -> None:
        from vllm.exceptions import GracefulHTTPError, VLLMValidationError

        report = self.report
        report.requests += 1
        report.options.update((one.kind, name) for name in one.options)
        name = f"c{report.requests}"
        prompt = {"type": "token", "prompt_token_ids": one.ids, "cache_salt": f"of {one.agent}"}
        try:
            self.engine.add_request(name, prompt, _params(one))
        except GracefulHTTPError as error:
            if one.refused and error.http_status in (400, 403) and error.message:
                report.refused += 1
            else:
                self._fault(one, f"refused: {error}")
            return
        except (VLLMValidationError, ValueError) as error:
            report.by_vllm[str(error)[:50]] += 1
            return
        if one.refused:
            self._fault(one, "not refused")
        one.seen = one.owner in self._owners or one.options.get("n", 1) > 1
        self._owners.add(one.owner)
        self._running[name] = one

    def _take(self, output: Any) -> None:
        name = output.request_id
        one = self._running[name]
        for answer in output.outputs:
            self._check_answer(one, answer)
        if output.prompt_logprobs:
            self._check_scores(one, output)
        if output.finished:
            del self._running[name]
            self.report.answered += 1
            self._check_end(one, output)

    def _check_answer(self, one: Asked, answer: Any) -> None:
        if any(not 0 <= t < VOCABULARY for t in answer.token_ids):
            self._fault(one, f"token ids {list(answer.token_ids)}")
        for row in answer.logprobs or ():
            for token, found in row.items():
                if not _is_score(token, found.logprob):
                    self._fault(one, f"token {token} has log-probability {found.logprob}")
        if answer.finish_reason == "error":
            self._fault(one, "ended in an error")

    def _check_scores(self, one: Asked, output: Any) -> None:
        if one.kind != "plain":
            self._fault(one, "a handoff scored its prompt")
            return
        for at, row in enumerate(output.prompt_logprobs):
            if not row:  # the first has nothing before it
                if at:
                    self._fault(one, f"no score at {at}")
                continue
            for token, found in row.items():
                if not _is_score(token, found.logprob):
                    self._fault(one, f"score {found.logprob} of token {token} at {at}")
            value = row[one.ids[at]].logprob
            before = self._scores.setdefault((one.text, at), value)
            self.report.scored += before is not value
            if abs(before - value) > TOLERANCE * max(1.0, abs(before)):
                self._fault(one, f"score {value} at {at}, {before} another time")

    def _check_end(self, one: Asked, output: Any) -> None:
        met = int(output.num_cached_tokens or 0)
        if met > one.n_consumed:
            if one.seen:
                self.report.hits += 1
            else:
                self._fault(one, f"met {met} cached tokens of others")
        if one.kind in ("publish", "both"):
            made = (output.kv_transfer_params or {}).get("lcguard") or {}
            if "handle" not in made:
                self._fault(one, f"published nothing: {made}")
                return
            self.sender.keep(
                Segment(
                    made["handle"],
                    made["grant"],
                    made["audience"],
                    made["n_tokens"],
                    raw=not made["forbid"],
                    origins=one.origins,
                )
            )

    def _fault(self, one: Asked, what: str) -> None:
        self.report.faults.append(f"{one.kind} of {one.agent}, {one.options}: {what}")


def _is_score(token: int, value: float) -> bool:
    """-inf is the score of what a constraint excludes; rounding may take 0 a little above."""
    return 0 <= token < VOCABULARY and not math.isnan(value) and value <= 1e-4


def _params(one: Asked) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        RequestOutputKind,
        StructuredOutputsParams,
    )

    options = dict(one.options)
    for name, kind in (
        ("structured_outputs", StructuredOutputsParams),
        ("repetition_detection", RepetitionDetectionParams),
    ):
        if name in options:
            options[name] = kind(**options[name])
    if "output_kind" in options:
        options["output_kind"] = RequestOutputKind(options["output_kind"])
    extra = None if one.handoff is None else {"kv_transfer_params": {"lcguard": one.handoff}}
    return SamplingParams(extra_args=extra, **options)


def texts_of(encoder: Any, n: int = N_TEXTS) -> list[list[int]]:
    """Prompts that differ from their first token on, of 40 to 150 tokens."""
    from lcguard.agents.scenarios.load import load_hops

    found = encoder.encode(load_hops("generator", seed=5, split="test", n=n)[:n])
    return [[100 + i, *record.ids[1:150]] for i, record in enumerate(found)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcguard.commands.campaign")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from lcguard.agents.backends.hf import load_backend
    from lcguard.agents.nano.load import model_path
    from lcguard.vllm.llm import GuardedLLM

    with tempfile.TemporaryDirectory(prefix="lcguard-campaign-") as folder:
        llm = GuardedLLM.build(
            str(model_path()),
            policy=POLICY,
            guards={"gate": "nano:gate"},
            store=f"file://{folder}",
            **ENGINE,
        )
        start = time.monotonic()
        report = Campaign(llm.engine, texts_of(load_backend("nano").encoder), given.seed).run(
            given.requests
        )
        for line in report.lines():
            print(line)
        print(f"{time.monotonic() - start:.0f} s")
        llm.engine.llm_engine.engine_core.shutdown()
    return 1 if report.faults or report.missing() else 0


ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 32,
    "max_logprobs": -1,
    "enable_prefix_caching": True,
    "enforce_eager": True,
    "num_gpu_blocks_override": 110,
    "seed": 0,
}
"""Few blocks, so that requests are preempted and cached blocks are evicted."""

if __name__ == "__main__":
    run_script(main)
