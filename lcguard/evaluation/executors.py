"""Where attacks run side by side, by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lcguard.evaluation.parallel import Executor, side_by_side
from lcguard.evaluation.ray_executor import ray_executor
from lcguard.nearest import unknown

EXECUTORS = ("local", "ray")


@contextmanager
def executor(name: str) -> Iterator[Executor]:
    """One of ``EXECUTORS``, for as long as the context lasts.

    Raises ``ValueError`` for another name, or where what it needs is not installed.
    """
    if name == "local":
        yield side_by_side
    elif name == "ray":
        with ray_executor() as found:
            yield found
    else:
        raise ValueError(unknown("executor", name, EXECUTORS))
