"""Handoffs on an engine of this process, and the same by transformers."""

from __future__ import annotations

from typing import Any

from lcguard.protocols import KVBatch
from lcguard.segment import KVSegment
from tests.engine import KEY, Engine

SECRET = bytes.fromhex(KEY)


def publish(engine: Engine, ids: Any, audience: str, **more: Any) -> Any:
    return engine.llm.publish(agent="intake", prompt=list(ids), audience=audience, **more)


def consume(*handles: Any, agent: str = "", **more: Any) -> dict[str, Any]:
    segments = [{"handle": h.handle, "grant": h.grant} for h in handles]
    return {"consume": {"agent": agent or handles[0].audience, "segments": segments, **more}}


def stored(engine: Engine, handle: Any) -> KVSegment:
    return engine.worker.store.load(handle.handle, SECRET)  # type: ignore[no-any-return]


def hf_segment(engine: Engine, ids: Any) -> KVBatch:
    return engine.agent.source.prefill([tuple(ids)])
