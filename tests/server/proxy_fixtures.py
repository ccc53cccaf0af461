"""One vLLM on the nano agent and ``lcguard serve`` before it, for all tests of the proxy.

A pytest plugin (``pytest_plugins = ("tests.server.proxy_fixtures",)``): the files that name it
share the processes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lcguard.commands.live_servers import Running, Site
from lcguard.server.leakage.edge_state import save_state
from lcguard.server.leakage.meter import EdgeLeakage
from tests.server.option_cases import FOREVER, with_key
from tests.server.proxy import ENGINE_ARGS, POLICY, Front, front_of


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Policy, store and deployment key that engine and proxies share."""
    return Site(tmp_path_factory.mktemp("site"), POLICY)


@pytest.fixture(scope="session")
def engine(site: Site) -> Iterator[Running]:
    with site.engine({"gate": "nano:gate", "residual": "nano:residual"}, ENGINE_ARGS) as running:
        yield running


@pytest.fixture(scope="session")
def front(site: Site, engine: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """The proxy that most tests ask, with nothing but defaults."""
    with front_of(site, engine, tmp_path_factory.mktemp("front")) as found:
        yield found


# --- server.yaml ---


@pytest.fixture(scope="session")
def tight(site: Site, engine: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A proxy with narrow limits and files of its own, and two edges that canaries closed."""
    folder = tmp_path_factory.mktemp("tight")
    shut = [
        EdgeLeakage(
            *("default", "intake", name),
            since_s=1.0,
            state="closed",
            reason="a test",
            asr=0.9,
            asr_low=0.8,
            asr_high=0.95,
        )
        for name in ("shut", "shut-redacted")
    ]
    save_state(folder / "leakage.json", {e.name: e for e in shut})
    (folder / "book").mkdir()
    with front_of(
        with_key(site, "OTHER_KEY", engine.api_key),
        None,
        folder,
        host="0.0.0.0",
        keys="people/keys.yaml",
        database="book/audit.sqlite",
        metrics_auth=False,
        database_timeout_s=0.2,
        canaries={"enabled": False, "threshold": 0.35},
        upstream={"url": engine.url, "api_key_env": "OTHER_KEY"},
        limits={
            "max_body_bytes": 20000,
            "max_output_tokens": FOREVER,
            "body_timeout_s": 4,
        },
    ) as found:
        yield found
