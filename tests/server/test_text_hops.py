"""Text hops through a running proxy: the routes that need no engine, which is not there."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import PermissionDeniedError

from lcguard.client import AsyncClient, Client
from lcguard.commands.live_servers import Site
from lcguard.handoff.policy import parse_policy
from lcguard.server.health.selftest import edges_by_guard
from tests.server.proxy import Front, close_edges, error, rewrite, wait_for
from tests.server.proxy_client import audit_rows

NAME, SSN = "Ada Long", "912-55-1029"
NOTE = f"{NAME} of Blue Heron, SSN {SSN}."


def _text(source: str, audience: str, forbid: list[str], **more: Any) -> dict[str, Any]:
    given = {"source": source, "audience": audience, "forbid": forbid, "channel": "text"}
    return given | more


POLICY = {
    "version": 1,
    "categories": {"project": {"terms": ["Blue Heron"], "patterns": [r"PRJ-\d{4}"]}},
    "edges": [
        _text("intake", "billing", ["person", "project"], restore=["desk", "intake"]),
        _text("intake", "press", ["project"]),
        _text("intake", "brief", ["project"], restore=["desk"], ttl_s=0.2),
        _text("intake", "screened", ["government_id"], detect="presidio"),
        _text("intake", "shut", []),
        {"source": "intake", "audience": "archive", "forbid": []},
    ],
}


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A proxy whose engine cannot be reached."""
    site = Site(tmp_path_factory.mktemp("text"), POLICY)
    close_edges(site.folder, "shut")
    site.key("nobody")
    nowhere = {"url": "http://127.0.0.1:9", "retries": 0}
    limits = {"max_body_bytes": 100_000}
    with site.proxy(None, ready=False, upstream=nowhere, limits=limits) as running:
        running.wait("/livez")
        with Front(site, running) as found:
            yield found


def guarded(front: Front, who: str = "intake", tenant: str = "default", **body: Any) -> Any:
    answer = front.http.post("/lcguard/v1/text", json=body, headers=front.auth(who, tenant))
    return answer


def restored(front: Front, who: str, **body: Any) -> httpx.Response:
    return front.http.post("/lcguard/v1/text/restore", json=body, headers=front.auth(who))


def rows(front: Front, event: str) -> list[dict[str, Any]]:
    return [r for r in audit_rows(front.site.folder / "lcguard.sqlite") if r["event"] == event]


def test_a_text_messages_and_json_are_guarded_and_the_sender_told_what_was_applied(
    front: Front,
) -> None:
    told = {"audience": "billing", "secrets": [NAME, SSN]}
    text = guarded(front, text=NOTE, **told)
    assert text.status_code == 200, text.text
    shown = text.json()["text"]
    assert all(v not in shown for v in (NAME, SSN, "Heron"))
    assert text.json()["applied"] == {
        "source": "intake",
        "audience": "billing",
        "forbid": ["person", "project"],
        "policy_digest": text.json()["applied"]["policy_digest"],
        "hidden": {"NUMBER": 1, "PROJECT": 1, "TEXT": 1},
    }
    messages = guarded(front, messages=[{"role": "user", "content": NOTE}], **told)
    assert messages.json()["messages"] == [{"role": "user", "content": shown}]
    value = guarded(front, json={"note": NOTE, "ssn": 912551029}, **told).json()["json"]
    assert value["note"] == shown
    assert value["ssn"] in shown


def test_what_is_hidden_is_in_no_row_and_in_no_file(front: Front) -> None:
    secret = "Zebulon Quartermain"
    made = guarded(front, audience="billing", secrets=[secret], text=f"{secret} called.")
    assert secret not in made.text
    (row,) = rows(front, "text_guarded")[-1:]
    assert (row["source"], row["audience"], row["reason"]) == (
        "intake",
        "billing",
        "1 values hidden",
    )
    assert rows(front, "text")[-1]["seq"] < row["seq"]
    for path in front.site.folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert secret.encode() not in data, path
            assert b"Quartermain" not in data, path


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"audience": "billing", "text": NOTE}, 400, "person in a text: name the values"),
        ({"audience": "archive", "text": NOTE}, 403, "takes KV alone, not text"),
        ({"audience": "nobody", "text": NOTE, "secrets": []}, 403, "takes KV alone"),
        ({"audience": "shut", "text": NOTE}, 403, "closed"),
        ({"audience": "press"}, 400, "one of text, messages and json"),
        ({"audience": "press", "text": "x", "json": 1}, 400, "one of text"),
        ({"audience": "press", "text": "x", "color": 1}, 400, "color"),
        ({"text": "x"}, 400, "audience"),
        ({"audience": "press", "messages": [{"content": [{"image_url": "x"}]}]}, 400, "media"),
        ({"audience": "press", "secrets": [" "], "text": "x"}, 400, "secrets[0]"),
        ({"audience": "press", "text": "x" * 100_001}, 413, "more than 100000 bytes"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_refusals(front: Front, body: Any, status: int, said: str) -> None:
    answer = guarded(front, **body)
    assert (answer.status_code, said in answer.json()["error"]["message"]) == (status, True)
    assert NAME not in answer.text
    if status == 403:
        assert rows(front, "refused")[-1]["audience"] == body["audience"]


def test_only_a_key_gets_in(front: Front) -> None:
    for path in ("text", "text/restore"):
        assert front.http.post(f"/lcguard/v1/{path}", json={"text": "x"}).status_code == 401


def test_presidio_finds_what_nobody_named(front: Front) -> None:
    pytest.importorskip("presidio_analyzer")
    answer = guarded(front, audience="screened", secrets=[], text=NOTE)
    assert SSN not in answer.json()["text"]
    assert NAME in answer.json()["text"]


def test_values_come_back_for_whom_the_edge_names_alone(front: Front) -> None:
    told = {"audience": "billing", "secrets": [NAME, SSN], "conversation": "talk"}
    made = guarded(front, json={"a": NOTE, "raw": json.dumps({"who": NAME})}, **told).json()["json"]
    for who in ("desk", "intake"):
        back = restored(front, who, conversation="talk", json=made)
        assert back.status_code == 200, back.text
        assert back.json() == {
            "json": {"a": NOTE, "raw": json.dumps({"who": NAME})},
            "restored": 4,
            "kept": 0,
        }
    for who in ("billing", "mallory"):
        assert error(restored(front, who, conversation="talk", json=made)) == (403, "policy")
    assert rows(front, "text_restored")[-1]["agent"] == "intake"
    body = {"conversation": "talk", "json": made}
    auditor = front.auth("desk", role="auditor")
    seen = front.http.post("/lcguard/v1/text/restore", json=body, headers=auditor)
    assert error(seen) == (403, "policy")
    other = restored(front, "desk", conversation="other", json=made)
    assert other.json() == {"json": made, "restored": 0, "kept": 3}
    foreign = front.http.post(
        "/lcguard/v1/text/restore",
        json={"conversation": "talk", "json": made},
        headers=front.auth("desk", "acme"),
    )
    assert foreign.json()["restored"] == 0


def test_what_an_edge_does_not_restore_is_not_kept(front: Front) -> None:
    made = guarded(front, audience="press", text="Blue Heron", conversation="p").json()["text"]
    assert restored(front, "desk", conversation="p", text=made).json()["kept"] == 1


def test_a_value_is_gone_with_its_time(front: Front) -> None:
    made = guarded(front, audience="brief", text="Blue Heron", conversation="b").json()["text"]

    def gone() -> bool:
        return bool(restored(front, "desk", conversation="b", text=made).json()["kept"] == 1)

    wait_for(gone)


def test_an_altered_or_moved_row_gives_nothing_back(front: Front) -> None:
    for name in ("Ada Long", "Bob Short"):
        guarded(front, audience="billing", secrets=[name], conversation="m", text=name)
    made = guarded(front, audience="billing", secrets=[NAME], conversation="m", text=NAME).json()[
        "text"
    ]
    path = front.site.folder / "lcguard.sqlite"
    with closing(sqlite3.connect(path, timeout=30)) as connection:
        found = connection.execute("SELECT name, sealed FROM originals").fetchall()
        other = next(sealed for name, sealed in found if name not in made)
        mine = next(name for name, _ in found if name in made)
        connection.execute("UPDATE originals SET sealed = ? WHERE name = ?", (other, mine))
        connection.commit()
    assert restored(front, "desk", conversation="m", text=made).json()["text"] == made


def test_a_policy_that_entitles_no_more_gives_nothing_back(front: Front) -> None:
    told = {"audience": "billing", "secrets": [NAME], "conversation": "old"}
    made = guarded(front, text=NAME, **told).json()["text"]
    changed = json.loads(json.dumps(POLICY))
    changed["edges"][0]["restore"] = ["intake"]
    rewrite(front.site.policy, changed)

    def now() -> bool:
        return bool(restored(front, "desk", conversation="old", text=made).json().get("kept") == 1)

    try:
        wait_for(now)
        assert restored(front, "intake", conversation="old", text=made).json()["text"] == NAME
    finally:
        rewrite(front.site.policy, POLICY)
        wait_for(lambda: restored(front, "desk", conversation="old", text=made).json()["restored"])


def client(front: Front, agent: str) -> dict[str, Any]:
    key = front.auth(agent)["Authorization"].removeprefix("Bearer ")
    return {"base_url": f"{front.url}/v1", "api_key": key, "max_retries": 0}


def test_the_python_client(front: Front) -> None:
    told: dict[str, Any] = {"secrets": [NAME, SSN], "conversation": "py"}
    with Client(**client(front, "intake")) as intake, Client(**client(front, "desk")) as desk:
        made = intake.guard_text(NOTE, "billing", **told)
        assert made.hidden == {"NUMBER": 1, "PROJECT": 1, "TEXT": 1}
        assert desk.restore_text(made.value, conversation="py").value == NOTE
        chat = [{"role": "user", "content": NOTE}]
        got = intake.guard_text(chat, "billing", form="messages", **told).value
        assert got == [{"role": "user", "content": made.value}]
        with pytest.raises(PermissionDeniedError, match="takes KV alone"):
            intake.guard_text(NOTE, "archive", secrets=[])

    async def use() -> None:
        async with AsyncClient(**client(front, "intake")) as intake:
            other = await intake.guard_text({"note": NOTE}, "billing", **told)
            back = await intake.restore_text(other.value, conversation="py")
        assert other.value == {"note": made.value}
        assert (back.value, back.restored, back.kept) == ({"note": NOTE}, 3, 0)

    asyncio.run(use())


def test_engine_and_canaries_try_edges_of_kv_alone() -> None:
    """There is no KV on the others to guard, or to attack."""
    found = list(edges_by_guard(parse_policy(POLICY)))
    assert found
    assert all(edge.channel == "kv" for edge in found)
    everything = [_text("*", "*", ["person"])]
    assert not list(edges_by_guard(parse_policy({"version": 1, "edges": everything})))


def test_the_openapi_document_has_the_routes(front: Front) -> None:
    paths = front.http.get("/openapi.json").json()["paths"]
    assert {"/lcguard/v1/text", "/lcguard/v1/text/restore"} <= set(paths)


def test_an_older_database_gets_the_table(tmp_path: Path) -> None:
    from lcguard.server.database import schema
    from lcguard.server.database.sqlite_file import SQLITE

    with closing(sqlite3.connect(tmp_path / "old.sqlite")) as connection:
        schema.prepare(connection, SQLITE)
        for table in ("originals", "edges", "accounts"):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("PRAGMA user_version = 2")
        schema.prepare(connection, SQLITE)
        assert connection.execute("SELECT count(*) FROM originals").fetchone() == (0,)
