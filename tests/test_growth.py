"""The simulation of growth: what it must not lose, and the limits that are known in closed form."""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import sys
from dataclasses import replace
from typing import Any

import pytest

from tests.paths import ROOT

SCRIPTS = ROOT / "scripts"


@pytest.fixture(scope="module")
def model() -> Any:
    return script("growth_model")


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def costs(model: Any) -> Any:
    return model.Costs(
        step=5.0,
        token=0.2,
        prefill_token=0.02,
        front=3.0,
        proxy=1.0,
        publish=40.0,
        consume=8.0,
        context_tokens=100,
        segment_bytes=1000,
    )


@pytest.mark.parametrize("store_bytes", [float("inf"), 5000])
def test_every_handoff_ends(model: Any, store_bytes: float) -> None:
    """Also under more than the engines can do, and where segments make room before they are read:
    those are counted as gone."""
    plan = model.Plan(
        per_hour=120_000, engines=1, handoffs=500, ttl_ms=20_000, store_bytes=store_bytes
    )
    site = model.Site(plan, costs(model)).run()
    assert site.arrived == len(site.publish_ms) == 500
    assert len(site.consume_ms) + site.gone == 500
    assert (site.gone > 0) == (store_bytes < float("inf"))
    assert site.inside == 0
    assert not any(e.load for e in site.engines)
    assert site.store.bytes == 0  # all have expired
    assert site.store.peak_bytes <= store_bytes


def test_littles_law(model: Any) -> None:
    """Requests in the system are arrivals times the time that each is there; segments in the store
    are arrivals times their ttl."""
    plan = model.Plan(per_hour=60_000, engines=2, handoffs=3000, ttl_ms=5000)
    site = model.Site(plan, costs(model)).run()
    spent = site.publish_ms + site.consume_ms
    assert site.area == pytest.approx(sum(spent))
    rate = plan.per_hour / 3_600_000
    assert site.store.peak_bytes == pytest.approx(rate * plan.ttl_ms * 1000, rel=0.4)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_server_is_an_mm1_queue(model: Any, load: float) -> None:
    """Mean time in the system: 1 / (mu - lambda)."""
    env, rng, service_ms, n = model.simpy.Environment(), random.Random(1), 2.0, 60_000
    station = model.Station(env, lambda: rng.expovariate(1 / service_ms))
    spent: list[float] = []

    def one() -> Any:
        started = env.now
        yield env.process(station.serve())
        spent.append(env.now - started)

    def arrivals() -> Any:
        for _ in range(n):
            yield env.timeout(rng.expovariate(load / service_ms))
            env.process(one())

    env.process(arrivals())
    env.run()
    assert len(spent) == n
    assert statistics.mean(spent) == pytest.approx(service_ms / (1 - load), rel=0.06)


def test_an_engine_alone_and_full(model: Any) -> None:
    """Steps of its own measured length: one request, and so many that all run at once."""
    c = replace(costs(model), front=0.0)
    _, alone = model.closed(c, 1, [model.Kind(10.0, 4)], 5)
    assert alone == pytest.approx(10 + 4 * (5 + 0.2))
    rps, full = model.closed(c, 10, [model.Kind(0.0, 50)], 5)
    assert full == pytest.approx(50 * (5 + 10 * 0.2))
    assert rps == pytest.approx(10 / full * 1000)


def test_more_handoffs_need_more_engines(model: Any) -> None:
    growth, c = script("simulate_growth"), costs(model)
    plan = model.Plan(per_hour=1, engines=1, handoffs=200, answer_tokens=8)
    few, many = (growth.needed(rate, c, plan, 400.0) for rate in (1000, 400_000))
    assert few["engines"] == 1 < many["engines"]
    assert few["store_bytes"] * 400 == pytest.approx(many["store_bytes"], rel=1e-3)
    assert many["publish_ms"]["p95"] + many["consume_ms"]["p95"] < 800


def test_costs_are_the_measured_ones(model: Any) -> None:
    """And what stands in the results is what the script says of them now."""
    growth = script("simulate_growth")
    found = json.loads((ROOT / "benchmarks" / "results" / "growth.json").read_text())
    now = model.measured(found["costs"]["context_tokens"])
    assert found["costs"] == {k: round(v, 4) for k, v in vars(now).items()}
    assert found["checks"] == growth.checks(now)
    with pytest.raises(ValueError, match="--context 7: measured were 256, 512"):
        growth.main(["--context", "7"])
    with pytest.raises(ValueError, match="a handoff alone takes"):
        growth.main(["--limit-ms", "1"])
