"""One handoff through the live engine for each guard that the policy names."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from lcguard.handoff.grants import make_grant, new_handle
from lcguard.handoff.names import ANY
from lcguard.handoff.policy import Edge, Policy
from lcguard.handoff.request import EnginePublish, edge_of
from lcguard.manifest import Manifest, SegmentError
from lcguard.server.authorization.approved_handoff import signed_order
from lcguard.server.engine import MIDDLEWARE
from lcguard.server.errors import ProxyError
from lcguard.server.gateway.upstream import Upstream
from lcguard.store import SegmentStore, StoreError
from lcguard.store.line import StoreLine

_PROBE = "lcguard-probe"
_PROMPT = "The quick brown fox reads a record."


class SelfTest:
    """What has to hold before anyone is served. Raises ``ProxyError`` with what does not."""

    def __init__(
        self,
        upstream: Upstream,
        model: str,
        store: SegmentStore,
        line: StoreLine,
        key: bytes,
        policy: Callable[[], Policy],
    ) -> None:
        self.upstream, self.model, self.key = upstream, model, key
        self.store, self.line = store, line
        self._policy = policy
        self._passed = ""
        self.context: int | None = None
        """Of the model, in tokens."""
        self.digests: dict[str, str] = {}
        """Guard name to the digest of the guard that the engine really ran."""

    async def engine(self) -> str:
        """vLLM answers and serves the model."""
        status, _ = await self.upstream.get("/health", timeout_s=10)
        if status != 200:
            raise ProxyError(502, f"vLLM answers {status} to /health", code="engine")
        status, data = await self.upstream.get("/v1/models", timeout_s=10)
        if status != 200:
            raise ProxyError(502, f"vLLM answers {status} to /v1/models", code="engine")
        try:
            found = {str(m["id"]): m for m in json.loads(data)["data"]}
        except (ValueError, KeyError, TypeError):
            raise ProxyError(
                502, "what answers /v1/models is not vLLM: see upstream.url", code="engine"
            ) from None
        if self.model not in found:
            raise ProxyError(
                502, f"vLLM serves {', '.join(found)}, not {self.model!r}", code="engine"
            )
        length = found[self.model].get("max_model_len")
        self.context = length if isinstance(length, int) and length > 0 else None
        return f"serves {self.model}"

    async def door(self) -> str:
        """Nobody gets past the proxy: vLLM asks for its key on every route, also on those where it
        does not by itself."""
        for method, path in (("GET", "/version"), ("POST", "/invocations"), ("POST", "/tokenize")):
            status = await self.upstream.keyless(method, path)
            if status not in (401, 403, 404):
                raise ProxyError(
                    502,
                    f"vLLM answers {status} to {path} without its key, past policy, limits "
                    f"and audit: start it with VLLM_API_KEY and --middleware {MIDDLEWARE}",
                    code="door",
                )
        return "vLLM asks for its key everywhere"

    def forget(self) -> None:
        """After another engine has started: what was seen was seen of the one before."""
        self._passed = ""

    async def guards(self) -> str:
        """Every guard of the policy guards, and only the audience gets in."""
        policy = self._policy()
        if policy.digest != self._passed:
            found = {}
            for edge in edges_by_guard(policy):
                found[edge.guard] = await self._handoff(policy, edge)
            self.digests, self._passed = found, policy.digest
        return ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(self.digests.items()))

    async def _handoff(self, policy: Policy, edge: Edge) -> str:
        wish = EnginePublish(
            source=edge.source,
            audience=edge.audience,
            handle=new_handle(),
            ttl_s=60.0,
            spans=() if edge.guard == "redact" else None,
            # nobody is handed this prompt, so nothing is looked for
            looked_for=edge.definitions or None,
            told=() if edge.custom and edge.guard != "redact" else None,
        )
        sent = {"publish": wish.model_dump(mode="json", exclude_none=True)}
        handle = str(wish.handle)
        try:
            await self._unsigned(sent)
            await self._complete(sent)
            manifest = await self._manifest(handle)
            wanted = edge_of(policy, wish).digest
            if manifest.policy_digest != wanted:
                raise ProxyError(
                    502,
                    "the engine goes by another policy than the proxy: give both the same file",
                    code="policy",
                )
            await self._complete(self._consume(handle, edge.audience))
            other = f"{edge.audience.partition('/')[0]}/{_PROBE}-{secrets.token_hex(4)}"
            try:
                await self._complete(self._consume(handle, other))
            except ProxyError as error:
                if error.status in (400, 403):
                    return manifest.guard_digest
                raise
            raise ProxyError(502, "the engine let another agent consume", code="engine")
        finally:
            with suppress(StoreError, SegmentError):
                await self.line.run(self.store.delete, handle)

    def _consume(self, handle: str, agent: str) -> dict[str, Any]:
        # with a grant that is right: the manifest alone has to keep another agent out
        grant = make_grant(self.key, handle, agent, int(time.time()) + 60)
        return {"consume": {"agent": agent, "segments": [{"handle": handle, "grant": grant}]}}

    async def _unsigned(self, handoff: dict[str, Any]) -> None:
        """Raises ``ProxyError`` where the engine takes a publish that no proxy has signed."""
        try:
            await self._complete(handoff, signed=False)
        except ProxyError as error:
            if error.status == 403:
                return
            raise
        raise ProxyError(
            502,
            "vLLM takes handoffs that this proxy has not signed, past policy and audit: set "
            "proxy_only in its kv_connector_extra_config",
            code="door",
        )

    async def _complete(self, handoff: dict[str, Any], signed: bool = True) -> None:
        if signed:
            handoff = signed_order(self.key, handoff, time.time())
        body = {
            "model": self.model,
            "prompt": _PROMPT,
            "max_tokens": 1,
            "temperature": 0,
            "kv_transfer_params": {"lcguard": handoff},
        }
        await self.upstream.ask("/v1/completions", body)

    async def _manifest(self, handle: str) -> Manifest:
        try:
            manifest = await self.line.run(self.store.manifest, handle)
            manifest.verify(self.key)
        except (SegmentError, StoreError) as error:
            raise ProxyError(
                502,
                f"the proxy does not see what the engine stores ({error}): give both the same "
                "store and the same LCGUARD_KEY",
                code="store",
            ) from None
        return manifest


def edges_by_guard(policy: Policy) -> Iterator[Edge]:
    """One concrete hop of KV for each guard, and one that no entry matches."""
    seen = set()
    for edge in (*policy.edges, Edge(source=ANY, audience=ANY, forbid=())):
        tenant = _PROBE if edge.tenant == ANY else edge.tenant
        names = [_PROBE if n == ANY else n for n in (edge.source, edge.audience)]
        rule = policy.for_edge(f"{tenant}/{names[0]}", f"{tenant}/{names[1]}")
        if rule.channel == "kv" and rule.guard not in seen:
            seen.add(rule.guard)
            yield rule
