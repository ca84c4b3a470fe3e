"""Who is declared dead, and what happens to what they held."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Row, text

from longshift.db import leases, log, upkeep
from longshift.db.database import Database
from longshift.db.liveness import HEARTBEAT, Liveness, Member, Pulse
from longshift.model import new_id
from longshift.testing.waiting import wait_until
from tests.integration.protocol.stage import Stage, append

LONG_AGO = datetime.fromisoformat("2001-01-01T00:00:00+00:00")
TTL = timedelta(seconds=15)
ALIVE = {
    "running": 0,
    "loop_age": timedelta(0),
    "draining": False,
    "want_leader": False,
    "leader": 0,
    "watching_since": None,
    "condition": None,
    "complaint": None,
    "stuck_after": TTL,
}

# What the design forbids: deciding by the absence of a live worker, in a statement that waits for the row.
ANTI_JOIN = text("""
UPDATE sessions s SET lease_worker = NULL FROM (
    SELECT s.id FROM sessions s LEFT JOIN workers w ON w.id = s.lease_worker AND w.dead_at IS NULL
     WHERE s.lease_worker IS NOT NULL AND w.id IS NULL FOR UPDATE OF s) v WHERE v.id = s.id RETURNING s.id""")


def verdict(*, ttl: timedelta = TTL, grace: timedelta = TTL, since: datetime = LONG_AGO) -> upkeep.Verdict:
    return upkeep.Verdict(ttl=ttl, lock_grace=grace, trusted_since=since)


async def server_looks_old(stage: Stage) -> None:
    """The server of a test run may be younger than a TTL, which would excuse every silence."""
    await stage.hand.execute(
        "CREATE FUNCTION public.pg_postmaster_start_time() RETURNS timestamptz LANGUAGE sql"
        " AS $$ SELECT timestamptz '2001-01-01' $$"
    )
    await stage.hand.execute(
        "DO $$ BEGIN"
        " EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database()); END $$"
    )
    await stage.db.engine.dispose()


async def test_leases_of_a_dead_worker_are_released_under_a_new_epoch_and_rung(stage: Stage) -> None:
    claim, turn = await stage.running()
    await stage.kill(claim.worker_id)

    assert await upkeep.rescue(stage.db) == (1, [(claim.session_id, "default")])

    row = await stage.row(claim.session_id)
    assert (row["lease_worker"], row["ready"]) == (None, True)
    assert row["lease_epoch"] > claim.epoch
    assert (await stage.turn(turn))["status"] == "queued"
    assert await upkeep.rescue(stage.db) == (0, [])


async def test_a_rescue_spares_a_lease_that_a_live_worker_took_meanwhile(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, _ = await stage.running()
    await stage.kill(dead.worker_id)
    live = await stage.worker()

    take_away = upkeep.take_away

    async def a_live_worker_takes_it(db: Database, workers: Sequence[UUID], *, limit: int) -> Sequence[Row[Any]]:
        await stage.hand.execute(
            "UPDATE sessions SET lease_worker = NULL, ready_at = now() WHERE id = %s", (dead.session_id,)
        )
        await stage.claim(dead.session_id, live)
        return await take_away(db, workers, limit=limit)

    monkeypatch.setattr(upkeep, "take_away", a_live_worker_takes_it)

    assert await upkeep.rescue(stage.db) == (0, [])
    assert (await stage.row(dead.session_id))["lease_worker"] == live


async def test_an_anti_join_on_live_workers_would_release_a_live_lease(stage: Stage) -> None:
    """The ablation: the re-checked row keeps the old join result, 'no live worker'."""
    dead, _ = await stage.running()
    await stage.kill(dead.worker_id)
    live = await stage.worker()
    async with stage.locked(dead.session_id) as claiming:
        rescuing = stage.begin(stage.db.fetch(ANTI_JOIN))
        await stage.until_blocked()
        await claiming.execute("UPDATE sessions SET lease_worker = %s WHERE id = %s", (live, dead.session_id))

    assert len(await rescuing) == 1
    assert (await stage.row(dead.session_id))["lease_worker"] is None


async def test_a_claim_that_commits_after_its_worker_was_buried_is_found_by_the_next_pass(stage: Stage) -> None:
    session, _ = await stage.submit()
    worker = await stage.worker(heartbeat_age=60)
    await server_looks_old(stage)
    async with stage.db.transaction() as late:
        await late.execute(leases.CLAIM, {"sessions": [session], "worker": worker})
        assert await upkeep.tombstone(stage.db, verdict()) == [worker]
        assert await upkeep.rescue(stage.db) == (0, []), "a one-shot rescue would have been this one"

    assert await upkeep.tombstone(stage.db, verdict()) == []
    assert await upkeep.rescue(stage.db) == (1, [(session, "default")])


async def test_a_rescue_skips_a_locked_session_and_takes_the_others(stage: Stage) -> None:
    worker = await stage.worker()
    (first, _), (second, _) = await stage.running(worker), await stage.running(worker)
    await stage.kill(worker)
    async with stage.locked(first.session_id):
        assert await upkeep.rescue(stage.db) == (1, [(second.session_id, "default")])

    assert (await upkeep.rescue(stage.db))[0] == 1


async def test_a_late_heartbeat_beats_the_tombstone_that_waits_for_it(stage: Stage) -> None:
    worker = await stage.worker(heartbeat_age=60)
    await server_looks_old(stage)
    async with stage.db.transaction() as heartbeat:
        await heartbeat.execute(HEARTBEAT, ALIVE | {"id": worker})
        judging = stage.begin(upkeep.tombstone(stage.db, verdict()))
        await stage.until_blocked()

    assert await judging == []


async def test_a_heartbeat_after_the_tombstone_writes_nothing(stage: Stage) -> None:
    worker = await stage.worker(heartbeat_age=60)
    await server_looks_old(stage)
    assert await upkeep.tombstone(stage.db, verdict()) == [worker]

    assert await stage.db.fetch(HEARTBEAT, ALIVE | {"id": worker}) == []


async def test_silence_counts_from_the_latest_of_heartbeat_server_start_and_the_sweepers_connection(
    stage: Stage,
) -> None:
    """An outage of the database or of the sweeper is nobody's death."""
    worker = await stage.worker(heartbeat_age=3600)
    now = (await stage.one("SELECT clock_timestamp() AS now"))["now"]
    started = (await stage.one("SELECT pg_postmaster_start_time() AS at"))["at"]
    day = timedelta(days=1)

    assert await upkeep.tombstone(stage.db, verdict(ttl=now - started + day)) == []
    await server_looks_old(stage)
    assert await upkeep.tombstone(stage.db, verdict(since=now)) == []
    assert await upkeep.tombstone(stage.db, verdict()) == [worker]


async def lock_of(stage: Stage, key: int) -> list[Any]:
    query = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND (classid::bigint << 32 | objid::bigint) = %s"
    return await (await stage.hand.execute(query, (key,))).fetchall()


async def test_a_missing_lock_shortens_the_wait_and_looking_for_it_does_not_disturb_the_owner(stage: Stage) -> None:
    await server_looks_old(stage)
    liveness = Liveness(stage.url)
    worker, grace = new_id(), timedelta(seconds=3)
    liveness.register(worker, Member(host="here", pid=1, queues=["default"], capacity=1, process=new_id()))
    key = liveness.lock_key
    await stage.hand.execute("UPDATE workers SET heartbeat_at = clock_timestamp() - interval '5 seconds'")

    async with stage.db.transaction() as sweeper:
        params = {"as_of": None, "ttl": TTL, "grace": grace, "trusted_since": LONG_AGO}
        assert (await sweeper.execute(upkeep.TOMBSTONE, params)).all() == [], "the lock is there"
        liveness.disconnect()
        await until_gone(stage, key)
        assert await _taken(stage, key), "a probe by trying would refuse the lock to its owner now"
    assert await upkeep.tombstone(stage.db, verdict(grace=grace, since=(await _now(stage)) - grace)) == []
    assert await upkeep.tombstone(stage.db, verdict(grace=grace)) == [worker]

    assert liveness.beat(worker, Pulse(0, timedelta(0), draining=False), want_leader=False) is None
    liveness.close()


@pytest.mark.parametrize(
    ("beats", "believed"),
    [
        ([(30, 0)], True),  # one worker, up for more than a TTL
        ([(30, 9), (10, 5), (6, 0)], True),  # one after the other; those before may be dead by now
        ([(30, 9), (6, 0)], False),  # for three seconds nobody was heard: it may have been the network of all
        ([(30, 6), (5.9, 0)], False),  # all have connected anew, and some may not have come to it yet
        ([(10, 0)], False),  # nobody can say what was before
        ([(30, 5)], False),  # nobody can say what is now
    ],
)
async def test_a_young_sweeper_believes_a_missing_lock_if_somebody_has_beaten_all_the_time(
    stage: Stage, beats: list[tuple[float, float]], *, believed: bool
) -> None:
    await server_looks_old(stage)
    silent = await stage.worker(heartbeat_age=4, lock_key=12345)
    for since, last in beats:
        other = await stage.worker(heartbeat_age=last)
        await stage.hand.execute(
            "UPDATE workers SET watching_since = clock_timestamp() - make_interval(secs => %s),"
            " dead_at = CASE WHEN %s > 1 THEN clock_timestamp() END WHERE id = %s",
            (since, last, other),
        )
    now = await _now(stage)

    dead = await upkeep.tombstone(stage.db, verdict(grace=timedelta(seconds=3), since=now))
    assert dead == ([silent] if believed else [])


async def until_gone(stage: Stage, key: int) -> None:
    async def gone() -> bool:
        return not await lock_of(stage, key)

    _: bool = await wait_until(gone, description="the lock is released with its connection")


async def _taken(stage: Stage, key: int) -> bool:
    taken = await stage.one("SELECT pg_try_advisory_lock(%s) AS taken", key)
    await stage.hand.execute("SELECT pg_advisory_unlock(%s)", (key,))
    return bool(taken["taken"])


async def _now(stage: Stage) -> datetime:
    now: datetime = (await stage.one("SELECT clock_timestamp() AS now"))["now"]
    return now


async def test_a_worker_that_reconnects_brings_a_new_lock_and_is_not_judged_by_the_old_one(stage: Stage) -> None:
    await server_looks_old(stage)
    liveness = Liveness(stage.url)
    worker = new_id()
    liveness.register(worker, Member(host="here", pid=1, queues=["default"], capacity=1, process=new_id()))
    first = liveness.lock_key
    liveness.disconnect()
    assert liveness.beat(worker, Pulse(0, timedelta(0), draining=False), want_leader=False) is not None
    await stage.hand.execute("UPDATE workers SET heartbeat_at = clock_timestamp() - interval '5 seconds'")

    assert liveness.lock_key != first
    assert await upkeep.tombstone(stage.db, verdict(grace=timedelta(seconds=3))) == []
    liveness.close()


async def test_tombstones_are_forgotten_only_when_nothing_is_held_under_them(stage: Stage) -> None:
    claim, turn = await stage.running()
    await stage.kill(claim.worker_id)
    now = timedelta(0)

    assert await upkeep.forget(stage.db, keys_after=now, workers_after=now) == 0
    await upkeep.rescue(stage.db)
    assert await upkeep.forget(stage.db, keys_after=now, workers_after=now) == 1

    assert await log.append(stage.db, [append(claim, turn, "late", seq=2)]) == {}
    assert await leases.claim(stage.db, [claim.session_id], worker_id=claim.worker_id) == []


async def test_the_sweeper_rings_what_was_never_rung_or_long_ago_and_only_that(stage: Stage) -> None:
    (fresh, _), (old, _), (lost, _) = await stage.submit(), await stage.submit(), await stage.submit()
    claim, _ = await stage.running()
    await stage.hand.execute("UPDATE sessions SET dispatched_at = now() - interval '1 minute' WHERE id = %s", (old,))
    await stage.hand.execute("UPDATE sessions SET dispatched_at = NULL WHERE id = %s", (lost,))

    rung = await upkeep.undispatched(stage.db, queue="default", patience=timedelta(seconds=30), limit=10)

    assert set(rung) == {old, lost}
    assert fresh not in rung
    assert claim.session_id not in rung
    assert await upkeep.undispatched(stage.db, queue="default", patience=timedelta(seconds=30), limit=10) == []


async def test_a_verdict_that_a_server_which_hung_carries_out_late_is_none(stage: Stage) -> None:
    """To a statement that was sent before the server hung, everybody has been silent ever since."""
    await server_looks_old(stage)
    silent = await stage.worker(heartbeat_age=3600)
    now = (await stage.one("SELECT clock_timestamp() AS now"))["now"]
    late = upkeep.Verdict(TTL, TTL, LONG_AGO, as_of=now - 2 * TTL)
    assert await upkeep.tombstone(stage.db, late) == []
    assert await upkeep.tombstone(stage.db, upkeep.Verdict(TTL, TTL, LONG_AGO, as_of=now)) == [silent]
