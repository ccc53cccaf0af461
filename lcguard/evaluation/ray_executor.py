"""Attacks side by side on a Ray of this machine, which is started for one run and ends with it.

A forked pool is lost with any of its processes; Ray runs the job of a lost one again in another.
Jobs cross to its workers as they are when asked for, once a group, with everything that the parent
has prepared, and run there on one thread: guesses are those of the forked processes.

Jobs hold raw KV and come back as guesses, and whoever speaks to Ray runs code. So it listens on the
loopback alone and asks for a token that this process drew; no dashboard, no statistics, nothing
spilled to disk, and its files lie in a folder of the owner's that goes with it.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from lcguard.evaluation.parallel import Executor

T = TypeVar("T")
RETRIES = 2
"""How often a job is run again whose worker was lost."""
_LOOPBACK = "127.0.0.1"
# Ray reads them once, when it is imported. The first is what Ray calls a machine that is no part of
# a cluster, from macOS and Windows, where it is the default; then alone it keeps to the loopback.
_SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
}
_CONFIG = {
    "automatic_object_spilling_enabled": False,
    # Where memory is full the kernel ends a process, as it does those of the other executor.
    "memory_monitor_refresh_ms": 0,
    "enable_metrics_collection": False,
}
_kept: tuple[str, Sequence[Callable[[], Any]]] = ("", ())


@contextmanager
def ray_executor(workers: int | None = None) -> Iterator[Executor]:
    """Starts Ray with so many workers, a core each (None: one for every core), and ends it.

    Raises ``ValueError`` where Ray is not installed, was imported by another part of this process,
    or would listen beyond the loopback.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError("executor ray needs Ray: pip install 'lcguard[ray]'")
    if "ray" in sys.modules and any(os.environ.get(k) != v for k, v in _SETTINGS.items()):
        raise ValueError(
            "executor ray starts a Ray with settings of its own, which Ray reads when it is "
            "imported: this process has imported it already; use another"
        )
    os.environ |= _SETTINGS
    import ray

    # not below TMPDIR, which may be long: the names of sockets are cut at 107 bytes
    folder = tempfile.mkdtemp(prefix="lcguard-ray-", dir="/tmp")
    try:
        ray.init(
            "local",
            num_cpus=workers or os.cpu_count() or 1,
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=f"{folder}/ray",  # which Ray opens to everybody; not what it lies in
            _system_config=_CONFIG,
        )
        nodes: Any = ray.nodes  # Ray's is not typed
        if any(node["NodeManagerAddress"] != _LOOPBACK for node in nodes()):
            raise ValueError("Ray listens beyond the loopback, which shows segments: use local")
        yield _on_ray
    finally:
        node: Any = ray._private.worker._global_node
        if node is not None:  # what would ask for more machines takes a second to end, if asked to
            node.kill_monitor(check_alive=False)
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _on_ray(jobs: Sequence[Callable[[], T]], device: str = "cpu") -> Iterator[tuple[int, T]]:
    """See ``Executor``. Jobs are on the CPU alone; those of a GPU are refused."""
    import ray
    from ray.exceptions import RayTaskError, WorkerCrashedError

    if device != "cpu":
        raise ValueError(f"executor ray is for device cpu, not {device}: use the executor local")
    if not jobs:
        return
    shared = ray.put(list(jobs))
    run = ray.remote(max_retries=RETRIES, num_cpus=1)(_run)
    # in a list: Ray would hand over what a bare reference stands for, anew for each job
    asked = [run.remote([shared], index) for index in range(len(jobs))]
    lost: list[int] = []
    for index, reference in enumerate(asked):
        try:
            found = ray.get(reference)
        except WorkerCrashedError:
            lost.append(index)
            continue
        except RayTaskError as error:
            raise error.cause from None
        yield index, found
    if lost:
        raise BrokenProcessPool(f"{len(lost)} of {len(jobs)} jobs lost their worker {1 + RETRIES}x")


def _run(shared: Sequence[Any], index: int) -> Any:
    """In a worker, which keeps the jobs of one group."""
    import ray

    global _kept
    torch.set_num_threads(1)
    (reference,) = shared
    if _kept[0] != reference.hex():
        _kept = reference.hex(), ray.get(reference)
    return _kept[1][index]()
