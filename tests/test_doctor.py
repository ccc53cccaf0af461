"""``lcguard doctor``: each thing that can be wrong is made wrong, and said in its own line."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lcguard.handoff.keys import new_key
from tests.engine import needs_vllm
from tests.server.test_proxy_commands import UPSTREAM, lcguard, ok, serving, void, write
from tests.vllm.test_preflight import unproven_guard, wrong_start

PASSWORD, DEPLOYMENT, UPSTREAM_KEY = "pw-" + "7h" * 12, "ab" * 31 + "zz", "up-" + "5k" * 16


def doctor(
    folder: Path, *words: str, **environment: str
) -> tuple[int, dict[str, tuple[str, str]], str]:
    """Exit code, what -> level and detail, and all that was printed."""
    code, out, err = lcguard(folder, "doctor", "--json", *words, **environment)
    assert err == "", err
    found = json.loads(out)
    assert found["ok"] is (code == 0)
    return code, {c["what"]: (c["level"], c["detail"]) for c in found["checks"]}, out


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return new_state(tmp_path / "state")


def new_state(folder: Path) -> Path:
    """A server's, with two agents' keys."""
    ok(folder, "keys", "new", "intake", "billing")
    (folder / "server.yaml").write_text("port: 0\n")
    return folder


@needs_vllm
def test_what_works_is_ok_line_by_line(state: Path) -> None:
    code, found, _ = doctor(state)
    assert code == 0
    assert {level for level, _ in found.values()} <= {"ok", "warning"}, found
    assert found["model"][1].startswith("nano: qwen3: 4 layers, 2 KV heads of 32")
    assert found["guard gate"][1].startswith("nano:gate: gate, digest ")
    assert found["keys"] == ("ok", "2")
    assert not (state / "segments").exists()  # nothing is made
    code, out, _ = lcguard(state, "doctor")
    assert code == 0
    lines = out.splitlines()
    assert [tuple(line.split(None, 1)[:1]) for line in lines] == [(v[0],) for v in found.values()]
    assert len(lines) == len(found)


def expire(folder: Path) -> None:
    text = (folder / "keys.yaml").read_text()
    over = "expires_at: '2001-01-01T00:00:00Z'\n  sha256:"
    (folder / "keys.yaml").write_text(text.replace("sha256:", over))


def edges(*rows: str, end: str = "...\n") -> Callable[[Path], None]:
    lines = "".join(f"  - {{{row}}}\n" for row in rows)
    return write("policy.yaml", f"version: 1\nedges:\n{lines}{end}")


def mode(name: str, bits: int) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).chmod(bits))


def store_of_all(folder: Path) -> None:
    (folder / "segments").mkdir()
    (folder / "segments").chmod(0o777)


PLAIN_EDGE = "source: intake, audience: billing, forbid: [person], guard: redact"
# What is made wrong, the words, the environment -> the line that says it.
Case = tuple[Callable[[Path], None], list[str], dict[str, str], tuple[str, str, str]]
CASES: dict[str, Case] = {
    "open folder": (mode(".", 0o755), [], {}, ("state folder", "fails", "chmod 700")),
    "open keys": (mode("keys.yaml", 0o644), [], {}, ("state folder", "fails", "chmod 600")),
    "no keys": (
        lambda folder: (folder / "keys.yaml").unlink(),
        [],
        {},
        ("keys", "fails", "cannot be read"),
    ),
    "expired keys": (expire, [], {}, ("keys", "fails", "2, of which 2 expired: nobody can ask")),
    "no such key": (
        write("deployment.key", DEPLOYMENT),
        [],
        {},
        ("deployment key", "fails", "may be read by others"),
    ),
    "malformed key": (
        void,
        [],
        {"LCGUARD_KEY": DEPLOYMENT},
        ("deployment key", "fails", "is not hexadecimal"),
    ),
    "key of the running vLLM": (
        void,
        ["--set", f"upstream.url={UPSTREAM}"],
        {},
        ("deployment key", "fails", "LCGUARD_KEY is not set"),
    ),
    "no upstream key": (
        void,
        ["--set", f"upstream.url={UPSTREAM}"],
        {},
        ("upstream", "warning", "LCGUARD_UPSTREAM_KEY is not set"),
    ),
    "open upstream": (
        void,
        ["--set", "upstream.url=http://10.1.2.3:8000"],
        {},
        ("upstream", "fails", "beyond this machine"),
    ),
    "unknown option": (write("server.yaml", "prot: 1\n"), [], {}, ("settings", "fails", "'port'")),
    "broken policy": (
        write("policy.yaml", "version: 1\nedgs: []\n"),
        [],
        {},
        ("policy", "fails", "edgs"),
    ),
    "unended policy": (
        edges(PLAIN_EDGE, end=""),
        [],
        {},
        ("policy", "warning", "policy.yaml is whole"),
    ),
    "edge of nobody": (
        edges("source: intak, audience: billing, forbid: [person]"),
        [],
        {},
        ("policy", "warning", "intak"),
    ),
    "no model": (void, ["--set", "engine.model=./none"], {}, ("model", "fails", "not a folder")),
    "model to come": (
        void,
        ["--set", "engine.model=lcguard-tests/none"],
        {},
        ("model", "warning", "the first start downloads it"),
    ),
    "open store": (store_of_all, [], {}, ("store", "fails", "written to by others")),
    "no store": (
        void,
        ["--set", f"store=redis://user:{PASSWORD}@127.0.0.1:1/0"],
        {},
        ("store", "fails", "redis at 127.0.0.1:1"),
    ),
    "too large a cache": (
        void,
        [],
        {"VLLM_CPU_KVCACHE_SPACE": "1000000"},
        ("memory", "fails", "lower VLLM_CPU_KVCACHE_SPACE"),
    ),
    "no size of a cache": (
        void,
        [],
        {"VLLM_CPU_KVCACHE_SPACE": "half"},
        ("memory", "fails", "write whole GiB"),
    ),
    "plugin left out": (
        void,
        [],
        {"VLLM_PLUGINS": "other"},
        ("plugin", "fails", "VLLM_PLUGINS='other'"),
    ),
}
NEEDS_VLLM = ("plugin left out",)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=needs_vllm) if c in NEEDS_VLLM else c for c in CASES]
)
def test_it_says_what_is_wrong(state: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, words, environment, (what, level, said) = CASES[case]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepare(state)
    code, found, out = doctor(state, *words, **environment)
    assert found[what][0] == level, found
    assert said in found[what][1]
    assert level != "fails" or code == 1
    for secret in (PASSWORD, DEPLOYMENT, UPSTREAM_KEY):
        assert secret not in out


@pytest.mark.parametrize("name", ["another model's guard", "altered guard", "mistyped guard"])
def test_it_says_what_is_wrong_with_a_guard(state: Path, tmp_path: Path, name: str) -> None:
    model, guards, said = wrong_start(name, tmp_path)
    (state / "server.yaml").write_text(json.dumps({"engine": {"model": model, "guards": guards}}))
    (guard,) = guards
    code, found, _ = doctor(state, "--set", "port=0")
    assert code == 1
    level, detail = found[f"guard {guard}"]
    assert level == "fails"
    assert said in f"guards.{guard}: {detail.removeprefix(f'guards.{guard}: ')}"


def test_a_model_without_tokenizer_and_a_guard_that_waits_for_it(
    state: Path, tmp_path: Path
) -> None:
    model, _, said = wrong_start("no tokenizer", tmp_path)
    _, found, _ = doctor(state, "--set", f"engine.model={model}")
    assert found["model"][0] == "fails"
    assert said in found["model"][1]
    _, found, _ = doctor(
        state, "--set", "engine.model=./no", "--set", "engine.guards={g: nano:gate}"
    )
    assert found["guard g"] == (
        "warning",
        "not looked at: it is held against the model, which fails",
    )


def test_an_unproven_guard_is_a_failure_or_named(state: Path, tmp_path: Path) -> None:
    guards = f"engine.guards={json.dumps({'mine': unproven_guard(tmp_path / 'g')})}"
    _, found, _ = doctor(state, "--set", guards)
    assert found["guard mine"][0] == "fails"
    assert "engine.unproven=[mine]" in found["guard mine"][1]
    _, found, _ = doctor(state, "--set", guards, "--set", "engine.unproven=[mine]")
    assert found["guard mine"][0] == "warning"


def test_no_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found, _ = doctor(tmp_path / "none")
    assert code == 1
    assert found["state folder"][0] == "fails"
    monkeypatch.chdir(tmp_path)  # where nobody has deployed anything, the installation is looked at
    _, found, _ = doctor(Path(".lcguard"))
    assert found["state folder"][0] == "warning"
    assert not (tmp_path / ".lcguard").exists()


def test_keys_that_are_mounted_are_not_ours_to_close(state: Path, tmp_path: Path) -> None:
    mounted = tmp_path / "keys.yaml"
    (state / "keys.yaml").rename(mounted)
    mounted.chmod(0o440)
    _, found, _ = doctor(state, "--set", f"keys={mounted}")
    assert found["state folder"][0] == found["keys"][0] == "ok"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_a_folder_that_cannot_be_written_to(state: Path) -> None:
    state.chmod(0o500)
    _, found, _ = doctor(state)
    state.chmod(0o700)
    assert found["state folder"][0] == "fails"


# -- port and server


def test_a_port_that_something_else_has(state: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        hang_up = threading.Thread(target=lambda: other.accept()[0].close())
        hang_up.start()
        _, found, _ = doctor(state, "--set", f"port={port}")
        hang_up.join()
    assert found["port"][0] == "fails"
    assert "cannot be listened on" in found["port"][1]
    assert found["server"] == ("ok", "none is running")


def test_a_running_server_that_is_not_ready(state: Path) -> None:
    key = new_key()
    (state / "server.yaml").unlink()
    with serving(state, key) as url:
        port = url.rpartition(":")[2]
        environment = {"LCGUARD_KEY": key, "LCGUARD_UPSTREAM_KEY": UPSTREAM_KEY}
        sets = ("--set", f"port={port}", "--set", f"upstream.url={UPSTREAM}")
        code, found, out = doctor(state, *sets, **environment)
    assert code == 1
    assert found["port"] == ("ok", f"127.0.0.1:{port} is the running server's")
    assert found["server"][0] == "fails"
    assert found["server"][1].startswith("running and not ready: engine: ")
    assert found["upstream"] == (
        "ok",
        "attaches to 127.0.0.1, with a key in LCGUARD_UPSTREAM_KEY",
    )
    assert "vllm" not in found  # it runs elsewhere
    for secret in (key, UPSTREAM_KEY):
        assert secret not in out
