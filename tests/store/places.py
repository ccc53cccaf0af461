"""Stores of every kind, as the tests meet them."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from lcguard.segment import KVSegment
from lcguard.segment_folder import MANIFEST_FILE, TENSOR_FILE
from lcguard.store import SegmentStore, open_store

KEY = bytes(range(32))


A, B, C = ("a" * 16, "b-_9" * 8, "C" * 128)


SHAPE = 2, 2, 5, 8


SEGMENT_BYTES = 2 * 4 * 2 * 2 * 5 * 8
"""Tensor bytes of a float32 segment of this shape."""


FORKS = multiprocessing.get_context("fork")


def config() -> PretrainedConfig:
    return CONFIG_MAPPING["llama"](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
    )


def unsigned(
    handle: str = A,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    created: str = "",
    **fields: Any,
) -> KVSegment:
    """Random bits of ``SHAPE``, NaN payloads and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    size = (*SHAPE[:-1], SHAPE[-1] * dtype.itemsize)
    bits = [torch.randint(256, size, generator=generator).to(torch.uint8) for _ in range(2)]
    segment = KVSegment.create(
        bits[0].view(dtype), bits[1].view(dtype), config(), model_id="m", handle=handle, **fields
    )
    changes = {"created_at": created} if created else {}
    return replace(segment, manifest=segment.manifest.model_copy(update=changes))


def signed(handle: str = A, **options: Any) -> KVSegment:
    return unsigned(handle, **options).sign(KEY)


def same_bits(one: KVSegment, other: KVSegment) -> bool:
    return one.manifest == other.manifest and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in ((one.keys, other.keys), (one.values, other.values))
    )


class Clock:
    """Starts now, because a server and a file system keep their own time."""

    def __init__(self) -> None:
        self.now_s = time.time()

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Place:
    """Where one store lies, and how to get behind its back."""

    kind: str
    url: str
    clock: Clock
    root: Path
    client: Any = None
    opened: list[SegmentStore] | None = None

    def open(self, **options: Any) -> Any:
        store = open_store(self.url, clock=self.clock, **options)
        self.opened = [*(self.opened or []), store]
        return store

    def alter(self, store: Any, handle: str, part: str) -> None:
        """Changes one byte of the keys, of the values or of the manifest."""
        if self.kind == "memory":
            segment = store._shelf.segments[handle]
            if part == "manifest":
                other = replace(segment, manifest=segment.manifest.model_copy(update={"hop": 7}))
                store._shelf.segments[handle] = other
            else:
                getattr(segment, part).view(torch.uint8)[0, 0, 0, 0] ^= 1
        elif self.kind == "files":
            path = self.root / handle / (MANIFEST_FILE if part == "manifest" else TENSOR_FILE)
            data = bytearray(path.read_bytes())
            where = {"keys": -SEGMENT_BYTES, "values": -1}
            data[where.get(part) or data.index(b'"hop":0') + 6] ^= 1
            path.write_bytes(data)
        else:
            ends = {"manifest": ":manifest", "keys": ":k:1", "values": ":v:0"}[part]
            (name,) = self.client.keys(f"lcguard:{{{handle}}}*{ends}")
            data = bytearray(self.client.get(name))
            data[data.index(b'"hop":0') + 6 if part == "manifest" else -1] ^= 1
            self.client.set(name, bytes(data))

    def swap(self, store: Any, source: str, target: str) -> None:
        """Stores what lies under ``source`` under ``target`` as well."""
        if self.kind == "memory":
            store._shelf.segments[target] = store._shelf.segments[source]
        elif self.kind == "files":
            shutil.copytree(self.root / source, self.root / target)
        else:
            for name in self.client.keys(f"lcguard:{{{source}}}*"):
                self.client.copy(name, name.replace(source.encode(), target.encode()))

    def left(self, store: Any) -> list[str]:
        """Whatever lies in the store, visible or not."""
        if self.kind == "memory":
            return sorted(store._shelf.segments)
        if self.kind == "files":
            return sorted(os.listdir(self.root))
        return sorted(name.decode() for name in self.client.keys("*"))


def in_fork(action: Callable[[], None]) -> int:
    """The exit code of ``action`` in a process of its own."""
    process = FORKS.Process(target=action)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@contextmanager
def running_redis(folder: Path, *options: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The port and process of a server of its own, without persistence."""
    pytest.importorskip("redis", reason="the redis package is not installed")
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        pytest.skip("neither valkey-server nor redis-server is on PATH: apt install redis-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    process = subprocess.Popen(
        [*command, "--save", "", "--appendonly", "no", *options], stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=60).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None, f"{program} ended with {process.returncode}"
                time.sleep(0.02)
        yield port, process
    finally:
        process.terminate()
        process.wait(60)


def together(*actions: Callable[[], Any]) -> list[Any]:
    """Results or exceptions of the actions, started at once in a thread each."""
    start, results = threading.Barrier(len(actions)), [None] * len(actions)

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = actions[index]()
        except Exception as error:
            results[index] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
