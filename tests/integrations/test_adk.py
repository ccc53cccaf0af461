"""Google ADK, the real package in an environment of its own, before a real proxy."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from lcguard.commands.live_servers import Site
from tests.paths import ROOT, TESTS
from tests.server.proxy import Front

ADK = ROOT / "build" / "adk" / "bin" / "python"
pytestmark = [
    pytest.mark.skipif(not ADK.exists(), reason="google-adk is not there: make adk"),
    pytest.mark.filterwarnings("ignore"),
]
SECRETS = ("Ada Long", "ADA LONG", "912-55-1029", "912551029")
EDGE = {"source": "intake", "forbid": ["person", "government_id"]}
POLICY = {
    "version": 1,
    "edges": [EDGE | {"audience": "billing", "channel": "text"}, EDGE | {"audience": "archive"}],
}


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A proxy whose engine cannot be reached: text needs none."""
    site = Site(tmp_path_factory.mktemp("adk"), POLICY)
    site.key("nobody")
    nowhere = {"url": "http://127.0.0.1:9", "retries": 0}
    with site.proxy(None, ready=False, upstream=nowhere) as running:
        running.wait("/livez")
        with Front(site, running) as found:
            yield found


def ran(front: Front, case: str, audience: str = "billing") -> Any:
    key = front.auth("intake")["Authorization"].removeprefix("Bearer ")
    program = TESTS / "integrations" / "adk_program.py"
    done = subprocess.run(
        [str(ADK), str(program), f"{front.url}/v1", key, case, audience],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_messages_tools_and_the_instruction_are_guarded(front: Front) -> None:
    found = ran(front, "text")
    assert found["ended"] == ""
    (asked,) = found["asked"]
    text = json.dumps(asked)
    assert not any(secret in text for secret in SECRETS)
    assert "back pain" in text
    assert "What is the SSN?" in text
    assert "You know: It is [TEXT-" in asked["system_instruction"]
    assert "lookup" in text
    # one value, one placeholder; the session itself stays raw
    assert asked["system_instruction"].split("It is ")[1].split(".")[0] in json.dumps(
        asked["contents"]
    )
    assert "912-55-1029" in found["session"]


@pytest.mark.parametrize(
    ("case", "audience", "said"),
    [
        ("image", "billing", "the part 'inline_data' of a message cannot be looked through"),
        ("unnamed", "billing", "name the values to hide on"),
        ("text", "archive", "takes KV alone"),
        ("nothing published", "billing", "nothing was published for 'billing'"),
    ],
)
def test_a_run_ends_where_nothing_can_be_handed_over(
    front: Front, case: str, audience: str, said: str
) -> None:
    found = ran(front, case, audience)
    assert said in found["ended"]
    assert found["asked"] == []
