"""``lcguard doctor`` beside a proxy that serves; ``tests/test_doctor.py`` has what can be wrong."""

from __future__ import annotations

import pytest

from lcguard.commands.live_servers import UPSTREAM_KEY, Running, Site
from lcguard.handoff.keys import KEY_VARIABLE
from tests.engine import needs_vllm
from tests.server.proxy import Front
from tests.test_doctor import doctor

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


def test_a_ready_server_and_all_that_it_stands_on(
    site: Site, engine: Running, front: Front
) -> None:
    key = site.environment[KEY_VARIABLE]
    front.auth("intake")
    sets = ("--set", f"upstream.url={engine.url}", "--set", "engine.guards={gate: nano:gate}")
    code, found, out = doctor(
        front.site.folder, *sets, **{KEY_VARIABLE: key, UPSTREAM_KEY: engine.api_key}
    )
    assert found["server"] == ("ok", "running and ready")
    assert found["port"][1].endswith("is the running server's")
    assert found["store"][1].endswith("a write, a read and a delete were done")
    assert found["deployment key"] == ("ok", "in LCGUARD_KEY")
    assert code == 0, found
    assert not [secret for secret in (key, engine.api_key) if secret in out]
