"""API keys: the file, who gets in, and what a change of the file does to a running server."""

from __future__ import annotations

import multiprocessing
import re
import resource
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lcguard.commands.keys import key_table, listing, new_key, revoke
from lcguard.server.access.keyring import (
    AuthError,
    Identity,
    Keyring,
    KeyringError,
    load_keys,
    parse_keys,
)
from lcguard.server.limits.key_limits import Limits

WRONG = "lcg_aaaaaaaaaaaa_" + "A" * 43


class Clock:
    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def entry(**more: Any) -> dict[str, Any]:
    return {
        "id": "abcdefghijkl",
        "tenant": "acme",
        "agent": "billing",
        "role": "agent",
        "created_at": "2026-01-31T12:00:00Z",
        "sha256": "0" * 64,
        **more,
    }


def file(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "keys": list(entries)}


def reason(ring: Keyring, header: str | None) -> str:
    with pytest.raises(AuthError) as refused:
        ring.authenticate(header)
    assert refused.value.status == 401
    return refused.value.reason


# ---- who gets in


def test_a_new_key_lets_its_agent_in(path: Path) -> None:
    limits = Limits(requests_per_min=5, concurrency=2)
    text = new_key(path, "billing", "acme", models=["nano", "org/m"], limits=limits)
    assert re.fullmatch(r"lcg_[a-z0-9]{12}_[A-Za-z0-9_-]{43}", text)
    expected = Identity(text[4:16], "acme", "billing", "agent", ("nano", "org/m"), limits)
    ring = Keyring(path)
    assert ring.authenticate(f"Bearer {text}") == expected
    assert ring.authenticate(f"bearer  {text} ") == expected
    assert (ring.n_keys, ring.error, ring.loads, ring.failures) == (1, "", 1, 0)


def test_the_file_holds_no_secret_and_is_its_owner_s_alone(path: Path) -> None:
    text = new_key(path, "billing")
    for _ in range(2):
        assert text[17:] not in path.read_text()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o644)
        new_key(path, "intake")
    assert [p.name for p in path.parent.iterdir() if p.name != ".keys.yaml.lock"] == ["keys.yaml"]


def test_nobody_else_gets_in(path: Path) -> None:
    text = new_key(path, "billing")
    ring = Keyring(path)
    assert reason(ring, None) == reason(ring, "")
    flipped = text[:-2] + ("A" if text[-2] != "A" else "B") + text[-1]
    wrong = reason(ring, f"Bearer {flipped}")
    assert wrong == reason(ring, f"Bearer {WRONG}")  # the id exists, or does not: one answer
    malformed = {
        reason(ring, header)
        for header in (
            text,
            f"Basic {text}",
            f"Bearer {text}x",
            f"Bearer {text[:-1]}",
            f"Bearer\n{text}",
            f"Bearer {text}\n",
            f"Bearer {text[:4]}{text[4:16].upper()}é{text[16:]}",
            "Bearer lcg_" + "\u0131" * 12 + "_" + "A" * 43,
            "Bearer \udc80",
            "Bearer ",
            f"Bearer {text}, Bearer {text}",
            "Bearer " + "x" * 100_000,
        )
    }
    assert len(malformed) == 1
    assert text[17:] not in wrong + malformed.pop()


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    path = tmp_path_factory.mktemp("ring") / "keys.yaml"
    new_key(path, "billing")
    return Keyring(path)


@settings(max_examples=200, deadline=None)
@given(header=st.one_of(st.text(), st.from_regex(r"\A[Bb]earer lcg_[a-z0-9_-]*\Z")))
def test_any_header_is_answered(ring: Keyring, header: str) -> None:
    with pytest.raises(AuthError):
        ring.authenticate(header)


def test_an_expired_key_is_out_to_the_second(path: Path) -> None:
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    text = new_key(path, "billing", expires_at=until)
    clock = Clock(until.timestamp() - 1)
    ring = Keyring(path, clock=clock)
    assert ring.authenticate(f"Bearer {text}").agent == "billing"
    clock.now_s += 1
    assert "has expired" in reason(ring, f"Bearer {text}")
    # who lacks the secret is not told that the key was there
    assert reason(ring, f"Bearer {text[:17]}{'A' * 43}") == reason(ring, f"Bearer {WRONG}")


def test_several_keys_of_one_agent_live_at_once(path: Path) -> None:
    old, new = new_key(path, "billing"), new_key(path, "billing")
    ring = Keyring(path, every_s=0)
    assert ring.authenticate(f"Bearer {old}").agent == ring.authenticate(f"Bearer {new}").agent
    assert revoke(path, old[4:16]).agent == "billing"
    assert "revoked" in reason(ring, f"Bearer {old}")
    assert ring.authenticate(f"Bearer {new}").key_id == new[4:16]


def test_a_key_in_memory(path: Path) -> None:
    new_key(path, "billing")
    before = path.read_bytes()
    ring = Keyring(path, every_s=0)
    who = Identity("x", "acme", "meter", "canary")
    text = ring.add_memory_key(who)
    found = ring.authenticate(f"Bearer {text}")
    assert (found.tenant, found.agent, found.role) == ("acme", "meter", "canary")
    assert found.key_id == text[4:16]
    assert ring.authenticate(f"Bearer {ring.add_memory_key(who)}") != found
    assert path.read_bytes() == before
    new_key(path, "intake")
    assert ring.authenticate(f"Bearer {text}") == found  # a new file leaves it
    assert "not valid" in reason(ring, f"Bearer {text[:17]}{'A' * 43}")
    assert "not valid" in reason(Keyring(path), f"Bearer {text}")


# ---- the file is followed


def test_looked_at_once_a_second(path: Path) -> None:
    old, clock = new_key(path, "billing"), Clock()
    ring = Keyring(path, monotonic=clock)
    revoke(path, old[4:16])
    clock.now_s = 0.9
    assert ring.authenticate(f"Bearer {old}").agent == "billing"
    clock.now_s = 1.0
    assert "revoked" in reason(ring, f"Bearer {old}")


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "version: 1\nkeys: [",
        "version: 1\nkeys: []\nadmin: true\n",
        "? [a]\n: b\n",
        "[" * 3000,
        "version: 2\nkeys: []\n",
        None,
    ],
    ids=["empty", "syntax", "unknown", "list as key", "deep", "version", "deleted"],
)
def test_a_broken_file_changes_nothing_and_is_reported(path: Path, broken: str | None) -> None:
    text, clock = new_key(path, "billing"), Clock()
    good = path.read_text()
    ring = Keyring(path, monotonic=clock)
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    for now_s, failures in ((2.0, 1), (2.1, 1), (4.0, 2)):
        clock.now_s = now_s
        assert ring.authenticate(f"Bearer {text}").agent == "billing"
        assert "not valid" in reason(ring, f"Bearer {WRONG}")
        assert ring.error
        assert (ring.failures, ring.loads) == (failures, 1)
    path.write_text(good.replace("billing", "ledger"))
    clock.now_s = 6.0
    assert ring.authenticate(f"Bearer {text}").agent == "ledger"
    assert (ring.error, ring.loads) == ("", 2)


def test_a_reading_that_failed_by_chance_is_tried_again(path: Path) -> None:
    """A revocation that came while no file could be opened is seen without another change."""
    old, clock = new_key(path, "billing"), Clock()
    ring = Keyring(path, monotonic=clock)
    revoke(path, old[4:16])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    clock.now_s = 2.0
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        who = ring.authenticate(f"Bearer {old}")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert who.agent == "billing"
    assert "Too many open files" in ring.error
    clock.now_s = 4.0
    assert "revoked" in reason(ring, f"Bearer {old}")
    assert ring.error == ""


@pytest.mark.parametrize("length", range(0, 700, 7))
def test_a_file_cut_off_opens_nothing(path: Path, length: int) -> None:
    """Seen in the middle of being copied, no key has lost its expiry, its models or its limits."""
    later = datetime.now(UTC) + timedelta(days=1)
    for agent in ("a", "b"):
        new_key(path, agent, expires_at=later, models=["m"], limits=Limits(concurrency=1))
    whole = {e.id: e for e in load_keys(path).keys}
    path.write_text(path.read_text()[:length])
    try:
        found = load_keys(path).keys
    except KeyringError:
        return
    assert all(e == whole[e.id] for e in found)


@pytest.mark.parametrize("text", [None, "", "version: 1\n"])
def test_nothing_starts_without_a_good_file(path: Path, text: str | None) -> None:
    if text is not None:
        path.write_text(text)
    with pytest.raises(KeyringError, match=re.escape(str(path))):
        Keyring(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (file(entry(role="root")), "role"),
        (file(entry(tenant="a/b")), r"keys\[0\].tenant = 'a/b'"),
        (file(entry(agent="-a")), "agent"),
        (file(entry(agent="a" * 49)), "agent"),
        (file(entry(agent="a\n")), "agent"),
        (file(entry(agent="*")), "agent"),
        (file(entry(id="ABCDEFGHIJKL")), "id"),
        (file(entry(sha256="0" * 63)), "sha256"),
        (file(entry(expires_at="2026-01-31T12:00:00")), "timezone"),
        (file(entry(expires_at=1769860800)), "expires_at"),
        (file(entry(models=[])), "models"),
        (file(entry(limits={"requests_per_min": 0})), "requests_per_min"),
        (file(entry(limits={"concurrency": True})), "concurrency"),
        (file(entry(limits={"request_per_min": 5})), "requests_per_min"),
        (file(entry(expire_at="2026-01-31T12:00:00Z")), "did you mean.*expires_at"),
        (file(entry(), entry()), "abcdefghijkl is there twice"),
        ({"version": 1}, "keys: missing"),
        ({"version": "1", "keys": []}, "version"),
        ({"version": 1, "keys": {"a": 1}}, "keys"),
    ],
)
def test_malformed_entries_are_refused_by_name(data: dict[str, Any], said: str) -> None:
    with pytest.raises(KeyringError, match=said) as refused:
        parse_keys(data)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["sha256", "secret", "id", "role", "models"])
@pytest.mark.parametrize("prefix", ["", "lcg_abcdefghijkl_"])
def test_an_error_shows_no_secret_put_in_the_wrong_place(name: str, prefix: str) -> None:
    secret = "q7" * 21 + "q"
    with pytest.raises(KeyringError, match=name) as refused:
        parse_keys(file(entry(**{name: prefix + secret})))
    assert "q7q7q7" not in str(refused.value)


# ---- the commands


@pytest.mark.parametrize(
    "wrong",
    [
        {"agent": "a b"},
        {"agent": "*"},
        {"tenant": ""},
        {"tenant": "../x"},
        {"role": "canary"},
        {"models": []},
        {"limits": Limits(concurrency=0)},
        {"expires_at": datetime(2099, 1, 1)},
        {"expires_at": datetime(2020, 1, 1, tzinfo=UTC)},
    ],
    ids=str,
)
def test_new_key_refuses_and_changes_nothing(path: Path, wrong: dict[str, Any]) -> None:
    kept = new_key(path, "kept")
    before = path.read_bytes()
    with pytest.raises(KeyringError):
        new_key(path, **{"agent": "billing", **wrong})
    assert path.read_bytes() == before
    assert Keyring(path).authenticate(f"Bearer {kept}").agent == "kept"


def test_nothing_is_written_over_a_broken_file(path: Path) -> None:
    path.write_text("version: 1\nkeys: [")
    with pytest.raises(KeyringError, match="not valid YAML"):
        new_key(path, "billing")
    assert path.read_text() == "version: 1\nkeys: ["


def test_every_field_of_the_other_keys_is_kept(path: Path) -> None:
    full = entry(
        agent="full",
        role="auditor",
        expires_at="2030-01-01T00:00:00+02:00",
        models=["m"],
        limits={"tokens_per_min": 5},
    )
    path.write_text(yaml.safe_dump(file(full, entry(id="000000000000"))))
    before = load_keys(path).keys
    added = new_key(path, "billing")
    assert load_keys(path).keys[:2] == before
    revoke(path, added[4:16])
    assert load_keys(path).keys == before


def test_revoke_names_an_unknown_id(path: Path) -> None:
    new_key(path, "billing")
    with pytest.raises(KeyringError, match="no key with id 'zzz'"):
        revoke(path, "zzz")


def test_a_link_to_the_file_stays_one(path: Path, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    path.symlink_to(tmp_path / "mounted" / "real.yaml")
    text = new_key(path, "billing")
    assert path.is_symlink()
    assert Keyring(path).authenticate(f"Bearer {text}").agent == "billing"


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyringError, match="cannot be written"):
        new_key(tmp_path / "file" / "keys.yaml", "billing")


def _add_keys(path: Path, agent: str) -> None:
    for _ in range(5):
        new_key(path, agent)


def test_two_commands_at_once_lose_no_key(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add_keys, args=(path, f"a{i}")) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    found = load_keys(path).keys
    assert sorted(e.agent for e in found) == sorted(f"a{i}" for i in range(4) for _ in range(5))


def test_the_listing_shows_all_but_the_hashes(path: Path) -> None:
    until = datetime.now(UTC) + timedelta(days=30)
    first = new_key(path, "billing", "acme", expires_at=until, limits=Limits(concurrency=4))
    new_key(path, "auditor-1", role="auditor")
    entries = listing(path)
    assert [e.agent for e in sorted(entries, key=lambda e: e.agent)] == ["auditor-1", "billing"]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(key_table(entries, until))
    shown = captured.get()
    for text in (first[4:16], "acme", "concurrency=4", "(expired)", "never", "auditor-1"):
        assert text in shown
    assert not any(e.sha256[:16] in shown for e in entries)
