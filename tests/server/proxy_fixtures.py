"""One vLLM on the nano agent and ``lcguard serve`` before it, for all tests of the proxy.

A pytest plugin (``pytest_plugins = ("tests.server.proxy_fixtures",)``): the files that name it
share the processes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lcguard.commands.live_servers import Running, Site
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
