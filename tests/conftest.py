"""What every test gets: few threads, the same random numbers each time."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.fixtures import world

__all__ = ["world"]  # a fixture of all tests

# Two threads wait for each other longer than they compute: these tensors are tiny.
torch.set_num_threads(1)
# The same for the engines that tests start. Spinning on every core of a small machine they keep
# proxies and clients from running for as long as they generate.
os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

# A shared machine is slow at times; that is no failure.
settings.register_profile("lcguard", deadline=None)
settings.load_profile("lcguard")


@pytest.fixture(autouse=True)
def deterministic_seeds() -> None:
    """Seeds the global generators before each test."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines, train or attack come first: at the end of a run on two processes
    nobody then waits for the last long one."""
    long = {i.path for i in items if i.get_closest_marker("vllm") or i.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
