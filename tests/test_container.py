"""The container files: what can be shown of them without a container engine."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from lcguard.commands.serve import check_exposure, load_settings
from lcguard.vllm.settings import read_settings
from tests.paths import ROOT


class Loader(yaml.SafeLoader):
    """With compose's own tags, which replace where it would otherwise merge."""


for tag in ("!reset", "!override"):
    Loader.add_constructor(tag, Loader.construct_sequence)

COMPOSE = yaml.safe_load((ROOT / "container" / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
TWO = yaml.load((ROOT / "container" / "two-proxies.yaml").read_text(), Loader)["services"]
HAPROXY = ROOT / "container" / "haproxy.cfg"
DOCKERFILE = (ROOT / "container" / "Dockerfile").read_text()


def test_no_image_runs_as_root() -> None:
    stages = re.split(r"^FROM .* AS (\w+)$", DOCKERFILE, flags=re.M)[1:]
    users = {
        name: re.findall(r"^USER (\S+)$", text, re.M)
        for name, text in zip(stages[::2], stages[1::2], strict=True)
    }
    assert users.keys() == {"proxy", "loop", "engine"}
    assert all(found and int(found[-1]) > 0 for found in users.values()), users


def ignored(path: str) -> bool:
    """As docker reads ``.dockerignore``: rooted patterns, the last that matches path or a folder
    above it decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or line.startswith("#"):
            continue
        parts = Path(path).parts
        starts = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        named = pattern.removeprefix("**/")
        names = parts if pattern.startswith("**/") else ()
        if any(fnmatch(n, named) for n in names) or (
            not names and any("/" not in s and fnmatch(s, pattern) for s in starts)
        ):
            out = not line.startswith("!")
    return out


@pytest.mark.parametrize(
    "secret",
    [
        ".lcguard/deployment.key",
        ".lcguard/keys.yaml",
        "container/.env",
        "container/state/x",
        ".env",
        ".git/config",
        "state/lcguard.sqlite",
        "server/.env.local",
        "lcguard/x.key",
        "lcguard/.lcguard/keys.yaml",
        "runs/demo/report.json",
        "my-state/keys.yaml",
        "vllm.log",
    ],
)
def test_no_secret_gets_into_an_image(secret: str) -> None:
    assert ignored(secret)


def test_what_the_build_takes_is_there() -> None:
    for path in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "requirements-dev.txt",
        "requirements-vllm.txt",
        "requirements-kfp.txt",
        "lcguard/handoff/policy.py",
        "server/app.py",
        "attacks/base.py",
        "server/dashboard/templates/dashboard.html",
        "agents/nano/model/config.json",
    ):
        assert (ROOT / path).exists()
        assert not ignored(path), path


def test_every_base_image_is_asked_for_by_digest() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)
    assert bases == ["${PYTHON_IMAGE}", "proxy", "${VLLM_IMAGE}"]  # the loop's is the proxy's
    for name in ("PYTHON_IMAGE", "VLLM_IMAGE"):
        assert f"ARG {name}\n" in DOCKERFILE  # no default that is a tag
        assert f'case "${name}" in *@sha256:*) ;; *)' in DOCKERFILE
        assert SERVICES["proxy"]["build"]["args"][name].startswith(f"${{{name}:?")
    assert SERVICES["engine"]["build"]["args"] == SERVICES["proxy"]["build"]["args"]
    built = {"lcguard-proxy", "lcguard-engine"}
    images = {s["image"] for s in SERVICES.values()} - built
    assert all(image.startswith("${") and ":?" in image for image in images)


def test_the_proxys_command_is_one_that_serve_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(SERVICES["proxy"]["command"])
    sets = [words[i + 1] for i, w in enumerate(words) if w == "--set"]
    upstream = words[words.index("--upstream") + 1]
    settings = load_settings(tmp_path, None, sets, upstream)
    assert settings.store == "redis://store:6379/0"
    assert settings.engine.guards == {"gate": "/guard"}
    # beyond this machine it takes a key, and compose hands one over
    monkeypatch.delenv("LCGUARD_UPSTREAM_KEY", raising=False)
    with pytest.raises(ValueError, match="beyond this machine"):
        check_exposure(settings)
    monkeypatch.setenv("LCGUARD_UPSTREAM_KEY", "k")
    check_exposure(settings)
    assert "LCGUARD_UPSTREAM_KEY" in SERVICES["proxy"]["environment"]
    assert "LCGUARD_UPSTREAM_KEY" in SERVICES["engine"]["environment"]["VLLM_API_KEY"]


def test_engine_and_proxy_share_store_policy_and_key() -> None:
    command = SERVICES["engine"]["command"]
    transfer = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector"] == "LCGuardConnector"
    settings = read_settings(transfer["kv_connector_extra_config"])
    assert settings.store == "redis://store:6379/0"
    assert settings.policy == "/state/policy.yaml"
    keys = {SERVICES[s]["environment"]["LCGUARD_KEY"][:14] for s in ("proxy", "engine")}
    assert keys == {"${LCGUARD_KEY:"}


def test_only_the_proxy_is_reachable() -> None:
    for name, service in SERVICES.items():
        assert ("ports" in service) == (name == "proxy")
        assert ("outside" in service["networks"]) == (name == "proxy")
        assert service["cap_drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["proxy"]["ports"])
    assert COMPOSE["networks"]["inside"]["internal"] is True


def test_two_proxies_share_what_they_have_to(tmp_path: Path) -> None:
    found = []
    for name in ("proxy", "proxy-2"):
        words = shlex.split(TWO[name]["command"])
        sets = [words[i + 1] for i, w in enumerate(words) if w == "--set"]
        found.append(load_settings(tmp_path, None, sets, words[words.index("--upstream") + 1]))
        assert "LCGUARD_DATABASE_PASSWORD" in TWO[name]["environment"]
    one, other = found
    assert one.database == other.database == "postgresql://lcguard@database/lcguard"
    assert one.store == other.store == "redis://store:6379/0"
    assert [s.canaries.enabled for s in found] == [True, False]
    assert TWO["proxy"]["environment"] == TWO["proxy-2"]["environment"]
    assert SERVICES["proxy"]["environment"].keys() <= TWO["proxy"]["environment"].keys()


def test_only_the_balancer_of_two_is_reachable() -> None:
    merged = {name: SERVICES.get(name, {}) | service for name, service in TWO.items()}
    for name, service in merged.items():
        assert bool(service.get("ports")) == (name == "balancer"), name
        assert ("outside" in service["networks"]) == (name == "balancer"), name
        assert service["cap_drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for port in TWO["balancer"]["ports"])
    for name in ("balancer", "database"):
        assert TWO[name]["image"].startswith("${")


def test_the_balancer_asks_both_and_only_while_they_are_ready() -> None:
    text = HAPROXY.read_text()
    assert re.findall(r"^    server \S+ (\S+):8080$", text, re.M) == ["proxy", "proxy-2"]
    assert "option httpchk GET /readyz" in text
    assert "retry-on conn-failure\n" in text  # what reached a proxy is never sent twice


@pytest.mark.skipif(not shutil.which("haproxy"), reason="no haproxy: install Debian's package")
def test_haproxy_takes_its_file() -> None:
    done = subprocess.run(["haproxy", "-c", "-f", str(HAPROXY)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
