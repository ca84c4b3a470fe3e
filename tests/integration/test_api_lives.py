"""The life of sessions over HTTP: archive, restore, export, delete, times to live."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from longshift.aging import Aging
from longshift.artifacts import object_key
from longshift.client import Client
from longshift.clock import SYSTEM, Clock
from longshift.config import Config
from longshift.db import checkpoints, deletions, keys
from longshift.db.keys import Scope
from longshift.errors import ArtifactCorrupt, InvalidInput, NotFound, Unavailable
from longshift.events import Context
from longshift.model import Kept, Prefix, new_id, parse_id
from longshift.removal import Removal
from longshift.transport import Check
from longshift_api.schemas import DeletedView, MovedView, SessionView
from tests.support.api import KEY, Api, Hand

TABLES = (
    *("events", "checkpoints", "passages", "mail", "approvals", "tool_calls", "archives", "session_details", "turns"),
    "artifact_refs",
)


async def used(api: Api, session: str, *, steps: int = 2) -> str:
    """One more turn of ``session``, run to its end."""
    turn = (await api.submit(f"/v1/sessions/{session}/turns"))["id"]
    hand = Hand(api, session)
    await hand.take()
    await hand.start(turn)
    for number in range(steps):
        await hand.append(turn, {"name": "step", "result": {"b": number, "a": "é"}}, key=f"step#{number}")
    await hand.succeed(turn, "done")
    return str(turn)


async def exported(api: Api, session: str) -> list[dict[str, Any]]:
    """The export of a session, checked."""
    async with Client(api.url, KEY) as client:
        return [json.loads(line) async for _, line in client.export(session)]


async def test_an_export_is_the_same_wherever_the_log_is(api: Api) -> None:
    session = await api.session()
    hand_turn = await used(api, session)
    await api.edge.cold.put(
        b"x",
        tenant_id=await tenant(api),
        name="x",
        content_type="text/plain",
        session_id=parse_id(Prefix.SESSION, session),
    )
    before = await exported(api, session)
    assert [line["type"] for line in before] == ["session", "turn", *["event"] * 4, "artifact", "end"]
    assert before[1]["id"] == hand_turn

    for move in ("archive", "archive", "restore", "archive"):
        moved = await api.client.post(f"/v1/sessions/{session}/{move}")
        MovedView.model_validate(moved.json(), extra="forbid")
        assert await exported(api, session) == before
    await used(api, session)
    more = await exported(api, session)
    assert [line for line in more if line["type"] == "event"][:4] == before[2:6]
    await api.client.post(f"/v1/sessions/{session}/archive")
    assert (await api.client.get(f"/v1/sessions/{session}")).json()["archived_through"] == 8
    assert await exported(api, session) == more
    restored = (await api.client.post(f"/v1/sessions/{session}/restore")).json()
    assert (restored["events"], restored["archived_through"]) == (8, 0)
    assert await exported(api, session) == more


async def test_an_export_that_is_cut_off_or_changed_is_noticed(api: Api) -> None:
    session = await api.session()
    await used(api, session)
    whole = (await api.client.get(f"/v1/sessions/{session}/export")).content.splitlines(keepends=True)
    check = Check()
    for line in whole[:-1]:
        check.add(line)
    assert [check.add(whole[-1]), check.whole] == ["end", True]

    other = Check()
    other.add(whole[0])
    with pytest.raises(InvalidInput, match="hash"):
        other.add(whole[-1])


async def test_archived_bytes_that_are_wrong_cut_an_export_and_are_named(api: Api) -> None:
    session = await api.session()
    await used(api, session)
    await api.client.post(f"/v1/sessions/{session}/archive")
    await spoil(api, "events-1-4.jsonl.gz")

    answer = await api.client.get(f"/v1/sessions/{session}/events")
    assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (500, "artifact_corrupt", False)
    with pytest.raises(Unavailable):
        await exported(api, session)
    assert (await api.client.post(f"/v1/sessions/{session}/restore")).json()["code"] == ArtifactCorrupt.code
    await used(api, session)  # it works all the same


async def test_a_deleted_session_leaves_nothing_but_its_tombstone_and_says_what_it_was(api: Api) -> None:
    session = (await api.client.post("/v1/sessions", json={"metadata": {"a": "b"}, "ttl": 3600})).json()["id"]
    session_id, tenant_id = parse_id(Prefix.SESSION, session), await tenant(api)
    await used(api, session)
    await api.client.post(f"/v1/sessions/{session}/archive")
    turn = (await api.submit(f"/v1/sessions/{session}/turns"))["id"]
    hand = Hand(api, session)
    await hand.take()
    await hand.start(turn)
    await hand.call(turn)
    await hand.ask(turn)
    await checkpoints.save(api.db, hand._claim, Context(4, new_id()))
    await hand.succeed(turn)
    await api.client.post(f"/v1/sessions/{session}/signals", json={"name": "late"})
    for ordinal in (0, 1):
        await passage(api, session, ordinal)
    await api.edge.cold.put(b"own", tenant_id=tenant_id, name="o", content_type="text/plain", session_id=session_id)
    context = Context(6, new_id())
    key = tenant_id, session_id
    assert await api.edge.hot.contexts.store(key, context, epoch=hand._claim.epoch, kept=Kept())

    answer = await api.client.delete(f"/v1/sessions/{session}")

    removed = DeletedView.model_validate(answer.json(), extra="forbid")
    assert (removed.turns, removed.events, removed.tool_calls, removed.approvals, removed.passages) == (2, 6, 1, 1, 2)
    assert (removed.mail, removed.checkpoints, removed.artifacts, removed.blobs) == (1, 1, 4, 4)
    assert removed.bytes > 300
    assert removed.complete
    for table in (*TABLES, "artifacts", "blobs"):
        assert (await api.db.fetch(text(f"SELECT count(*) AS n FROM {table}")))[0].n == 0, table
    assert not await api.edge.hot.contexts.store(key, context, epoch=hand._claim.epoch, kept=Kept())
    for path in (f"/v1/sessions/{session}", f"/v1/turns/{turn}", f"/v1/sessions/{session}/export"):
        assert (await api.client.get(path)).status_code == 404
    assert (await api.client.delete(f"/v1/sessions/{session}")).status_code == 404
    assert (await api.client.post("/v1/sessions", json={"id": session})).status_code == 404
    submitted = await api.client.post(f"/v1/sessions/{session}/turns", json={"agent": "echo", "input": {"text": "x"}})
    assert submitted.status_code == 404


async def test_what_is_written_while_a_session_is_deleted_is_removed_by_the_sweeper(api: Api) -> None:
    session = await api.session()
    await used(api, session)
    await api.client.delete(f"/v1/sessions/{session}")
    await passage(api, session)
    aging = aging_of(api)

    await aging.look()
    assert (await api.db.fetch(text("SELECT count(*) AS n FROM passages")))[0].n == 1  # its time has not come
    await api.db.execute(text("UPDATE sessions SET purge_at = clock_timestamp() - interval '1 second'"))
    await aging.look()

    assert (await api.db.fetch(text("SELECT count(*) AS n FROM passages")))[0].n == 0
    assert (await api.db.fetch(text("SELECT purge_at FROM sessions")))[0].purge_at is None


async def test_a_session_in_use_is_neither_archived_nor_deleted(api: Api) -> None:
    session = await api.session()
    turn = (await api.submit(f"/v1/sessions/{session}/turns"))["id"]

    for answer in (
        await api.client.post(f"/v1/sessions/{session}/archive"),
        await api.client.delete(f"/v1/sessions/{session}"),
    ):
        assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (409, "in_use", True)

    later = await api.client.post(
        "/v1/turns", json={"agent": "echo", "input": {"text": "x"}, "run_after": "2099-01-01T00:00:00Z"}
    )
    scheduled = later.json()["session_id"]
    assert (await api.client.delete(f"/v1/sessions/{scheduled}")).status_code == 409
    assert (await api.client.post(f"/v1/turns/{turn}/cancel")).status_code == 200
    assert (await api.client.delete(f"/v1/sessions/{session}")).status_code == 200


async def test_sessions_of_others_and_keys_without_the_scope_are_refused(api: Api) -> None:
    session = await api.session()
    other = await api.key()
    submitter = await api.key(tenant="default", scopes=frozenset({Scope.SUBMIT, Scope.READ}))
    path = f"/v1/sessions/{session}"

    async def statuses(headers: dict[str, str]) -> list[int]:
        asked = [api.client.post(f"{path}/{verb}", headers=headers) for verb in ("archive", "restore")]
        asked += [api.client.delete(path, headers=headers), api.client.get(f"{path}/export", headers=headers)]
        return [(await answer).status_code for answer in asked]

    assert await statuses(other) == [404, 404, 404, 404]
    assert await statuses(submitter) == [403, 403, 403, 200]


async def test_turns_of_a_batch_stay_in_it_emptied(api: Api) -> None:
    lines = [{"agent": "echo", "input": {"text": "secret"}, "metadata": {"who": "me"}}] * 2
    body = "\n".join(json.dumps(line) for line in lines)
    batch = (await api.client.post("/v1/batches", content=body, headers={"Content-Type": "application/jsonl"})).json()
    turns = (await api.client.get(f"/v1/turns?batch_id={batch['id']}")).json()["data"]
    for turn in turns:
        await Hand(api, turn["session_id"]).run(turn["id"], "secret answer")

    removed = (await api.client.delete(f"/v1/sessions/{turns[0]['session_id']}")).json()

    assert removed["turns"] == 1
    assert (await api.client.get(f"/v1/batches/{batch['id']}")).json()["counts"]["succeeded"] == 2
    emptied = (await api.client.get(f"/v1/turns/{turns[0]['id']}")).json()
    assert (emptied["input"], emptied["output"], emptied["metadata"]) == (None, None, {})


async def test_a_session_expires_after_its_last_activity_and_not_before(api: Api) -> None:
    quiet, lively = [(await api.client.post("/v1/sessions", json={"ttl": 60})).json()["id"] for _ in range(2)]
    kept = await api.session()
    for session in (quiet, lively, kept):
        await used(api, session)
    long_ago = "clock_timestamp() - interval '1 hour'"
    await api.db.execute(text(f"UPDATE sessions SET expires_at = {long_ago} WHERE expires_at IS NOT NULL"))
    await api.db.execute(
        text(f"UPDATE sessions SET created_at = {long_ago}, leased_at = {long_ago} WHERE id = :id"),
        {"id": parse_id(Prefix.SESSION, quiet)},
    )
    await api.db.execute(
        text(f"UPDATE turns SET ended_at = {long_ago} WHERE session_id = :id"), {"id": parse_id(Prefix.SESSION, quiet)}
    )

    await aging_of(api).look()

    found = [(await api.client.get(f"/v1/sessions/{session}")).status_code for session in (quiet, lively, kept)]
    assert found == [404, 200, 200]
    again = SessionView.model_validate((await api.client.get(f"/v1/sessions/{lively}")).json())
    assert again.expires_at is not None
    assert again.expires_at > again.active_at + timedelta(seconds=59)


async def test_a_time_to_live_is_changed_and_taken_back(api: Api) -> None:
    session = await api.session()
    path = f"/v1/sessions/{session}"

    changed = (await api.client.patch(path, json={"ttl": 90, "metadata": {"a": "1"}})).json()
    assert (changed["ttl"], changed["metadata"], changed["expires_at"] is None) == (90, {"a": "1"}, False)
    kept = (await api.client.patch(path, json={"metadata": {"b": "2"}})).json()
    assert (kept["ttl"], kept["metadata"]) == (90, {"b": "2"})
    back = (await api.client.patch(path, json={"ttl": None})).json()
    assert (back["ttl"], back["expires_at"], back["metadata"]) == (None, None, {"b": "2"})
    for none in (0, True, "90"):
        assert (await api.client.patch(path, json={"ttl": none})).status_code == 422
    assert (await api.client.patch(path, json={"ttl": 5}, headers=await api.key())).status_code == 404


async def test_a_time_to_live_is_changed_by_those_only_who_may_delete(api: Api) -> None:
    path = f"/v1/sessions/{await api.session()}"
    submitter = await api.key(tenant="default", scopes=frozenset({Scope.SUBMIT, Scope.READ}))

    for ttl in (1, None):
        refused = await api.client.patch(path, json={"ttl": ttl, "metadata": {"a": "1"}}, headers=submitter)
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert "'admin'" in refused.json()["detail"]
    allowed = await api.client.patch(path, json={"metadata": {"b": "2"}}, headers=submitter)

    assert (allowed.status_code, allowed.json()["metadata"], allowed.json()["ttl"]) == (200, {"b": "2"}, None)


async def test_the_fleets_time_to_live_holds_for_sessions_that_name_none(api: Api) -> None:
    submitted = (await api.submit())["session_id"]
    await Hand(api, submitted).run((await api.client.get(f"/v1/turns?session_id={submitted}")).json()["data"][0]["id"])
    minutes_ago = "clock_timestamp() - interval '10 minutes'"
    await api.db.execute(text(f"UPDATE sessions SET created_at = {minutes_ago}, leased_at = {minutes_ago}"))
    await api.db.execute(text(f"UPDATE turns SET ended_at = {minutes_ago}"))
    in_a_while = Clock(now=lambda: SYSTEM.now() + timedelta(minutes=2))

    await aging_of(api, clock=in_a_while, session_ttl=timedelta(minutes=5)).look()

    assert (await api.client.get(f"/v1/sessions/{submitted}")).status_code == 404


async def test_idle_sessions_are_archived_by_the_sweeper_and_those_that_cannot_be_are_left_alone(api: Api) -> None:
    idle, broken, busy = [await api.session() for _ in range(3)]
    for session in (idle, broken, busy):
        await used(api, session)
    await api.submit(f"/v1/sessions/{busy}/turns")
    await api.db.execute(
        text("DELETE FROM events WHERE session_id = :id AND seq = 2"), {"id": parse_id(Prefix.SESSION, broken)}
    )
    await api.db.execute(text("UPDATE sessions SET idle_since = idle_since - interval '2 days'"))
    aging = aging_of(api, archive_after=timedelta(days=1))

    assert not await aging.look()

    async def through(session: str) -> int:
        return int((await api.client.get(f"/v1/sessions/{session}")).json()["archived_through"])

    assert [await through(session) for session in (idle, broken, busy)] == [4, 0, 0]
    left = await api.db.fetch(text("SELECT count(*) AS n FROM sessions WHERE idle_since IS NOT NULL"))
    assert left[0].n == 1  # the busy one


async def test_a_tenant_is_deleted_with_all_that_it_has(api: Api) -> None:
    headers = await api.key(tenant="guest")
    tenant_id = await keys.find_tenant(api.db, "guest")
    turn = (await api.client.post("/v1/turns", json={"agent": "echo", "input": {"text": "x"}}, headers=headers)).json()
    await Hand(api, turn["session_id"]).run(turn["id"])
    await api.client.post("/v1/artifacts?name=x", content=b"x", headers=headers)
    waiting = (
        await api.client.post("/v1/turns", json={"agent": "echo", "input": {"text": "x"}}, headers=headers)
    ).json()
    kept = await api.session()
    removal = Removal(api.db, api.edge.cold, api.edge.lifecycle, api.edge.mailbox, known_for=timedelta(0))
    with pytest.raises(NotFound):
        await removal.delete("nobody")
    with pytest.raises(Exception, match="open turns"):
        await removal.delete("guest")
    assert (await api.client.get(f"/v1/turns/{waiting['id']}", headers=headers)).status_code == 200

    removed = await removal.delete("guest", cancel=True)

    assert (removed.sessions, removed.turns, removed.artifacts, removed.keys) == (2, 2, 1, 1)
    for table in ("turns", "artifacts", "blobs", "api_keys", "batches", "idempotency"):
        found = await api.db.fetch(text(f"SELECT count(*) AS n FROM {table} WHERE tenant_id = :id"), {"id": tenant_id})
        assert found[0].n == 0, table
    assert [t.name for t in await deletions.tenants(api.db)] == ["default"]
    assert (await api.client.get(f"/v1/sessions/{kept}")).status_code == 200


async def tenant(api: Api) -> Any:
    return await keys.find_tenant(api.db, "default")


async def passage(api: Api, session: str, ordinal: int = 0) -> None:
    """As somebody writes it who has been paused since the session was theirs."""
    row = {"tenant": await tenant(api), "session": parse_id(Prefix.SESSION, session), "ordinal": ordinal}
    await api.db.execute(
        text(
            "INSERT INTO passages (tenant_id, session_id, source, ordinal, text)"
            " VALUES (:tenant, :session, 'notes', :ordinal, 'one')"
        ),
        row,
    )


async def spoil(api: Api, name: str) -> None:
    rows = await api.db.fetch(
        text(
            "SELECT a.tenant_id, a.sha256, b.generation FROM artifacts a JOIN blobs b USING (tenant_id, sha256) WHERE name = :n"
        ),
        {"n": name},
    )
    key = object_key(rows[0].tenant_id, rows[0].sha256, rows[0].generation)
    await api.edge.cold.store.put(key, b"rotten", content_type="text/plain")


def aging_of(api: Api, *, clock: Clock = SYSTEM, **settings: Any) -> Aging:
    return Aging(api.db, api.edge.lifecycle, leads=lambda: True, config=Config(**settings), clock=clock)
