"""One engine whose store stops: the scheduler serves everybody else, in this very order.

The store is a real Redis server that is stopped by a signal, and time plays no part: while it is
stopped the deadline of a call is far away, and what must not wait ends before what has to.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from lcguard.agents.backends.hf import load_backend
from lcguard.agents.nano.load import model_path
from lcguard.handoff.handle import Handle, consume_params, publish_params
from tests.engine import KEY, needs_vllm, policy, question, records
from tests.store.places import running_redis

pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


class Steps:
    """An engine that the test steps by hand."""

    def __init__(self, llm: Any, process: Any) -> None:
        self.llm, self.engine, self.process = llm, llm.engine.llm_engine, process
        self.done: list[str] = []
        """Requests in the order in which they ended."""
        self.outputs: dict[str, Any] = {}

    def add(self, name: str, ids: Any, handoff: Any = None, n: int = 3) -> None:
        from vllm import SamplingParams

        extra = {"kv_transfer_params": {"lcguard": handoff}} if handoff else None
        params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, extra_args=extra)
        prompt = {"type": "token", "prompt_token_ids": list(ids)}
        self.engine.add_request(name, prompt, params)

    def step(self) -> None:
        for output in self.engine.step():
            if output.finished:
                self.done.append(output.request_id)
                self.outputs[output.request_id] = output

    def until(self, *names: str) -> None:
        """Steps until all of these have ended."""
        for _ in range(200_000):
            if set(names) <= set(self.done):
                return
            self.step()
        raise AssertionError(f"only {self.done} ended")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def module_steps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steps]:
    os.environ.update(
        LCGUARD_KEY=KEY,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_NO_USAGE_STATS="1",
    )
    from lcguard.vllm.llm import GuardedLLM

    with running_redis(tmp_path_factory.mktemp("redis")) as (port, process):
        llm = GuardedLLM.build(
            str(model_path()),
            policy=policy(),
            guards={"gate": "nano:gate"},
            store=f"redis://127.0.0.1:{port}/0",
            settings={"store_timeout_s": 300},
            dtype="float32",
            block_size=32,
            max_model_len=1024,
            enforce_eager=True,
            seed=0,
        )
        try:
            yield Steps(llm, process)
        finally:
            process.send_signal(signal.SIGCONT)
            llm.engine.llm_engine.engine_core.shutdown()


@pytest.fixture
def steps(module_steps: Steps) -> Iterator[Steps]:
    module_steps.done, module_steps.outputs = [], {}
    yield module_steps
    module_steps.go_on()


@pytest.fixture(scope="module")
def prompts() -> tuple[list[int], list[int]]:
    """A record and a question on it."""
    agent = load_backend("nano")
    (record,) = records(agent, 1, seed=701)
    return list(record.ids), list(question(record).prompt)


def consume(handle: Handle) -> dict[str, Any]:
    return {"consume": consume_params("identity", [handle])}


def answer(output: Any) -> dict[str, Any]:
    return dict(output.kv_transfer_params["lcguard"])


def test_neighbours_go_on_while_segments_are_asked_for(steps: Steps, prompts: Any) -> None:
    record, ask = prompts
    handle = steps.llm.publish(agent="intake", prompt=record, audience="identity")
    steps.add("alone", [*record, *ask], n=8)
    steps.until("alone")
    steps.add("waits", ask, consume(handle), n=8)  # admitted, and handed to the scheduler
    steps.stop()
    for i in range(3):
        steps.add(f"plain {i}", ask)
        steps.until(f"plain {i}")
    assert steps.done == ["alone", "plain 0", "plain 1", "plain 2"]
    steps.go_on()
    steps.until("waits")
    assert answer(steps.outputs["waits"])["consumed_tokens"] >= len(record)
    told = [steps.outputs[name].outputs[0].token_ids for name in ("waits", "alone")]
    assert list(told[0]) == list(told[1])


def test_neighbours_go_on_while_a_segment_is_stored(steps: Steps, prompts: Any) -> None:
    record, ask = prompts
    steps.stop()
    steps.add("publishes", record, {"publish": publish_params("intake", "identity")}, n=1)
    for i in range(3):
        steps.add(f"plain {i}", ask)
        steps.until(f"plain {i}")
    assert steps.done == ["plain 0", "plain 1", "plain 2"], "an answer before it is stored"
    steps.go_on()
    steps.until("publishes")
    made = Handle.from_dict(answer(steps.outputs["publishes"]))
    assert made.n_tokens == len(record)
    assert steps.llm.generate(agent="identity", prompt=ask, consume=[made])


def test_a_store_that_refuses_ends_the_publish_alone(steps: Steps, prompts: Any) -> None:
    record, ask = prompts
    half = steps.llm.engine.llm_engine.engine_core.engine_core.scheduler.connector.scheduler
    client = half.gatekeeper.store._client
    client.config_set("maxmemory", 1)
    try:
        steps.add("publishes", record, {"publish": publish_params("intake", "identity")}, n=1)
        steps.add("plain", ask)
        steps.until("publishes", "plain")
        assert "was not stored" in answer(steps.outputs["publishes"])["error"]
        assert steps.outputs["plain"].outputs[0].finish_reason == "length"
    finally:
        client.config_set("maxmemory", 0)
    assert not steps.engine.has_unfinished_requests()


def test_what_is_left_while_it_waits_frees_everything(steps: Steps, prompts: Any) -> None:
    record, ask = prompts
    handle = steps.llm.publish(agent="intake", prompt=record, audience="identity")
    steps.add("waits", ask, consume(handle))
    steps.stop()
    steps.add("plain", ask)
    steps.until("plain")
    steps.engine.abort_request(["waits"])
    steps.go_on()
    for _ in range(200_000):
        if not steps.engine.engine_core.engine_core.scheduler.has_requests():
            break
        steps.step()
    assert steps.done == ["plain"]
    assert not steps.engine.engine_core.engine_core.scheduler.requests
