"""Attacks side by side: one process and one thread each.

The networks are small, so two threads on one fit gain little and two fits gain nearly two. Children
are forked: they see the parent's segments without copying them, and send back only guesses.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_jobs: Sequence[Callable[[], Any]] = ()


def _run(index: int) -> Any:
    torch.set_num_threads(1)  # more would need OpenMP's threads, which do not survive a fork
    return _jobs[index]()


def side_by_side(jobs: Sequence[Callable[[], T]], device: str = "cpu") -> Iterator[T]:
    """Results in order, each as soon as it and those before it are there. One after the other
    where forking is not safe (a GPU, not Linux).

    An exception of any job is raised here.
    """
    global _jobs
    workers = min(len(jobs), os.cpu_count() or 1)
    # one job is forked like several: with other threads its floats would differ, and so would the
    # report of a run that was killed after the rest of its group
    if not jobs or device != "cpu" or sys.platform != "linux":
        yield from (job() for job in jobs)
        return
    _jobs = jobs
    try:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            yield from pool.map(_run, range(len(jobs)))
    finally:
        _jobs = ()
