"""One vLLM on the nano agent and ``lcguard serve`` before it, for all tests of the proxy.

A pytest plugin (``pytest_plugins = ("tests.server.proxy_fixtures",)``): the files that name it
share the processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lcguard.agents.backends.hf import load_backend
from lcguard.categories import CATEGORIES
from lcguard.commands.live_servers import Running, Site
from lcguard.guards import FrozenGuard, KVShape
from lcguard.guards.twin import TwinGuard
from tests.server.option_cases import FOREVER, with_key
from tests.server.proxy import ENGINE_ARGS, POLICY, Front, close_edges, front_of


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Policy, store and deployment key that engine and proxies share."""
    return Site(tmp_path_factory.mktemp("site"), POLICY)


def blind_twin(folder: Path) -> str:
    """A guard whose detector finds nothing: no training."""
    agent = load_backend("nano")
    module = TwinGuard.build(KVShape(*agent.source.shape), len(CATEGORIES), {})
    card = FrozenGuard(module).with_card(model_digest=agent.digest, model_id="nano")
    card.save_pretrained(folder / "blind")
    return str(folder / "blind")


@pytest.fixture(scope="session")
def engine(site: Site) -> Iterator[Running]:
    guards = {"gate": "nano:gate", "residual": "nano:residual", "twin": blind_twin(site.folder)}
    with site.engine(guards, ENGINE_ARGS) as running:
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
    close_edges(folder, "shut", "shut-redacted")
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
