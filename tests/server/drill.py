"""The deployment of the fault drill, seen from outside."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lcguard.agents.backends.hf import load_backend
from lcguard.categories import CATEGORIES
from lcguard.commands.live_servers import Running, Site
from lcguard.guards import FrozenGuard
from lcguard.segment_folder import MANIFEST_FILE, TENSOR_FILE, read_manifest
from lcguard.server.audit.verify import verify
from tests.server.proxy_client import (
    Answer,
    Client,
    audit_rows,
    until,
)

NOTE = "Employee record. The name is Quella Brandt. Job title: Analyst. SSN: 941-22-7310."
LONG = 3000
"""Tokens of an answer that is still running when the fault comes."""
STORE_BYTES = 2**20
"""512 tokens of the nano agent."""
BODY_TIMEOUT_S = 2.0
WAIT_S = 60.0
START_S = 300.0


def rules(forbid: tuple[str, ...] = CATEGORIES) -> dict[str, Any]:
    return {
        "version": 1,
        "edges": [
            {"source": "*", "audience": "*", "forbid": list(forbid), "guard": "gate"},
        ],
    }


@dataclass
class Drill:
    """The deployment, seen from outside."""

    site: Site
    proxy: Running
    guard: Path
    """The guard's folder, which a test may damage."""
    publisher: Client
    audience: Client
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        self.digest = FrozenGuard.from_pretrained(self.guard).digest

    @property
    def key(self) -> bytes:
        return bytes.fromhex(self.site.environment["LCGUARD_KEY"])

    @property
    def store(self) -> Path:
        return self.site.folder / "segments"

    @property
    def database(self) -> Path:
        return self.site.folder / "lcguard.sqlite"

    @cached_property
    def raw_values(self) -> Tensor:
        """``[H, V, D]``: the first layer's values depend on the token alone, so that raw KV is
        told from guarded whatever the prompt was."""
        source = load_backend("nano").source
        return source.prefill([list(range(source.config.vocab_size))]).values[0, 0]

    def is_raw(self, values: Tensor) -> Tensor:
        """``[T]`` of a segment's ``values [L, H, T, D]``."""
        # nearest other token: 0.9 away
        apart = torch.cdist(
            values[0].float(), self.raw_values, compute_mode="donot_use_mm_for_euclid_dist"
        )
        return (apart.amin(-1) < 0.2).any(0)

    def readyz(self) -> tuple[int, str]:
        status, data = self.proxy.get("/readyz")
        return status, " ".join(json.loads(data)["reasons"]) if data else ""

    def until_ready(self, timeout_s: float = WAIT_S) -> None:
        until(lambda: self.readyz()[0] == 200, timeout_s, f"ready again: {self.readyz()}")

    def until_unready(self, reason: str, timeout_s: float = WAIT_S) -> None:
        def said() -> bool:
            status, reasons = self.readyz()
            return status == 503 and reason in reasons

        until(said, timeout_s, f"503 with {reason!r}: {self.readyz()}")

    def stored(self) -> list[str]:
        """Handles in the store, and whatever is on its way there."""
        found = self.store.iterdir() if self.store.is_dir() else ()
        return [p.name for p in found if not (p / "retired").exists()]

    def check(self) -> None:
        """What holds after every fault."""
        assert verify(self.database, self.key).problems == []
        assert self.publisher.acknowledged
        for handle in self.publisher.acknowledged:
            events = [r["event"] for r in audit_rows(self.database, "handle = ?", handle)]
            assert events[:2] == ["publish", "published"], (handle, events)
        for folder in self.store.iterdir():
            if not (folder / MANIFEST_FILE).exists():  # evicted meanwhile
                continue
            manifest = read_manifest(folder)
            manifest.verify(self.key)
            assert manifest.guard_digest == self.digest
            assert not self.is_raw(load_file(folder / TENSOR_FILE)["values"]).any()

    def works(self) -> None:
        """A handoff from end to end."""
        handle = self.publisher.publish(NOTE).handle
        assert self.audience.consume(handle).status == 200


def refused(answer: Answer, *statuses: int) -> str:
    """The reason. A refusal hands nothing over."""
    assert answer.status in statuses, answer
    assert "x-lcguard-handle" not in answer.headers
    assert "lcguard" not in answer.json
    return answer.reason
