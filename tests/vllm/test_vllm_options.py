"""Every option of vLLM's on handoffs through a real engine: refused, or right."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lcguard.handoff.grants import new_handle
from lcguard.vllm.options import SAMPLING, check_params
from tests.engine import Engine, make_engine, needs_vllm, question, records, tokens
from tests.server.proxy import wait_for

pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    yield from make_engine(tmp_path_factory.mktemp("engine"))


def publish(source: str = "intake") -> dict[str, Any]:
    return {"publish": {"source": source, "audience": "identity"}}


def consume(made: Any) -> dict[str, Any]:
    return {
        "consume": {
            "agent": made.audience,
            "segments": [{"handle": made.handle, "grant": made.grant}],
        }
    }


def scores(output: Any) -> torch.Tensor:
    """Log-probability of every prompt token but the first."""
    first, *rest = output.prompt_logprobs
    assert first is None
    ids = output.prompt_token_ids[1:]
    return torch.tensor([row[i].logprob for row, i in zip(rest, ids, strict=True)])


# -- what reads the prompt


def test_every_sampling_parameter_is_judged() -> None:
    """A vLLM with another field fails here, and refuses it with a handoff until it is judged."""
    from vllm import SamplingParams

    assert set(SAMPLING) == set(SamplingParams.__struct_fields__)


READING = {
    "prompt_logprobs": 5,
    "prompt_logprob_token_ids": [[1, 2]],
    "prompt_logprob_start": 3,
    "trace_decode_token_ids": [4, 5],
    "routed_experts_prompt_start": 1,
}
"""An asking value of each option that reads the prompt."""


def test_the_reading_options_are_those_of_the_table() -> None:
    assert {n for n, kind in SAMPLING.items() if kind == "prompt"} == set(READING)


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("kind", ["publish", "consume", "both"])
def test_no_handoff_reads_its_prompt(
    engine: Engine, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with its name in the front end; by the engine alone, its request ends in an error,
    without a value of the prompt, and its neighbour does not notice."""
    from vllm import SamplingParams
    from vllm.exceptions import GracefulHTTPError

    from lcguard.handoff.errors import HandoffError

    (record,) = records(engine.agent, 1, seed=401)
    made = engine.llm.publish(agent="intake", prompt=list(record.ids), audience="identity")
    handoff = {
        "publish": publish("identity"),
        "consume": consume(made),
        "both": publish("identity") | consume(made),
    }[kind]
    params = SamplingParams(temperature=0, max_tokens=2)
    check_params(params)
    setattr(params, name, READING[name])
    with pytest.raises(HandoffError, match=r"prompt log-probabilities|" + name) as caught:
        check_params(params)
    assert caught.value.status == 400
    if name != "prompt_logprobs":
        return  # this engine was not started with what the others need: vLLM refuses them itself
    ask = list(record.ids) * 2
    with pytest.raises(GracefulHTTPError, match="prompt log-probabilities"):
        engine.run([ask], [handoff], prompt_logprobs=5)
    stored = len(engine.worker.store.handles())
    monkeypatch.setattr("lcguard.vllm.frontend.FrontEnd.admit", lambda self, h, prompt, p: prompt)
    for _ in range(2):  # the second would meet the first in the prefix cache
        bad, neighbour = engine.run([ask, ask], [handoff, None], prompt_logprobs=5)
        assert bad.outputs[0].finish_reason == "error"
        assert not any(bad.prompt_logprobs or [])
        assert torch.isfinite(scores(neighbour)).all()
    assert len(engine.worker.store.handles()) == stored


def test_a_plain_prompt_is_scored_whole(engine: Engine) -> None:
    """The prefix cache is not read for it, whatever the request says of the cache."""
    (record,) = records(engine.agent, 1, seed=402)
    ids = [*record.ids, *question(record).prompt]
    (warm,) = engine.run([ids])
    (hit,) = engine.run([ids])
    assert hit.num_cached_tokens > 0
    wanted = scores(engine.run([ids], prompt_logprobs=3)[0])
    (read,) = engine.run([ids], prompt_logprobs=3, skip_reading_prefix_cache=False)
    assert read.num_cached_tokens == 0
    torch.testing.assert_close(scores(read), wanted, atol=1e-4, rtol=1e-4)
    assert tokens(read) == tokens(warm)


def test_a_seed_means_the_same_however_its_prompt_was_cut(engine: Engine) -> None:
    """vLLM's CPU engine ends at a seeded prompt that is longer than a step."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": [100 + 7 * i % 1900 for i in range(220)]}

    def answer(salt: str, seed: int) -> tuple[int, ...]:
        params = SamplingParams(temperature=2.0, seed=seed, max_tokens=8, ignore_eos=True)
        one: Any = prompt | {"cache_salt": salt}
        return tuple(tokens(engine.llm.engine.generate([one], params, use_tqdm=False)[0]))

    cut = [answer(f"seeded {seed}", seed) for seed in range(4)]  # in steps of 96 tokens
    assert [answer(f"seeded {seed}", seed) for seed in range(4)] == cut  # from the prefix cache
    assert len(set(cut)) > 1


def test_a_publish_that_a_string_would_stop_tells_its_handle_or_is_refused(engine: Engine) -> None:
    """vLLM looks for such strings where it answers, and then has not heard of the handle yet."""
    from vllm.exceptions import GracefulHTTPError

    stopping: dict[str, Any] = {"stop": ["e", "a", "i", "o", "u", " "], "max_tokens": 8}

    def ask(handoff: Any) -> Any:
        from vllm import SamplingParams

        extra = {"kv_transfer_params": {"lcguard": handoff}}
        params = SamplingParams(temperature=0, extra_args=extra, **stopping)
        prompt = {"prompt_token_ids": [100, 101, 102, 103]}
        return engine.llm.engine.generate([prompt], params, use_tqdm=False)[0]

    with pytest.raises(GracefulHTTPError, match="stop"):
        ask(publish())
    handle = new_handle()  # as the proxy does: it knows the name
    ask({"publish": publish()["publish"] | {"handle": handle}})
    # it answers at once: the store is written beside the engine, no longer than its deadline
    wait_for(lambda: handle in engine.worker.store.handles())


@pytest.mark.parametrize("wrong", ["lcguard", 7, ["lcguard"], 0.5])
def test_transfer_parameters_of_another_type_end_nothing(
    engine: Engine, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``vllm_xargs`` carries any value to the engine's scheduler."""
    from vllm import SamplingParams
    from vllm.exceptions import GracefulHTTPError

    prompt = {"prompt_token_ids": [5, 6, 7]}
    params = SamplingParams(max_tokens=2, extra_args={"kv_transfer_params": wrong})
    with pytest.raises(GracefulHTTPError, match="give an object"):
        engine.llm.engine.generate([prompt], params, use_tqdm=False)
    arrive = engine.connector.scheduler.arrive

    def with_it(request: Any) -> None:  # as where the front end is another's
        request.kv_transfer_params = wrong
        arrive(request)

    monkeypatch.setattr(engine.connector.scheduler, "arrive", with_it)
    (out,) = engine.run([[5, 6, 7]], max_tokens=2)
    assert len(tokens(out)) == 2


@pytest.mark.parametrize("name", ["prompt_embeds", "mm_features", "lora_request", "resumable"])
def test_the_engine_refuses_prompts_that_no_guard_could_read(
    engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As such a request looks to the connector's scheduler, whichever way it came."""
    scheduler, seen = engine.connector.scheduler, []
    arrive = scheduler.arrive

    def with_it(request: Any) -> None:
        before = getattr(request, name)
        setattr(request, name, [object()] if name == "mm_features" else True)
        arrive(request)
        setattr(request, name, before)
        seen.append(request.request_id)

    monkeypatch.setattr(scheduler, "arrive", with_it)
    stored = len(engine.worker.store.handles())
    (bad,) = engine.run([[5, 6, 7, 8]], [publish()])
    assert bad.outputs[0].finish_reason == "error"
    assert f"no request with {name}" in caplog.text
    assert seen
    assert len(engine.worker.store.handles()) == stored


# -- whose blocks


def cached(engine: Engine, ids: list[int], handoff: Any, salt: str | None) -> int:
    from vllm import SamplingParams

    extra = None if handoff is None else {"kv_transfer_params": {"lcguard": handoff}}
    prompt = {"prompt_token_ids": ids} | ({} if salt is None else {"cache_salt": salt})
    params = SamplingParams(temperature=0, max_tokens=1, extra_args=extra)
    (out,) = engine.llm.engine.generate([prompt], params, use_tqdm=False)
    return int(out.num_cached_tokens)


def test_a_published_prompt_is_met_by_its_sender_alone(engine: Engine) -> None:
    """Without a salt nobody has said who sends: then not even the same name meets it."""
    (record,) = records(engine.agent, 1, seed=403)
    ids = list(record.ids)
    assert cached(engine, ids, publish("a"), "of a") == 0
    for handoff, salt in (
        (publish("b"), "of a"),
        (publish("a"), "of b"),
        (publish("a"), None),
        (None, "of a"),
        (None, None),
        (publish("a"), None),
    ):
        assert cached(engine, ids, handoff, salt) == 0, (handoff, salt)
    assert cached(engine, ids, publish("a"), "of a") > 0


def test_agents_of_one_process_do_not_meet(engine: Engine) -> None:
    (record,) = records(engine.agent, 1, seed=404)
    blocks = []
    for agent in ("a", "b", "a"):
        (out,) = engine.llm._run([engine.llm._call(agent, list(record.ids), {}, max_tokens=1)])
        blocks.append(out.num_cached_tokens)
    assert blocks[:2] == [0, 0]
    assert blocks[2] > 0


# -- all of it at once


def test_the_campaign_draws_every_sampling_parameter() -> None:
    from lcguard.commands.campaign_requests import INTERNAL, OPTIONS

    assert set(OPTIONS) | INTERNAL == set(SAMPLING)
    assert not set(OPTIONS) & INTERNAL


def test_one_engine_survives_every_option_on_every_kind_of_request() -> None:
    """A small share of the 10,000 requests that ``docs/security.md`` names."""
    done = subprocess.run(
        [sys.executable, "-m", "lcguard.commands.campaign", "--requests", "700"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "700 requests" in done.stdout
    assert "0 faults" in done.stdout.splitlines()[-2]
    hits = int(re.findall(r"(\d+) met their own", done.stdout)[0])
    assert hits > 5  # the cache was at work: about 20 of 700, by what is still cached when
