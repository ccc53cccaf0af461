"""``lcguard keys``, ``config``, ``audit`` and ``serve``: what they say, and one line for a wrong
input."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from lcguard.cli import main
from lcguard.guards.registry import Judgement, Registry
from lcguard.handoff.keys import KEY_VARIABLE, new_key
from lcguard.server.access.keyring import load_keys
from lcguard.server.audit.trail import AuditLog, Entry
from lcguard.server.database.writer import Database
from lcguard.strict_yaml import parse_yaml
from tests.engine import needs_vllm
from tests.vllm.test_preflight import unproven_guard, wrong_start

UPSTREAM = "http://127.0.0.1:1"


def lcguard(folder: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; in this process, for a start takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["lcguard", *words, "--dir", str(folder)])
        for name, value in ({KEY_VARIABLE: "", "COLUMNS": "200"} | environment).items():
            patch.setenv(name, value)
        try:
            code: int | str = main()
        except SystemExit as stop:
            code = stop.code or 0
    return int(code), out.getvalue(), err.getvalue()


def ok(folder: Path, *words: str) -> str:
    code, out, err = lcguard(folder, *words)
    assert code == 0, err
    return out


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    out = ok(
        tmp_path,
        "keys",
        "new",
        "intake",
        "front-desk",
        "--tenant",
        "acme",
        "--expires",
        "2999-01-31",
        "--model",
        "nano",
        "--requests-per-min",
        "60",
        "--tokens-per-min",
        "1000",
        "--concurrency",
        "2",
    )
    lines = out.splitlines()
    assert [re.sub(r"=lcg_\w{12}_[\w-]{43}$", "", x) for x in lines] == [
        "export INTAKE_KEY",
        "export FRONT_DESK_KEY",
    ]
    first, second = load_keys(tmp_path / "keys.yaml").keys
    assert (first.tenant, first.agent, first.role, first.models) == (
        "acme",
        "intake",
        "agent",
        ("nano",),
    )
    limits = first.limits
    assert (limits.requests_per_min, limits.tokens_per_min, limits.concurrency) == (60, 1000, 2)
    assert first.expires_at is not None
    assert first.expires_at.year == 2999
    secret = lines[0].rpartition("=")[2].split("_", 2)[2]
    assert secret not in (tmp_path / "keys.yaml").read_text()
    assert (tmp_path / "keys.yaml").stat().st_mode & 0o077 == 0
    shown = ok(tmp_path, "keys", "list")
    assert first.id in shown
    assert "requests_per_min=60" in shown
    assert "revoked" in ok(tmp_path, "keys", "revoke", first.id)
    assert [k.id for k in load_keys(tmp_path / "keys.yaml").keys] == [second.id]


def test_config_check_and_show(tmp_path: Path) -> None:
    ok(tmp_path, "keys", "new", "intake")
    assert "keys: 1\npolicy: no file" in ok(tmp_path, "config", "check")
    (tmp_path / "server.yaml").write_text("port: 9001\nlimits: {max_queue: 3}\n")
    shown = parse_yaml(ok(tmp_path, "config", "show", "--set", "limits.max_concurrency=7"))
    assert shown["port"] == 9001
    assert (shown["limits"]["max_queue"], shown["limits"]["max_concurrency"]) == (3, 7)
    assert shown["store"] == f"file://{tmp_path / 'segments'}"
    other = tmp_path / "other.yaml"
    other.write_text("port: 9002\n")
    assert parse_yaml(ok(tmp_path, "config", "show", "--config", str(other)))["port"] == 9002


def foreign_database(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "lcguard.sqlite")) as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")
        connection.commit()


def no_keys(folder: Path) -> None:
    (folder / "keys.yaml").unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_text(text))


def void(_: object) -> None:
    return None


CASES: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "unknown key": (write("server.yaml", "prot: 1\n"), [], "prot"),
    "unknown nested key": (
        write("server.yaml", "limits: {max_que: 1}\n"),
        [],
        "limits.max_que",
    ),
    "wrong value": (write("server.yaml", "drain_s: soon\n"), [], "drain_s"),
    "no YAML": (write("server.yaml", "port: [\n"), [], "not valid YAML"),
    "broken policy": (write("policy.yaml", "version: 1\nedgs: []\n"), [], "edgs"),
    "no keys file": (no_keys, [], "lcguard keys new"),
    "broken keys file": (write("keys.yaml", "version: 1\nkeys: 3\n"), [], "keys.yaml"),
    "foreign database": (foreign_database, [], "belongs to another program"),
    "broken leakage state": (write("leakage.json", "{"), [], "leakage.json"),
    "unknown store": (write("server.yaml", "store: ftp://x\n"), [], "ftp"),
    "open upstream": (
        write("server.yaml", "{}\n"),
        ["--set", "upstream.url=http://10.1.2.3:8000"],
        "10.1.2.3:8000' is beyond this machine and has no key",
    ),
    "no upstream": (write("server.yaml", "{}\n"), ["--set", "upstream.url=vllm"], "'vllm'"),
    "readable key": (write("deployment.key", "00" * 32), [], "chmod 600"),
}


@pytest.mark.parametrize("case", CASES)
def test_serve_refuses_a_wrong_input_in_one_line(tmp_path: Path, case: str) -> None:
    prepare, words, said = CASES[case]
    ok(tmp_path, "keys", "new", "intake")
    prepare(tmp_path)
    if not words:
        words = ["--upstream", UPSTREAM]
    code, _, err = lcguard(tmp_path, "serve", "--port", "0", *words)
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("lcguard: ")
    assert said in err


def test_serve_says_at_once_that_its_port_is_in_use(tmp_path: Path) -> None:
    ok(tmp_path, "keys", "new", "intake")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        code, _, err = lcguard(tmp_path, "serve", "--port", port, "--upstream", UPSTREAM)
    assert code == 2
    said = f"127.0.0.1:{port} cannot be listened on: Address already in use"
    assert err.startswith(f"lcguard: {said}")
    assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "lcguard.sqlite").exists()  # nothing was started


@needs_vllm
@pytest.mark.parametrize("name", ["another model's guard", "unproven guard", "no tokenizer"])
def test_serve_says_what_its_engine_would_refuse(tmp_path: Path, name: str) -> None:
    state = tmp_path / "state"
    ok(state, "keys", "new", "intake")
    model, guards, said = wrong_start(name, tmp_path)
    sets = [f"engine.guards={json.dumps(guards)}"] if guards else []
    words = [word for text in sets for word in ("--set", text)]
    code, _, err = lcguard(state, "serve", "--port", "0", "--model", model, *words)
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    assert said in err
    assert not (state / "vllm.log").exists()


def test_a_browser_is_led_to_the_dashboard_and_an_auditor_to_the_audit(tmp_path: Path) -> None:
    secret = {
        name: ok(tmp_path, "keys", "new", name, "--role", role, "--tenant", tenant)
        .strip()
        .partition("=")[2]
        for name, role, tenant in (
            ("root", "admin", "default"),
            ("eve", "auditor", "acme"),
            ("intake", "agent", "acme"),
        )
    }
    key, mine = new_key(), unproven_guard(tmp_path / "g")
    registry = Registry(tmp_path / "guards", bytes.fromhex(key))
    version = registry.add(Path(mine), Judgement(accepted=True, reason="a word of its own"))
    registry.promote(version.name, "the first")
    guards = json.dumps({"mine": mine, "kept": str(registry.folder)})
    (tmp_path / "server.yaml").write_text(f"engine: {{guards: {guards}, unproven: [mine, kept]}}\n")
    database = Database(tmp_path / "lcguard.sqlite")
    log = AuditLog(database, bytes.fromhex(key))
    for tenant, agent in (("acme", "clerk"), ("default", "stranger")):
        asyncio.run(log.append(Entry("refused", tenant=tenant, agent=agent)))
    database.close()
    with serving(tmp_path, key) as url, httpx.Client(base_url=url) as http:
        assert http.get("/").headers["location"] == "/dashboard"
        assert "vacuous" in http.get("/readyz").json()["unproven"]["mine"]
        page = {n: http.get("/dashboard", auth=("any", key)) for n, key in secret.items()}
        assert [page[n].status_code for n in ("root", "eve", "intake")] == [200, 200, 403]
        audit = page["eve"].text.partition('id="audit-h"')[2].partition("</table>")[0]
        assert "clerk" in audit
        assert "stranger" not in audit
        assert "stranger" in page["root"].text
        assert 'id="edges-h"' in page["root"].text
        assert "Guards are served unproven" in page["root"].text
        assert "a word of its own" in page["root"].text.partition('id="guards-h"')[2]
        assert 'id="guards-h"' not in page["eve"].text
        assert 'id="edges-h"' not in page["eve"].text
        assert 'id="agents-h"' not in page["eve"].text


@contextlib.contextmanager
def serving(folder: Path, key: str) -> Iterator[str]:
    """The proxy before no vLLM at all; its address."""
    words = ("serve", "--dir", str(folder), "--port", "0", "--upstream", UPSTREAM)
    command = [sys.executable, "-m", "lcguard.cli", *words, "--set", "canaries.enabled=false"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {KEY_VARIABLE: key}
    )
    assert process.stderr is not None
    with process.stderr as said:
        yield next(x for x in said if x.startswith("listening")).split()[-1]
        process.terminate()
        said.read()
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("keys", "list"), "keys.yaml: cannot be read"),
        (("keys", "revoke", "abc"), "keys.yaml: cannot be read"),
        (("keys", "new", "a b"), "agent"),
        (("keys", "new", "a", "--expires", "2001-01-01"), "is over"),
        (("config", "check"), "keys.yaml: cannot be read"),
        (("config", "show", "--set", "prot=1"), "prot"),
        (("audit", "show"), "lcguard.sqlite"),
        (("audit", "verify"), "deployment.key"),
    ],
)
def test_the_other_commands_too(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    code, _, err = lcguard(tmp_path, *words)
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    assert said in err


def test_audit_verify_finds_an_altered_row(tmp_path: Path) -> None:
    """On a real trail: the proxy writes its start, even where no vLLM answers."""
    ok(tmp_path, "keys", "new", "intake")
    key = new_key()
    with serving(tmp_path, key):
        pass
    code, out, err = lcguard(tmp_path, "audit", "verify", **{KEY_VARIABLE: key})
    assert (code, err) == (0, "")
    assert "2 rows, whole" in out
    head = re.findall(r"head (\S+)", out)[0]
    shown = ok(tmp_path, "audit", "show", "--last", "1")
    assert "stop" in shown
    assert "start" not in shown
    with closing(sqlite3.connect(tmp_path / "lcguard.sqlite")) as connection:
        connection.execute("UPDATE audit SET event = 'published' WHERE seq = 1")
        connection.commit()
    for more in ((), ("--head", head)):
        code, out, _ = lcguard(tmp_path, "audit", "verify", *more, **{KEY_VARIABLE: key})
        assert code == 1
        assert "NOT as they were written" in out
