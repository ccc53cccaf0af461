"""A vLLM that dies is started again: real processes, counted by a clock that the test sets."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lcguard.server import engine as module
from lcguard.server.engine import Engine, EnginePlan
from lcguard.server.settings import EngineSettings

WINDOW_S = 600.0


@dataclass(frozen=True)
class Dies(EnginePlan):
    """A plan whose process says why it ends, and does."""

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-c", "print('RuntimeError: it broke'); raise SystemExit(3)"]


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def engine_of(folder: Path, restarts: int, clock: Clock, said: list[str]) -> Engine:
    settings = EngineSettings(restarts=restarts, restart_window_s=WINDOW_S, nice=0)
    plan = Dies(settings, "m", "m", "", "memory://x", None, folder / "vllm.log")
    return Engine(plan, bytes(32), said.append, clock)


async def until(what: Callable[[], Any]) -> None:
    async with asyncio.timeout(120):
        while not what():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("restarts", [0, 2])
def test_deaths_are_counted_within_a_window_and_none_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: int
) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    clock, said = Clock(), list[str]()

    async def run() -> None:
        engine = engine_of(tmp_path, restarts, clock, said)
        await engine.start()
        try:
            for n, backoff_s in enumerate((1.0, 5.0)[:restarts], 1):
                await until(lambda n=n: len(said) == n)
                assert f"again in {backoff_s:g} s ({restarts - n} left)" in said[-1]
                assert (engine.starts, engine.failure) == (n, "")
                clock.now_s += backoff_s
            first_death_s = 1000.0
            await until(lambda: engine.failure)
            assert engine.failure.startswith("vLLM ended with 3: it broke")
            assert f"{restarts + 1} times in 600 s" in engine.failure
            assert engine.starts == restarts + 1
            # it stays down as long as the window is full, and not longer
            clock.now_s = first_death_s + WINDOW_S - 0.5
            await asyncio.sleep(0.1)
            assert engine.starts == restarts + 1
            clock.now_s = first_death_s + WINDOW_S
            await until(lambda: engine.starts == restarts + 2)
        finally:
            await engine.stop()

    asyncio.run(run())


@dataclass(frozen=True)
class Refuses(EnginePlan):
    """As the connector refuses a start, or vLLM an argument that it does not know."""

    code: int = 1

    def command(self, port: int) -> list[str]:
        said = "lcguard.vllm.errors.StartError: no such guard" if self.code == 1 else "error: --x?"
        return [sys.executable, "-c", f"print({said!r}); raise SystemExit({self.code})"]


@pytest.mark.parametrize(("code", "said"), [(1, "no such guard"), (2, "--x?")])
def test_a_start_that_can_never_succeed_is_tried_once(tmp_path: Path, code: int, said: str) -> None:
    told, refused = list[str](), list[str]()
    plan = Refuses(
        EngineSettings(nice=0), "m", "m", "", "memory://x", None, tmp_path / "vllm.log", code=code
    )

    async def run() -> None:
        engine = Engine(plan, bytes(32), told.append, refuse=refused.append)
        await engine.start()
        try:
            await until(lambda: refused)
            assert refused[0].startswith(f"vLLM ended with {code}: {said}")
            assert engine.failure == refused[0]
            assert (engine.starts, told) == (1, [])
        finally:
            await engine.stop()

    asyncio.run(run())


def test_deaths_that_lie_far_apart_are_none_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over its lifetime it dies far more often than ``restarts``."""
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    clock, said = Clock(), list[str]()

    async def run() -> None:
        engine = engine_of(tmp_path, 1, clock, said)
        await engine.start()
        try:
            for n in range(1, 7):
                await until(lambda n=n: len(said) == n)
                assert "again in 1 s (0 left)" in said[-1]
                clock.now_s += WINDOW_S + 1
            await until(lambda: engine.starts == 7)
            assert engine.failure == ""
        finally:
            await engine.stop()

    asyncio.run(run())
