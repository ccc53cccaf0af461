"""Our code against two versions of vLLM: the installed one, itself and as it was recorded, and the
next one, whose wheels need a GPU, as it was recorded."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute

from lcguard.agents.nano.load import model_path
from lcguard.handoff.keys import new_key
from lcguard.server.engine import EnginePlan
from lcguard.server.gateway.contract_answer import clean, clean_response
from lcguard.server.gateway.contract_fields import (
    ANSWER,
    CHOICE,
    ENDPOINTS,
    FIELDS,
    RESPONSE,
    RESPONSE_USAGE,
    USAGE,
)
from lcguard.server.settings import EngineSettings
from lcguard.vllm import READ_VERSIONS, TESTED_VERSIONS
from lcguard.vllm.authentication import KEY_VARIABLE, OPEN, AuthenticationMiddleware
from lcguard.vllm.checks import check_config, check_installed, check_version
from lcguard.vllm.errors import StartError
from lcguard.vllm.interface import BASES, JUDGED, LATER, OWN, Interface, faults, installed
from lcguard.vllm.llm import GuardedLLM
from lcguard.vllm.options import SAMPLING
from lcguard.vllm.settings import read_settings
from scripts.record_vllm import main, recorded
from scripts.vllm_source import Source, imports_of
from tests.engine import needs_vllm
from tests.paths import ROOT
from tests.vllm.records import RECORDS, fields_of, record_of

both = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["version"])
OURS = ROOT / "lcguard" / "vllm"


def interface(record: dict[str, Any], **changes: Any) -> Interface:
    names = ("connector", "wrapped", "attributes")
    return Interface(**{name: changes.get(name, record[name]) for name in names})


# -- the record, and what is installed


@needs_vllm
@pytest.mark.vllm
def test_the_record_is_of_the_vllm_that_is_installed() -> None:
    (place,) = importlib.util.find_spec("vllm").submodule_search_locations  # type: ignore[union-attr,misc]
    import vllm

    version = vllm.__version__.split("+")[0]
    assert version in TESTED_VERSIONS
    assert recorded(Source(Path(place).parent), version) == record_of(version)
    assert main([str(Path(place).parent), "--version", version, "--check"]) == 0
    # what is read from source is what Python finds
    found, told = installed(), record_of(version)
    assert {name: [*p] for name, p in found.connector.items()} == told["connector"]
    assert {name: [*p] for name, p in found.wrapped.items() if p} == told["wrapped"]
    check_installed()


@needs_vllm
@pytest.mark.vllm
def test_the_connector_has_the_methods_that_it_says() -> None:
    from lcguard.vllm.connector import LCGuardConnector

    own = {name for name in vars(LCGuardConnector) if not name.startswith("_")}
    assert own == {*OWN, *LATER}
    for name, wanted in (OWN | LATER).items():
        value = getattr(LCGuardConnector, name)
        if callable(value):
            given = [p for p in inspect.signature(value).parameters if p not in ("self", "kwargs")]
            assert (*given,) == wanted, name
    assert not LCGuardConnector.supports_sleep_mode(None)


@both
def test_nothing_that_is_touched_is_another(record: dict[str, Any]) -> None:
    assert faults(interface(record)) == []
    assert set(record["imports"]) == set(imports_of(OURS))


@both
@pytest.mark.parametrize("name", sorted(OWN))
def test_a_method_that_changed_keeps_the_engine_from_starting(
    record: dict[str, Any], name: str
) -> None:
    methods = record["connector"]
    gone = {k: v for k, v in methods.items() if k != name}
    assert faults(interface(record, connector=gone)) == [f"connectors have no method {name}"]
    more = methods | {name: [*methods[name], "more"]}
    (fault,) = faults(interface(record, connector=more))
    assert fault.startswith(f"connectors' {name} is given ")


def test_a_hook_that_nobody_knows_keeps_the_engine_from_starting() -> None:
    for record in RECORDS:
        hooks = record["connector"] | {"export_kv": ["request"]}
        assert faults(interface(record, connector=hooks)) == [
            "connectors have a new method export_kv"
        ]
        for name in record["wrapped"]:
            wrapped = record["wrapped"] | {name: ["other"]}
            (fault,) = faults(interface(record, wrapped=wrapped))
            assert "does not take" in fault
        for name, known in record["attributes"].items():
            less = record["attributes"] | {name: known[1:]}
            (fault,) = faults(interface(record, attributes=less))
            assert fault.endswith(f" has no {known[0]}")
    assert not JUDGED & {*OWN, *LATER}


# -- which versions start


def test_a_version_that_was_not_run_is_refused_unless_it_is_named() -> None:
    for version in TESTED_VERSIONS:
        check_version(version)
        check_version(f"{version}+cpu", "0.33.0")
    for version in (*READ_VERSIONS, "0.31.0", "0.40.1"):
        with pytest.raises(StartError, match=rf"untested_vllm to {version}") as caught:
            check_version(version)
        assert "\n" not in str(caught.value)
        assert ("was read, not run" in str(caught.value)) is (version in READ_VERSIONS)
        check_version(f"{version}+cu129", version)
        with pytest.raises(StartError, match=r"it names 0\.99\.0"):
            check_version(version, "0.99.0")
    for wrong in ("yes", "0.33.0 or later", "*"):
        with pytest.raises(StartError, match="untested_vllm"):
            read_settings({"store": "memory://", "untested_vllm": wrong})


def test_the_server_s_option_reaches_its_engine(tmp_path: Path) -> None:
    for version in ("", "0.33.0"):
        found = EngineSettings(untested_vllm=version)
        plan = EnginePlan(found, "m", "m", "", "memory://x", None, tmp_path / "log")
        words = plan.command(1)
        transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
        settings = read_settings(transfer["kv_connector_extra_config"])
        assert settings.untested_vllm == version


@needs_vllm
@pytest.mark.vllm
def test_it_is_said_before_an_engine_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(**options: Any) -> Any:
        raise RuntimeError("vLLM was started")

    package = tmp_path / "vllm-0.33.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LCGUARD_KEY", new_key())
    monkeypatch.setattr(GuardedLLM, "_start", staticmethod(started))
    with pytest.raises(StartError, match=r"^vLLM 0\.33\.0 was not tested .*[^\n]+$"):
        GuardedLLM.build(str(model_path()))
    with pytest.raises(RuntimeError, match="was started"):
        GuardedLLM.build(str(model_path()), settings={"untested_vllm": "0.33.0"})


@needs_vllm
@pytest.mark.vllm
def test_a_named_version_still_has_to_be_as_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    with pytest.raises(StartError, match=r"set untested_vllm to 0\.34\.0"):
        check_installed()
    check_installed("0.34.0")

    def export_kv(self: Any, request: Any) -> None:
        """A way out that this release has never heard of."""

    monkeypatch.setattr(KVConnectorBase_V1, "export_kv", export_kv, raising=False)
    with pytest.raises(StartError, match="a new method export_kv") as caught:
        check_installed("0.34.0")
    assert "\n" not in str(caught.value)


def test_sleep_mode_is_refused_by_every_version() -> None:
    """By vLLM 0.33 itself, which asks the connector; 0.32 does not ask."""
    from tests.vllm.test_vllm_start import config

    model = config().model_config
    model.enable_sleep_mode = True
    with pytest.raises(StartError, match="enable_sleep_mode"):
        check_config(config(model_config=model))
    assert "supports_sleep_mode" in record_of("0.33.0")["connector"]
    assert "supports_sleep_mode" not in record_of("0.32.0")["connector"]


# -- the proxy's contract


@both
def test_every_field_is_judged(record: dict[str, Any]) -> None:
    for endpoint in ENDPOINTS:
        assert fields_of(record, endpoint) <= {*FIELDS[endpoint]}
    assert fields_of(record, "answer") <= {*ANSWER}
    assert fields_of(record, "choice") <= {*CHOICE}
    assert fields_of(record, "usage") == {*USAGE}
    assert fields_of(record, "response") <= {*RESPONSE}
    assert fields_of(record, "response_usage") == {*RESPONSE_USAGE}
    structs = record["structs"]
    assert set(structs["vllm.sampling_params:SamplingParams"]) == {*SAMPLING}
    # where handoffs travel: beam search leaves them behind, and is refused for it
    assert "extra_args" not in structs["vllm.sampling_params:BeamSearchParams"]


def test_the_next_version_s_fields() -> None:
    for endpoint in ("chat", "completions"):
        assert FIELDS[endpoint]["return_weight_versions"].kind == "opaque"  # type: ignore[index]
    # of the answer's own tokens, which its reader has
    assert CHOICE["weight_versions"] == "passed"
    chunk: dict[str, Any] = {
        "choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "weight_versions": [1]}],
        "kv_transfer_params": {"lcguard": {"handle": "h", "grant": "g"}},
    }
    for consuming in (True, False):
        passed = clean(chunk, consuming)
        assert "kv_transfer_params" not in passed
        assert passed["choices"] == chunk["choices"]
        echo = {"id": "r", "prompt_cache_key": "k", "safety_identifier": "s"}
        assert clean_response(echo, consuming) == {"id": "r"}


# -- routes


@both
def test_every_route_of_vllm_s_server_asks_for_the_key(
    record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answered(request: Any) -> PlainTextResponse:
        return PlainTextResponse("served")

    async def accepted(socket: Any) -> None:
        await socket.accept()

    routes: list[BaseRoute] = []
    for line in record["routes"]:
        method, path = line.split(" ", 1)
        if method == "WEBSOCKET":
            routes.append(WebSocketRoute(path, accepted))
        else:
            routes.append(Route(path, answered, methods=[method]))
    monkeypatch.setenv(KEY_VARIABLE, "the proxy's")
    app = AuthenticationMiddleware(Starlette(routes=routes))

    async def statuses() -> dict[str, int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return {
                line: (await client.request(*line.split(" ", 1))).status_code
                for line in record["routes"]
                if not line.startswith("WEBSOCKET")
            }

    found = asyncio.run(statuses())
    assert len(found) > 50
    assert {line for line, status in found.items() if status != 401} == {f"GET {OPEN}"}


def test_the_next_version_s_route_is_known() -> None:
    new = {*record_of("0.33.0")["routes"]} - {*record_of("0.32.0")["routes"]}
    assert new == {"POST /v1/decisions"}


def test_the_bases_are_what_the_connector_inherits_from() -> None:
    tree = ast.parse((OURS / "connector.py").read_text(encoding="utf-8"))
    (cls,) = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))
    assert [ast.unparse(base) for base in cls.bases] == [b.partition(":")[2] for b in BASES]
