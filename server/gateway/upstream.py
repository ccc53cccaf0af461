"""Calls to vLLM. aiohttp, because httpx takes several times the CPU for a small request, and the
proxy shares its machine with the engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from lcguard.server.errors import ProxyError
from lcguard.server.settings import UpstreamSettings

# Errors of a connection that vLLM refused or dropped before it answered.
_UNREACHED = (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)


class Upstream:
    """One vLLM server."""

    def __init__(self, settings: UpstreamSettings, url: str, api_key: str) -> None:
        self.settings, self.url = settings, url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Opens the connection pool, in the running event loop."""
        s = self.settings
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(
                total=s.total_timeout_s,
                sock_connect=s.connect_timeout_s,
                sock_read=s.read_timeout_s,
            ),
            auto_decompress=False,
            # a proxy named in the environment would see every prompt
            trust_env=False,
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        """vLLM's answer as soon as its head is there. To be closed by the caller, which makes vLLM
        drop the request where it still runs.

        Tries again only where nothing was answered at all.

        Raises:
            ProxyError: 502 where vLLM cannot be reached, 504 where it is silent for too long.
        """
        return await self._send("POST", path, body, headers)

    async def get(self, path: str, timeout_s: float | None = None) -> tuple[int, bytes]:
        """Status and whole body. Raises ``ProxyError`` as ``post``."""
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._send("GET", path, None, {})
                async with answer:
                    return answer.status, await answer.read()
        except TimeoutError:
            raise _silent(path, timeout_s or self.settings.read_timeout_s) from None
        except aiohttp.ClientError as error:
            raise broken(error) from None

    async def keyless(self, method: str, path: str) -> int:
        """Status of what anybody gets who reaches vLLM without its key. Raises ``ProxyError``."""
        own = {"Content-Type": "application/json"}
        body = b"{}" if method == "POST" else None
        try:
            async with asyncio.timeout(10), await self._send(method, path, body, {}, own) as answer:
                return answer.status
        except TimeoutError:
            raise _silent(path, 10) from None

    async def time_s(self) -> float | None:
        """Unix time by vLLM's clock, to a second; None where its answers have no date.

        Raises ``ProxyError`` as ``post``.
        """
        answer = await self._send("GET", "/health", None, {})
        async with answer:
            try:
                return parsedate_to_datetime(answer.headers["date"]).timestamp()
            except (KeyError, ValueError):
                return None

    async def ask(self, path: str, body: Any) -> Any:
        """The JSON answer to a JSON question. Raises ``ProxyError``, also for another status."""
        answer = await self.post(path, json.dumps(body).encode(), {})
        async with answer:
            try:
                data = await answer.read()
            except (TimeoutError, aiohttp.ClientError) as error:
                raise broken(error) from None
            if answer.status != 200:
                raise ProxyError(
                    502 if answer.status >= 500 else answer.status,
                    f"vLLM answered {answer.status} to {path}",
                    detail=reason_of(data),
                    code="upstream",
                )
            try:
                return json.loads(data)
            except ValueError:
                raise ProxyError(
                    502,
                    f"vLLM's answer to {path} is no JSON: is upstream.url vLLM's?",
                    code="upstream",
                ) from None

    async def _send(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        own: Mapping[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        if self._session is None:
            raise ProxyError(503, "the proxy is starting", code="starting", retry_after_s=1)
        for left in range(self.settings.retries, -1, -1):
            try:
                return await self._session.request(
                    method,
                    self.url + path,
                    data=body,
                    headers={**headers, **(self._headers if own is None else own)},
                    allow_redirects=False,
                )
            except aiohttp.ConnectionTimeoutError:
                raise ProxyError(
                    504,
                    f"vLLM took no connection within {self.settings.connect_timeout_s:g} s",
                    code="upstream_timeout",
                ) from None
            except aiohttp.ServerTimeoutError:
                raise _silent(path, self.settings.read_timeout_s) from None
            except _UNREACHED as error:
                if not left:
                    raise broken(error) from None
                await asyncio.sleep(0.05)
            except TimeoutError:
                raise _silent(path, self.settings.total_timeout_s) from None
            except aiohttp.ClientError as error:
                raise broken(error) from None
        raise AssertionError("unreachable")


def broken(error: BaseException) -> ProxyError:
    """The answer for a connection to vLLM that ended too early, or was silent for too long."""
    if isinstance(error, TimeoutError):
        return ProxyError(504, "vLLM was silent for too long", code="upstream_timeout")
    return ProxyError(
        502,
        f"vLLM cannot be reached or broke off: {type(error).__name__}",
        code="upstream_unreachable",
        retry_after_s=2,
    )


def _silent(path: str, seconds: float) -> ProxyError:
    return ProxyError(
        504, f"vLLM did not answer {path} within {seconds:g} s", code="upstream_timeout"
    )


def reason_of(data: bytes) -> str:
    """vLLM's own words, cut short; it has none where its own code failed."""
    try:
        found = json.loads(data)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        found = data.decode(errors="replace")
    return " ".join(str(found).split())[:300] or "no reason, see its log"
