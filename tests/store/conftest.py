"""Fixtures of several files."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lcguard.store.files import FileStore
from tests.store.places import Clock, Place, running_redis


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with running_redis(tmp_path_factory.mktemp("redis")) as (port, _):
        yield port


@pytest.fixture(params=["memory", "files", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    kind, root, client = request.param, tmp_path / "root", None
    url = {"memory": "memory://contract", "files": root.as_uri()}.get(kind, "")
    if kind == "redis":
        port = request.getfixturevalue("redis_port")
        url = f"redis://127.0.0.1:{port}/0"
        client = import_module("redis").Redis(port=port)
        client.flushall()
    place = Place(kind, url, Clock(), root, client)
    yield place
    for store in place.opened or []:
        store.close()
        store.close()
    if client is not None:
        client.close()


@pytest.fixture
def store(place: Place) -> Any:
    return place.open()


@pytest.fixture
def file_store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "root", clock=Clock())
