"""Attacks side by side: one process and one thread each.

The networks are small, so two threads on one fit gain little and two fits gain nearly two. Children
are forked: they see the parent's segments without copying them, and send back only guesses. The
journal is written by who asked, never by an executor.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
_jobs: Sequence[Callable[[], Any]] = ()


class Executor(Protocol):
    """Runs jobs side by side."""

    def __call__(
        self, jobs: Sequence[Callable[[], T]], device: str = "cpu"
    ) -> Iterator[tuple[int, T]]:
        """Index and result, in order, each as soon as it and those before it are there.

        An exception of any job is raised here. A job whose process was lost for good is left out,
        and ``BrokenProcessPool`` raised; after the others, where the executor could save those.
        """
        ...


def _run(index: int) -> Any:
    torch.set_num_threads(1)  # more would need OpenMP's threads, which do not survive a fork
    return _jobs[index]()


def side_by_side(jobs: Sequence[Callable[[], T]], device: str = "cpu") -> Iterator[tuple[int, T]]:
    """In forked processes; one after the other where forking is not safe (a GPU, not Linux). See
    ``Executor``."""
    global _jobs
    workers = min(len(jobs), os.cpu_count() or 1)
    # one job is forked like several: with other threads its floats would differ, and so would the
    # report of a run that was killed after the rest of its group
    if not jobs or device != "cpu" or sys.platform != "linux":
        yield from enumerate(job() for job in jobs)
        return
    _jobs = jobs
    try:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            yield from enumerate(pool.map(_run, range(len(jobs))))
    finally:
        _jobs = ()
