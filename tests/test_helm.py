"""deploy/helm/lcguard, linted and rendered by Helm itself: its command, or its library."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcguard.commands.serve import check_exposure, load_settings
from lcguard.handoff.policy_reader import is_whole
from lcguard.server.access.keyring import load_keys
from lcguard.vllm.settings import policy_of, read_settings
from tests.paths import ROOT
from tests.server.test_proxy_commands import ok

CHART = ROOT / "deploy" / "helm" / "lcguard"
HELM = shutil.which("helm")
LIBRARY = importlib.util.find_spec("helm_python") is not None
pytestmark = pytest.mark.skipif(
    not HELM and not LIBRARY,
    reason="neither helm nor its library is installed here: pip install helm-python-sdk",
)
DIGEST = "sha256:" + "0123456789abcdef" * 4
DEPLOYMENT, UPSTREAM = "ab" * 32, "up-" + "5k" * 16
POLICY = {
    "version": 1,
    "edges": [{"source": "a", "audience": "b", "forbid": ["person"], "guard": "gate"}],
}
PARTS = ("proxy", "engine", "store")
Objects = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The least that has to be given, and a policy with a guard."""
    state = tmp_path_factory.mktemp("state")
    ok(state, "keys", "new", "intake", "billing")
    return {
        "images": {part: {"digest": DIGEST} for part in PARTS},
        "secret": {
            "deploymentKey": DEPLOYMENT,
            "upstreamKey": UPSTREAM,
            "keys": (state / "keys.yaml").read_text(),
        },
        "model": {"claim": "weights", "guards": {"gate": "gate"}},
        "policy": POLICY,
    }


class ChartError(Exception):
    """What Helm refuses."""


def render(folder: Path, values: dict[str, Any]) -> Objects:
    """By kind and name. Raises ``ChartError``."""
    if HELM:
        path = folder / "values.yaml"
        path.write_text(json.dumps(values))
        command = [HELM, "template", "site", str(CHART), "--namespace", "ns", "--values", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ChartError(done.stderr)
        texts = [done.stdout]
    else:
        import helm_python

        try:
            with helm_python.Chart.load(CHART) as chart:
                chart.validate_schema(values)
                found = chart.render(values, name="site", namespace="ns")
        except helm_python.HelmError as error:
            raise ChartError(str(error)) from None
        texts = [text for name, text in found.items() if name.endswith(".yaml")]
    documents = [one for text in texts for one in yaml.safe_load_all(text) if one]
    out = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    assert len(out) == len(documents)
    return out


def lint(folder: Path, values: dict[str, Any]) -> list[str]:
    """Helm's complaints, warnings included."""
    if HELM:
        path = folder / "values.yaml"
        path.write_text(json.dumps(values))
        command = [HELM, "lint", str(CHART), "--strict", "--values", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        return [done.stdout + done.stderr] if done.returncode else []
    import helm_python

    report = helm_python.lint(CHART, values, strict=True)
    return [m["error"] for m in report["messages"] if m["severity"] > 1] + report["errors"]


@pytest.fixture(scope="module")
def objects(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Objects:
    return render(tmp_path_factory.mktemp("render"), values)


def pods(objects: Objects) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Part, the pod's specification and its only container."""
    for part in PARTS:
        spec = objects["Deployment", f"site-lcguard-{part}"]["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        yield part, spec, container


def changed(values: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**values, **{k: {**values.get(k, {}), **v} for k, v in more.items()}}


def test_helm_has_no_complaint(values: dict[str, Any], tmp_path: Path) -> None:
    assert lint(tmp_path, values) == []


def test_no_pod_is_root_or_writes_to_its_image(objects: Objects) -> None:
    for part, spec, container in pods(objects):
        pod, own = spec["securityContext"], container["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] > 0
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert spec["automountServiceAccountToken"] is False
        assert container["image"].endswith(f"@{DIGEST}")
        assert container["resources"]["limits"], part
        assert {"livenessProbe", "readinessProbe"} <= set(container)
        assert {m["name"] for m in container["volumeMounts"]} == {
            v["name"] for v in spec["volumes"]
        }


def test_the_proxy_takes_its_configuration(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = objects["ConfigMap", "site-lcguard"]["data"]
    (tmp_path / "server.yaml").write_text(data["server.yaml"])
    (tmp_path / "policy.yaml").write_text(data["policy.yaml"])
    settings = load_settings(tmp_path / "state", tmp_path / "server.yaml", [], None)
    assert (settings.host, settings.port) == ("0.0.0.0", 8080)
    assert settings.upstream.url == "http://site-lcguard-engine:8000"
    assert settings.store == "redis://site-lcguard-store:6379/0"
    assert settings.canaries.interval_s == 3600
    assert settings.engine.guards == {"gate": "/models/gate"}
    monkeypatch.setenv("LCGUARD_UPSTREAM_KEY", UPSTREAM)
    check_exposure(settings)
    assert is_whole(tmp_path / "policy.yaml")
    _, _, container = next(pods(objects))
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    for path in (settings.policy, settings.keys, Path(settings.engine.model)):
        assert mounts[str(path.parent)]["readOnly"] is True
    words = container["args"]
    assert words[:2] == ["serve", "--dir"]
    assert str(Path(words[2]).parent) in mounts  # a folder that the proxy makes in the volume
    assert words[3:] == ["--config", "/config/server.yaml"]
    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}


def test_the_engine_goes_by_the_same_store_policy_and_keys(
    objects: Objects, tmp_path: Path
) -> None:
    server = yaml.safe_load(objects["ConfigMap", "site-lcguard"]["data"]["server.yaml"])
    found = {part: container for part, _, container in pods(objects)}
    words = found["engine"]["args"]
    transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector"] == "LCGuardConnector"
    settings = read_settings(transfer["kv_connector_extra_config"])
    assert settings.proxy_only
    assert settings.store == server["store"]
    assert settings.policy == server["policy"]
    assert settings.guards == server["engine"]["guards"]
    assert f"--model={server['engine']['model']}" in words
    assert f"--served-model-name={server['engine']['served_model_name']}" in words
    assert "--middleware=lcguard.vllm.authentication.AuthenticationMiddleware" in words
    policy = tmp_path / "policy.yaml"
    policy.write_text(objects["ConfigMap", "site-lcguard"]["data"]["policy.yaml"])
    policy_of(settings.model_copy(update={"policy": str(policy)}), ["redact"])
    keys = {
        part: {e["name"]: e["valueFrom"]["secretKeyRef"] for e in c["env"] if "valueFrom" in e}
        for part, c in found.items()
        if part != "store"
    }
    assert keys["proxy"]["LCGUARD_KEY"] == keys["engine"]["LCGUARD_KEY"]
    assert keys["proxy"]["LCGUARD_UPSTREAM_KEY"] == keys["engine"]["VLLM_API_KEY"]


def test_secrets_are_in_the_secret_alone(
    objects: Objects, values: dict[str, Any], tmp_path: Path
) -> None:
    rest = json.dumps([o for key, o in objects.items() if key[0] != "Secret"])
    for secret in (DEPLOYMENT, UPSTREAM, "sha256: ", "tenant"):
        assert secret not in rest
    data = objects["Secret", "site-lcguard"]["stringData"]
    assert (data["deployment-key"], data["upstream-key"]) == (DEPLOYMENT, UPSTREAM)
    (tmp_path / "keys.yaml").write_text(data["keys.yaml"])
    assert {k.agent for k in load_keys(tmp_path / "keys.yaml").keys} == {"intake", "billing"}
    named = render(tmp_path, {**values, "secret": {"existing": "ours"}})
    assert not [key for key in named if key[0] == "Secret"]
    for part, spec, container in pods(named):
        if part != "store":
            refs = [
                e["valueFrom"]["secretKeyRef"]["name"] for e in container["env"] if "valueFrom" in e
            ]
            assert refs == ["ours", "ours"]
            mounted = [v["secret"]["secretName"] for v in spec["volumes"] if "secret" in v]
            assert mounted == (["ours"] if part == "proxy" else [])


def selects(selector: dict[str, Any], objects: Objects) -> set[str]:
    """The parts whose pods have these labels."""
    wanted = selector.get("matchLabels", {}).items()
    return {
        part
        for part in PARTS
        if wanted
        <= objects["Deployment", f"site-lcguard-{part}"]["spec"]["template"]["metadata"][
            "labels"
        ].items()
    }


def test_the_proxy_alone_reaches_the_engine(objects: Objects) -> None:
    into: dict[str, set[str]] = {}
    for part in PARTS:
        spec = objects["NetworkPolicy", f"site-lcguard-{part}"]["spec"]
        assert selects(spec["podSelector"], objects) == {part}
        assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
        peers = [p for rule in spec["ingress"] for p in rule["from"]]
        assert all(set(peer) == {"podSelector"} for peer in peers)  # of this namespace alone
        into[part] = {q for peer in peers for q in selects(peer["podSelector"], objects)}
        port = {"proxy": 8080, "engine": 8000, "store": 6379}[part]
        assert [p["port"] for rule in spec["ingress"] for p in rule["ports"]] == [port]
    assert into["engine"] == {"proxy"}
    assert into["store"] == {"proxy", "engine"}
    out = {
        part: {
            q
            for rule in objects["NetworkPolicy", f"site-lcguard-{part}"]["spec"]["egress"]
            for peer in rule["to"]
            if "podSelector" in peer
            for q in selects(peer["podSelector"], objects)
        }
        for part in PARTS
    }
    assert out == {"proxy": {"engine", "store"}, "engine": {"store"}, "store": set()}


def test_services_lead_to_their_pods(objects: Objects) -> None:
    for name, part in (("site-lcguard", "proxy"), *((f"site-lcguard-{p}", p) for p in PARTS[1:])):
        spec = objects["Service", name]["spec"]
        assert selects({"matchLabels": spec["selector"]}, objects) == {part}
        container = next(c for p, _, c in pods(objects) if p == part)
        assert spec["ports"][0]["targetPort"] in {p["name"] for p in container["ports"]}


def test_a_store_of_ones_own(values: dict[str, Any], tmp_path: Path) -> None:
    rule = {"to": [{"ipBlock": {"cidr": "10.0.0.7/32"}}], "ports": [{"port": 6380}]}
    own = {"enabled": False, "url": "rediss://cache:6380/0", "allowTo": [rule]}
    waits = {"upstream": {"read_timeout_s": 7}}
    found = render(tmp_path, {**values, "store": own, "config": waits})
    assert not [name for _, name in found if name.endswith("-store")]
    assert rule in found["NetworkPolicy", "site-lcguard-engine"]["spec"]["egress"]
    text = found["ConfigMap", "site-lcguard"]["data"]["server.yaml"]
    assert yaml.safe_load(text)["store"] == "rediss://cache:6380/0"
    told = {"url": "http://site-lcguard-engine:8000", "read_timeout_s": 7}
    assert yaml.safe_load(text)["upstream"] == told


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"images": {"proxy": {"digest": ""}}}, "images.proxy.digest"),
        ({"images": {"proxy": {"digest": "latest"}}}, "digest"),
        ({"secret": {"deploymentKey": ""}}, "secret.deploymentKey"),
        ({"secret": {"deploymentKey": "short"}}, "deploymentKey"),
        ({"model": {"claim": ""}}, "model.claim"),
        ({"proxy": {"replicas": 2}}, "replicas"),
        ({"config": {"port": 9}}, "'port'"),
        ({"config": {"upstream": {"url": "http://other:1"}}}, "'url'"),
        ({"store": {"enabled": False}}, "store"),
    ],
)
def test_wrong_values_are_refused(
    values: dict[str, Any], tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ChartError, match=said):
        render(tmp_path, changed(values, **more))
