"""Plants records through the running proxy and takes the guarded segments out of the store."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

import torch

from lcguard.agents.scenarios.encode import Encoder
from lcguard.protocols import KVBatch
from lcguard.records import TokenRecord
from lcguard.rule import Rule
from lcguard.store import SegmentStore

_SIDE_BY_SIDE = 2
"""Requests at a time: canaries must not crowd out the agents."""
_TRIES, _WAIT_S, _TIMEOUT_S = 4, 5.0, 120.0
_CHANNELS = 8192
"""Numbers kept of a token: a large model's whole KV would fill the memory."""


class PlantError(RuntimeError):
    """A record that could not be planted, or a segment that is not what was ordered. One line."""


@dataclass(frozen=True)
class AppliedGuard:
    """Under what a segment was published. What is equal guards alike."""

    guard: str
    guard_digest: str
    rule: Rule


@dataclass(frozen=True)
class Plant:
    """A record on the far side of the guard."""

    kv: KVBatch
    """``[1, L', H, T, D]`` in float32, of the kept layers."""
    applied: AppliedGuard
    policy_digest: str


class Planter:
    """Publishes on behalf of any agent, with the canary's key."""

    def __init__(
        self,
        base_url: str,
        token: str,
        model: str,
        encoder: Encoder,
        store: SegmentStore,
        key: bytes,
    ) -> None:
        """Raises ``ValueError`` for an address that is none, or a store that nobody shares."""
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url={base_url!r}: write http://host:port of the proxy")
        if not store.shared:
            raise ValueError("the store is within one process: canaries need file:// or redis://")
        self._parts, self._token, self._model = parts, token, model
        self._encoder, self._store, self._key = encoder, store, key
        self._local = threading.local()

    def plant(self, edge: dict[str, str], records: Sequence[TokenRecord]) -> list[Plant]:
        """One segment a record. Raises ``PlantError``, ``SegmentError`` and ``StoreError``."""
        with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
            jobs = [pool.submit(self._one, edge, record) for record in records]
            try:
                return [job.result() for job in jobs]
            finally:
                for job in jobs:
                    job.cancel()

    def _one(self, edge: dict[str, str], record: TokenRecord) -> Plant:
        made = self._publish(edge, record)
        try:
            segment = self._store.load(str(made["handle"]), self._key)
        finally:
            self._store.delete(str(made["handle"]))
        m = segment.manifest
        if m.n_tokens != len(record.ids):
            raise PlantError(f"the segment has {m.n_tokens} tokens, {len(record.ids)} were planted")
        kept = _layers(m.n_layers, 2 * m.n_kv_heads * m.head_dim)
        keys, values = (t[kept].float()[None] for t in (segment.keys, segment.values))
        valid = torch.ones(1, m.n_tokens, dtype=torch.bool)
        return Plant(
            KVBatch(keys, values, valid),
            AppliedGuard(
                str(made["guard"]),
                m.guard_digest,
                Rule(tuple(made["forbid"]), tuple(made["derive"])),
            ),
            m.policy_digest,
        )

    def _publish(self, edge: dict[str, str], record: TokenRecord) -> dict[str, Any]:
        """The field ``lcguard.published`` of the answer."""
        spans = [s.positions for s in record.secrets()]
        secrets = {str(self._encoder.tokenizer.decode(list(record.ids[a:b]))) for a, b in spans}
        answer = self._ask(
            {
                "model": self._model,
                "prompt": list(record.ids),
                "max_tokens": 1,
                "temperature": 0,
                "lcguard": {"publish": {**edge, "secrets": sorted(secrets)}},
            }
        )
        try:
            made = answer["lcguard"]["published"]
            return {k: made[k] for k in ("handle", "guard", "forbid", "derive")}
        except (KeyError, TypeError):
            raise PlantError("the proxy's answer names no published segment") from None

    def _ask(self, body: dict[str, Any]) -> Any:
        """The answer to a completion; waits out what the proxy says will pass."""
        path = self._parts.path.rstrip("/") + "/v1/completions"
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        for left in reversed(range(_TRIES)):
            connection = self._connection()
            try:
                connection.request("POST", path, json.dumps(body), headers)
                response = connection.getresponse()
                data, wait = response.read(), response.headers.get("retry-after", "")
                if response.status == 200:
                    return json.loads(data)
            except (OSError, HTTPException, ValueError) as error:
                connection.close()
                # sent twice it would be planted twice, and one segment be left in the store
                raise PlantError(f"the proxy does not answer: {_said(error)}") from None
            if left == 0 or response.status not in (429, 503):
                raise PlantError(f"the proxy answered {response.status}: {_reason(data)}")
            time.sleep(min(float(wait) if wait.isdigit() else 1.0, _WAIT_S))
        raise AssertionError("unreachable")

    def _connection(self) -> HTTPConnection:
        """This thread's own. No redirect is followed and no other proxy used: the token is ours."""
        if not hasattr(self._local, "connection"):
            kind = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
            host = str(self._parts.hostname)
            self._local.connection = kind(host, self._parts.port, timeout=_TIMEOUT_S)
        found = self._local.connection
        assert isinstance(found, HTTPConnection)
        return found


def _layers(n_layers: int, channels: int) -> list[int]:
    """All layers, or as many as may be kept, from first to last in equal steps."""
    most = max(1, _CHANNELS // channels)
    if most >= n_layers:
        return list(range(n_layers))
    return sorted({round(i * (n_layers - 1) / max(1, most - 1)) for i in range(most)})


def _reason(data: bytes) -> str:
    """The message of an error in OpenAI's shape."""
    try:
        return " ".join(str(json.loads(data)["error"]["message"]).split())[:200]
    except (ValueError, KeyError, TypeError):
        return "no reason given"


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:200]
