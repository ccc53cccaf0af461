"""Limits of keys, and the places before vLLM."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcguard.server.limits.concurrency import ConcurrencyLimit
from lcguard.server.limits.key_limits import KeyLimits, Limited, Limits


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_key_may_spend_its_minute_at_once_and_then_its_rate(clock: Clock) -> None:
    keys = KeyLimits(clock=clock)
    limits = Limits(requests_per_min=6)
    for _ in range(6):
        keys.admit("a", limits).end()
    with pytest.raises(Limited, match="6 requests a minute") as refused:
        keys.admit("a", limits)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 10)
    keys.admit("b", limits).end()  # another key's minute is its own
    clock.now_s += 9.9
    with pytest.raises(Limited) as refused:
        keys.admit("a", limits)
    assert refused.value.retry_after_s == 1
    clock.now_s += 0.1
    keys.admit("a", limits).end()
    with pytest.raises(Limited):
        keys.admit("a", limits)
    clock.now_s += 3600  # no more than a minute's worth is ever saved up
    for _ in range(6):
        keys.admit("a", limits).end()
    with pytest.raises(Limited):
        keys.admit("a", limits)


def test_what_was_used_replaces_what_was_set_aside(clock: Clock) -> None:
    keys = KeyLimits(clock=clock)
    limits = Limits(tokens_per_min=600)
    with keys.admit("a", limits, tokens=500) as admission:
        with pytest.raises(Limited, match="600 tokens a minute"):
            keys.admit("a", limits, tokens=101)
        admission.settle(100)
    with keys.admit("a", limits, tokens=500):
        pass  # never settled: charged in full
    with pytest.raises(Limited) as refused:
        keys.admit("a", limits, tokens=10)
    assert refused.value.retry_after_s == 1
    clock.now_s += 60
    with keys.admit("a", limits, tokens=10) as admission:
        admission.settle(660)  # used more than allowed: a debt
    with pytest.raises(Limited) as refused:
        keys.admit("a", limits, tokens=60)
    assert refused.value.retry_after_s == 12


def test_a_stream_can_set_more_aside(clock: Clock) -> None:
    keys = KeyLimits(clock=clock)
    with keys.admit("a", Limits(tokens_per_min=100), tokens=40) as admission:
        admission.reserve(60)
        with pytest.raises(Limited):
            admission.reserve(1)
        admission.settle(100)
    with pytest.raises(Limited):
        keys.admit("a", Limits(tokens_per_min=100), tokens=1)


def test_a_request_that_can_never_fit_is_not_told_to_wait(clock: Clock) -> None:
    with pytest.raises(Limited, match="lower max_tokens") as refused:
        KeyLimits(clock=clock).admit("a", Limits(tokens_per_min=100), tokens=101)
    assert (refused.value.status, refused.value.retry_after_s) == (413, None)


def test_a_refused_request_costs_nothing(clock: Clock) -> None:
    keys = KeyLimits(clock=clock)
    limits = Limits(requests_per_min=2, tokens_per_min=100, concurrency=1)
    for _ in range(10):
        with pytest.raises(Limited):
            keys.admit("a", limits, tokens=101)
    with keys.admit("a", limits, tokens=50):
        for _ in range(10):
            with pytest.raises(Limited, match="1 requests running"):
                keys.admit("a", limits, tokens=1)
    keys.admit("a", limits, tokens=50).end()


def test_concurrency_is_given_back_once(clock: Clock) -> None:
    keys, limits = KeyLimits(clock=clock), Limits(concurrency=2)
    first, second = keys.admit("a", limits), keys.admit("a", limits)
    with pytest.raises(Limited):
        keys.admit("a", limits)
    first.end()
    first.end()
    third = keys.admit("a", limits)
    with pytest.raises(Limited):
        keys.admit("a", limits)
    with pytest.raises(ZeroDivisionError), third:
        raise ZeroDivisionError
    second.end()
    assert len([keys.admit("a", limits) for _ in range(2)]) == 2


def test_defaults_hold_for_what_a_key_does_not_say(clock: Clock) -> None:
    keys = KeyLimits(Limits(requests_per_min=1, concurrency=1), clock=clock)
    keys.admit("a", Limits(requests_per_min=2)).end()
    with keys.admit("a", Limits(requests_per_min=2)), pytest.raises(Limited, match="running"):
        keys.admit("a", Limits(requests_per_min=2))
    keys.admit("b").end()
    with pytest.raises(Limited, match="1 requests a minute"):
        keys.admit("b")


def test_another_limit_is_no_fresh_minute(clock: Clock) -> None:
    keys = KeyLimits(clock=clock)
    with keys.admit("a", Limits(tokens_per_min=100), tokens=90):
        pass
    with pytest.raises(Limited):
        keys.admit("a", Limits(tokens_per_min=120), tokens=31)
    keys.admit("a", Limits(tokens_per_min=120), tokens=30).end()
    with pytest.raises(Limited):
        keys.admit("a", Limits(tokens_per_min=50), tokens=1)


def test_a_clock_that_goes_back_gives_nothing(clock: Clock) -> None:
    keys, limits = KeyLimits(clock=clock), Limits(requests_per_min=1)
    keys.admit("a", limits).end()
    clock.now_s -= 500
    with pytest.raises(Limited):
        keys.admit("a", limits)
    clock.now_s += 500
    with pytest.raises(Limited):
        keys.admit("a", limits)


def test_memory_is_bounded_and_no_spent_key_is_forgotten(clock: Clock) -> None:
    keys, limits = KeyLimits(max_keys=100, clock=clock), Limits(requests_per_min=60)
    spent = Limits(requests_per_min=1)
    keys.admit("spent", spent).end()
    for i in range(2900):
        clock.now_s += 0.02
        keys.admit(f"k{i}", limits).end()  # fresh again after a second: 50 are not
        assert len(keys) <= 100
    with pytest.raises(Limited, match="requests a minute"):
        keys.admit("spent", spent)
    busy = [keys.admit(f"busy{i}", Limits(concurrency=1)) for i in range(30)]
    clock.now_s += 60
    for i in range(70):
        keys.admit(f"n{i}", limits).end()
    with pytest.raises(Limited, match="100 keys are in use") as refused:
        keys.admit("more", limits)
    assert (refused.value.status, len(keys)) == (429, 100)
    for admission in busy:
        admission.end()
    clock.now_s += 60
    keys.admit("more", limits).end()


def test_a_key_without_limits_takes_no_memory(clock: Clock) -> None:
    keys = KeyLimits(clock=clock)
    for i in range(100):
        keys.admit(f"k{i}", None, tokens=10**9).end()
    assert len(keys) == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 40), st.integers(0, 60)), max_size=60),
    st.integers(30, 90),
)
def test_never_more_than_one_minute_ahead(steps: list[tuple[float, int, int]], rate: int) -> None:
    """In any window of s seconds at most a minute's worth, s times the rate, and one request's
    surplus over what it had set aside."""
    clock = Clock()
    keys, used = KeyLimits(clock=clock), 0
    start_s = clock.now_s
    surplus = 0
    for passed_s, aside, actual in steps:
        clock.now_s += passed_s
        try:
            admission = keys.admit("a", Limits(tokens_per_min=rate), tokens=aside)
        except Limited:
            continue
        with admission:
            admission.settle(actual)
        used += actual
        surplus = max(0, actual - aside)
        assert used <= rate * (1 + (clock.now_s - start_s) / 60) + surplus + 1e-6


# ---- places


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_first_come_first_served() -> None:
    async def run() -> None:
        places, order = ConcurrencyLimit(1, 10, 60), list[int]()

        async def one(i: int) -> None:
            async with places:
                order.append(i)
                await asyncio.sleep(0)

        await places.acquire()
        tasks = [asyncio.create_task(one(i)) for i in range(5)]
        await settle()
        assert (places.running, places.waiting) == (1, 5)
        places.release()
        late = asyncio.create_task(one(5))  # a place is free, but it is promised already
        await asyncio.gather(*tasks, late)
        assert order == [0, 1, 2, 3, 4, 5]
        assert (places.running, places.waiting) == (0, 0)

    asyncio.run(run())


def test_a_full_line_refuses_at_once() -> None:
    async def run() -> None:
        places = ConcurrencyLimit(1, 1, 60)
        await places.acquire()
        waiter = asyncio.create_task(places.acquire())
        await settle()
        with pytest.raises(Limited, match="1 requests are running and 1 waiting") as refused:
            await places.acquire()
        assert (refused.value.status, refused.value.retry_after_s) == (429, 1)
        places.release()
        await waiter
        places.release()
        assert places.running == 0

    asyncio.run(run())


def test_who_waits_too_long_is_refused_and_leaves_the_line() -> None:
    async def run() -> None:
        places = ConcurrencyLimit(1, 5, 0.02)
        await places.acquire()
        with pytest.raises(Limited, match=r"within 0\.02 s"):
            await places.acquire()
        assert places.waiting == 0
        places.release()
        assert places.running == 0
        async with places:
            assert places.running == 1

    asyncio.run(run())


def test_cancelled_while_waiting() -> None:
    async def run() -> None:
        places = ConcurrencyLimit(1, 5, 60)
        await places.acquire()
        gone, stays = asyncio.create_task(places.acquire()), asyncio.create_task(places.acquire())
        await settle()
        gone.cancel()
        await settle()
        assert places.waiting == 1
        places.release()
        await stays
        places.release()
        assert (places.running, places.waiting) == (0, 0)

    asyncio.run(run())


def test_cancelled_with_the_place_just_given() -> None:
    async def run() -> None:
        places = ConcurrencyLimit(1, 5, 60)
        await places.acquire()
        gone, stays = asyncio.create_task(places.acquire()), asyncio.create_task(places.acquire())
        await settle()
        places.release()  # the place is gone's
        gone.cancel()  # who never runs again
        with pytest.raises(asyncio.CancelledError):
            await gone
        await asyncio.wait_for(stays, 60)
        places.release()
        assert (places.running, places.waiting) == (0, 0)

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(5))
def test_a_crowd_with_cancels_and_timeouts_leaks_no_place(seed: int) -> None:
    async def run() -> None:
        rng, places, most = random.Random(seed), ConcurrencyLimit(3, 20, 0.01), 0

        async def one() -> None:
            nonlocal most
            async with places:
                most = max(most, places.running)
                await asyncio.sleep(rng.random() * 0.004)
                if rng.random() < 0.2:
                    raise ZeroDivisionError

        tasks = [asyncio.create_task(one()) for _ in range(200)]
        for task in rng.sample(tasks, 80):
            await asyncio.sleep(rng.random() * 0.001)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(r) for r in results} <= {
            type(None),
            Limited,
            asyncio.CancelledError,
            ZeroDivisionError,
        }
        assert (places.running, places.waiting) == (0, 0)
        assert 0 < most <= 3

    asyncio.run(run())


@pytest.mark.parametrize("wrong", [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_a_limit_that_lets_nobody_in_is_refused(wrong: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="at least 1 place"):
        ConcurrencyLimit(*wrong)
