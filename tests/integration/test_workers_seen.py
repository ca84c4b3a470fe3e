"""Workers as operators see them (`longshift fleet`), and as clients do (`GET /v1/workers`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import text

from longshift.client import Client
from longshift.db import leases, workers
from longshift.db.liveness import LEADER, Liveness, Member, Pulse
from longshift.db.revision import newest
from longshift.model import Prefix, new_id, parse_id, show_id
from longshift.testing.waiting import wait_until
from tests.support.api import ECHO, KEY, Api, Hand
from tests.support.local_stack import Said, call_inline

Run = Callable[..., Coroutine[Any, Any, Said]]
WORKER = text("""
INSERT INTO workers (id, host, pid, queues, capacity, process, isolated, revision, version, serves, condition, complaint,
                     heartbeat_at, lock_key)
VALUES (:id, :host, :pid, '{default}', 10, :process, :isolated, :revision, '1.2', CAST(:serves AS jsonb), :condition,
        :complaint, clock_timestamp() - make_interval(secs => :silence), :lock_key)""")


@pytest.fixture
def run(tmp_path: Path, database_url: str) -> Run:
    """Runs a command in a thread, while the test goes on."""

    async def running(*arguments: str) -> Said:
        return await asyncio.to_thread(call_inline, *arguments, folder=tmp_path, database_url=database_url)

    return running


async def worker(api: Api, host: str = "here", pid: int = 1, **fields: object) -> tuple[UUID, UUID]:
    """A worker's row: its id and its process."""
    row: dict[str, object] = {
        "id": new_id(),
        "host": host,
        "pid": pid,
        "process": new_id(),
        "isolated": False,
        "revision": newest(),
        "serves": '[["echo", "1"]]',
        "condition": "ok",
        "complaint": None,
        "silence": 0,
        "lock_key": None,
    }
    row |= fields
    await api.db.execute(WORKER, row)
    id_, process = row["id"], row["process"]
    assert isinstance(id_, UUID)
    assert isinstance(process, UUID)
    return id_, process


async def asked(api: Api) -> set[UUID]:
    """The processes that were asked to drain."""
    found = await api.db.fetch(text("SELECT process FROM workers WHERE drain_asked_at IS NOT NULL"))
    return {row.process for row in found}


async def bury(api: Api) -> None:
    await api.db.execute(text("UPDATE workers SET dead_at = clock_timestamp()"))


async def test_the_workers_are_listed_with_what_they_say_of_themselves(api: Api, run: Run, database_url: str) -> None:
    leader, _ = await worker(api, "a", lock_key=4711)
    await worker(api, "b", 2, condition="stuck", complaint="it takes no work", isolated=True)
    await worker(api, "c", 3, revision=None, condition=None)
    await worker(api, "d", 4, silence=20)
    await worker(api, "e", 5, condition="asleep")  # of newer software
    with psycopg.connect(database_url) as beat:
        beat.execute("SELECT pg_advisory_lock(%s), pg_advisory_lock(4711)", (LEADER,))
        said = await run("fleet", "--json")
        shown = await run("fleet")

    flags = [(each["host"], each["state"], each["leader"], each["ward"]) for each in said.lines]
    assert flags == [
        ("a", "ok", True, False),
        ("b", "stuck", False, True),
        ("c", "-", False, False),
        ("d", "silent", False, False),
        ("e", "-", False, False),
    ]
    assert said.lines[0]["id"] == show_id(Prefix.WORKER, leader)
    assert said.lines[0]["agents"] == [{"name": "echo", "version": "1"}]
    assert "it takes no work" in shown.err
    assert "1.2" in shown.out
    states = [each["state"] for each in (await api.client.get("/v1/workers")).json()["data"]]
    assert states == ["ok", "stuck", "unknown", "unknown"]


async def test_a_client_sees_of_what_workers_run_its_own_turns_and_an_operator_all(api: Api, run: Run) -> None:
    turn = await api.submit()
    hand = Hand(api, turn["session_id"])
    await hand.take()
    await hand.start(turn["id"])
    await hand.append(turn["id"], {}, key="/read#0")
    await hand.call(turn["id"], "pay")
    async with Client(api.url, api_key=KEY) as client:
        (mine,) = await client.workers()
    (theirs,) = (await api.client.get("/v1/workers", headers=await api.key())).json()["data"]
    said = await run("fleet", "show", mine["id"], "--json")
    shown = await run("fleet", "show", "test:1")

    assert (mine["running"], [each["id"] for each in mine["turns"]]) == (1, [turn["id"]])
    assert (mine["turns"][0]["last"], mine["turns"][0]["attempts"]) == ("/read#0", 1)
    assert (theirs["running"], theirs["turns"], "host" in theirs) == (0, [], False)
    (running,) = said.json["turns"]
    assert (running["turn_id"], running["agent"], running["calling"]) == (turn["id"], "echo", "pay")
    assert turn["id"] in shown.out


async def test_a_worker_is_drained_by_its_id_or_its_place_and_all_with_their_wards(api: Api, run: Run) -> None:
    (first, one), (_, two) = await worker(api, "a", 1), await worker(api, "b", 2)
    _, ward = await worker(api, "b", 3, isolated=True)

    assert (await run("fleet", "drain", show_id(Prefix.WORKER, first))).code == 0
    assert await asked(api) == {one}
    assert (await run("fleet", "drain", "b")).code == 0  # its ward is no second one of that name
    assert await asked(api) == {one, two}
    said = await run("fleet", "drain", "--all", "--json")
    assert len(said.json["draining"]) == 3
    assert await asked(api) == {one, two, ward}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere",), 3, "there is no worker 'nowhere'"),
        (("twice",), 2, "several workers are on 'twice', say which: twice:1, twice:2"),
        (("old",), 2, "old:3: too old to hear of it; send a SIGTERM instead"),
        ((), 2, "name the workers to drain, or say --all"),
        (("twice:1", "--all"), 2, "name the workers to drain, or say --all"),
        (("twice:1", "--wait", "--timeout", "0"), 4, "1 workers still drain"),
    ],
)
async def test_a_drain_that_cannot_be_says_why(
    api: Api, run: Run, arguments: tuple[str, ...], code: int, message: str
) -> None:
    for host, pid, revision in (("twice", 1, newest()), ("twice", 2, newest()), ("old", 3, None)):
        await worker(api, host, pid, revision=revision)

    said = await run("fleet", "drain", *arguments)
    assert (said.code, message in said.err) == (code, True), said.err


async def test_waiting_for_a_drain_follows_a_worker_that_goes_on_under_a_new_id(api: Api, run: Run) -> None:
    _, process = await worker(api)
    waiting = asyncio.create_task(run("fleet", "drain", "here", "--wait"))

    async def told() -> bool:
        return process in await asked(api)

    await wait_until(told, description="it is asked")
    await worker(api, process=process)
    await api.db.execute(text("UPDATE workers SET dead_at = clock_timestamp() WHERE drain_asked_at IS NOT NULL"))

    async def told_again() -> bool:
        return (await workers.list_workers(api.db))[0].drain_asked_at is not None

    await wait_until(told_again, description="it is asked under its new id")
    assert not waiting.done()
    await bury(api)
    assert (await waiting).code == 0


async def test_a_drain_reaches_a_worker_that_was_declared_dead_just_then(api: Api, database_url: str) -> None:
    _, process = await worker(api)
    await bury(api)  # after the operator's look at the list
    await workers.ask_to_drain(api.db, [process])
    member = Member(host="here", pid=1, queues=["default"], capacity=10, process=process, revision=newest())
    reborn, liveness = new_id(), Liveness(database_url)
    try:
        await asyncio.to_thread(liveness.register, reborn, member)
        pulse = Pulse(running=0, loop_age=timedelta(0), draining=False)
        answer = await asyncio.to_thread(partial(liveness.beat, reborn, pulse, want_leader=False))
    finally:
        liveness.close()

    assert answer is not None
    assert answer.drain


async def test_another_worker_serves_an_agent_if_it_lives_and_stays(api: Api) -> None:
    me, _ = await worker(api)

    async def served(version: str | None = "2", queue: str = "default") -> bool:
        return await workers.serves(api.db, agent="echo", version=version, queue=queue, but=me)

    two = '[["other", "1"], ["echo", "2"]]'
    assert not await served("1")  # by myself
    await worker(api, serves=two, silence=16)
    await worker(api, serves=two, isolated=True)
    assert not await served()
    other, _ = await worker(api, serves=two)
    assert await served()
    assert await served(None)
    assert not await served(queue="elsewhere")
    await api.db.execute(
        text("UPDATE workers SET drain_asked_at = clock_timestamp() WHERE id = :id"),
        {"id": parse_id(Prefix.WORKER, other.hex)},
    )
    assert not await served()


async def test_of_several_versions_new_turns_get_the_newest_that_is_served(api: Api) -> None:
    async def newest_version() -> str:
        return str((await api.client.get("/v1/agents")).json()["data"][-1]["version"])

    await leases.serve(api.db, [replace(ECHO, version="2")])
    await leases.serve(api.db, [ECHO])  # a worker of the version before is started again
    assert await newest_version() == "2"
    await worker(api, serves='[["echo", "1"]]')
    assert await newest_version() == "1"  # the other one was rolled back
    await worker(api, serves='[["echo", "2"]]')
    assert await newest_version() == "2"


async def test_the_versions_of_agents_are_listed_with_the_open_turns_that_need_them(api: Api, run: Run) -> None:
    begun, _ = await api.submit(), await api.submit()
    await api.submit(run_after="2100-01-01T00:00:00Z", deadline="2101-01-01T00:00:00Z", agent_version="1")
    hand = Hand(api, begun["session_id"])
    await hand.take()
    await hand.start(begun["id"])
    await worker(api, serves='[["echo", "1"]]')
    await worker(api, serves='[["echo", "2"]]')

    said = await run("fleet", "versions", "--json")
    assert [(each["version"], each["turns"], each["workers"]) for each in said.lines] == [
        (None, 1, 0),
        ("1", 2, 1),
        ("2", 0, 1),
    ]
    assert "open turns" in (await run("fleet", "versions")).out
