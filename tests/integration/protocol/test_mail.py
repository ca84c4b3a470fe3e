"""Mail and what it may race with: no wake-up is lost, and a waiting session is woken by mail alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import pytest
from sqlalchemy import text

from longshift.clock import Clock
from longshift.db import leases, log, mail, upkeep
from longshift.model import Claim, MailKind, TurnStatus
from longshift.sweeper import Sweeper
from tests.integration.protocol.stage import Stage, finish, leave, start

NAIVE_LEAVE = text(log.LEAVE.text.replace("s.mail_seq <> r.seen OR", "false AND s.mail_seq <> r.seen OR"))


async def waiting(stage: Stage, until: datetime | None = None) -> tuple[Claim, UUID]:
    """A session whose head waits and that nobody holds."""
    claim, turn = await stage.running()
    await log.leave(stage.db, [leave(claim, turn, seq=2, seen=claim.mail_seq, until=until)])
    return claim, turn


async def test_mail_between_looking_and_suspending_makes_the_session_ready(stage: Stage) -> None:
    claim, turn = await stage.running()
    seen = await leases.mail_seq(stage.db, claim.session_id)
    await stage.signal(claim.session_id)  # after the worker looked
    write = leave(claim, turn, seq=2, seen=seen)

    assert (await log.leave(stage.db, [write]))[write.key] == log.Done(flag=True)

    assert (await stage.row(claim.session_id))["ready"]


async def test_a_suspend_that_does_not_compare_mail_loses_the_wake_up(stage: Stage) -> None:
    """The ablation of the test above."""
    claim, turn = await stage.running()
    await stage.signal(claim.session_id)
    write = leave(claim, turn, seq=2, seen=claim.mail_seq)
    columns = {"status": ["waiting"], "until": [None], "seen": [claim.mail_seq], "now": [None], "stops": [False]}

    await stage.db.fetch(NAIVE_LEAVE, log._run([write]) | columns)

    assert (await stage.row(claim.session_id))["ready_at"] is None


async def test_mail_that_commits_between_the_snapshot_of_a_suspend_and_its_lock_counts(stage: Stage) -> None:
    claim, turn = await stage.running()
    async with stage.slow() as slow:
        async with stage.stopped(log.leave(slow, [leave(claim, turn, seq=2, seen=claim.mail_seq)])) as leaving:
            await stage.signal(claim.session_id)
        assert (await leaving)[claim.session_id, claim.epoch].flag

    assert (await stage.row(claim.session_id))["ready"]


async def test_mail_that_waits_for_a_suspend_wakes_the_session(stage: Stage) -> None:
    claim, turn = await stage.running()
    async with stage.db.transaction() as leaving:
        columns = {"status": ["waiting"], "until": [None], "seen": [claim.mail_seq], "now": [None], "stops": [False]}
        await leaving.execute(log.LEAVE, log._run([leave(claim, turn, seq=2, seen=claim.mail_seq)]) | columns)
        signalling = stage.begin(stage.signal(claim.session_id))
        await stage.until_blocked()
    await signalling

    assert (await stage.row(claim.session_id))["ready"]


@pytest.mark.parametrize("until", [None, datetime(2999, 1, 1, tzinfo=UTC)])
async def test_a_new_turn_does_not_wake_a_session_whose_head_waits(stage: Stage, until: datetime | None) -> None:
    claim, _ = await waiting(stage, until)

    await stage.submit(claim.session_id)

    row = await stage.row(claim.session_id)
    assert (row["ready_at"], row["open_turns"]) == (until, 2)


@pytest.mark.parametrize("how", ["signal", "cancel"])
async def test_mail_wakes_a_session_whose_head_waits(stage: Stage, how: str) -> None:
    claim, turn = await waiting(stage)

    await (stage.signal(claim.session_id) if how == "signal" else stage.cancel(turn))

    won = await stage.claim(claim.session_id)
    assert won.turn is not None
    assert (won.turn.id, won.turn.status) == (turn, TurnStatus.WAITING)
    assert won.claim.mail_seq == claim.mail_seq + 1
    await log.start(stage.db, [start(won.claim, turn)])
    assert (await stage.turn(turn))["status"] == "running"


async def test_a_session_claimed_while_its_head_waits_can_be_lost_and_is_still_runnable(stage: Stage) -> None:
    """The claim clears ``head_waiting``; a worker that dies before its start must not leave the session asleep."""
    claim, turn = await waiting(stage)
    await stage.signal(claim.session_id)
    dead = (await stage.claim(claim.session_id)).claim
    await stage.kill(dead.worker_id)
    await upkeep.rescue(stage.db)

    assert (await stage.row(claim.session_id))["ready"]
    won = await stage.claim(claim.session_id)
    assert won.turn is not None
    assert won.turn.id == turn


async def test_a_wait_lasts_as_long_as_its_worker_says_whatever_its_clock_shows(stage: Stage) -> None:
    claim, turn = await stage.running()
    behind = (await stage.one("SELECT clock_timestamp() AS now"))["now"] - timedelta(hours=1)
    write = leave(claim, turn, seq=2, seen=claim.mail_seq, until=behind + timedelta(minutes=10), now=behind)

    assert (await log.leave(stage.db, [write]))[write.key] == log.Done(flag=False)

    row = await stage.one("SELECT ready_at - clock_timestamp() AS rest FROM sessions WHERE id = %s", claim.session_id)
    assert timedelta(minutes=9) < row["rest"] <= timedelta(minutes=10)


async def test_cancelling_a_queued_turn_behind_a_waiting_head_keeps_its_timer(stage: Stage) -> None:
    until = datetime(2999, 1, 1, tzinfo=UTC)
    claim, _ = await waiting(stage, until)
    _, behind = await stage.submit(claim.session_id)

    assert await stage.cancel(behind) == []

    row = await stage.row(claim.session_id)
    assert (row["ready_at"], row["open_turns"], row["head_waiting"]) == (until, 1, True)
    assert (await stage.turn(behind))["status"] == "cancelled"


async def test_cancelling_the_only_turn_puts_the_session_to_rest(stage: Stage) -> None:
    session, turn = await stage.submit()

    await stage.cancel(turn)
    await stage.cancel(turn)

    row = await stage.row(session)
    assert (row["ready_at"], row["open_turns"]) == (None, 0)


async def test_a_cancel_of_a_started_turn_is_mail_once(stage: Stage) -> None:
    claim, turn = await stage.running()

    assert await stage.cancel(turn) == [(claim.session_id, "default")]
    assert await stage.cancel(turn) == []

    [mail] = await leases.urgent_mail(stage.db, worker_id=claim.worker_id)
    assert mail.turn_id == turn
    await log.finish(stage.db, [finish(claim, turn, seq=2)])
    assert await stage.one("SELECT count(*) AS n FROM mail WHERE consumed_at IS NULL") == {"n": 0}
    assert await stage.cancel(turn) == []


async def test_a_cancel_that_waits_for_a_finish_finds_the_turn_ended(stage: Stage) -> None:
    """Or it would wake, and write mail for, a session that has nothing to do."""
    claim, turn = await stage.running()
    columns = {"status": ["succeeded"], "output": ["1"], "error": [None], "output_artifact": [None], "keep": [False]}
    async with stage.db.transaction() as finishing:
        await finishing.execute(log.FINISH, log._run([finish(claim, turn, seq=2)]) | columns)
        cancelling = stage.begin(stage.cancel(turn))
        await stage.until_blocked()

    assert await cancelling == []
    assert (await stage.turn(turn))["status"] == "succeeded"
    assert (await stage.row(claim.session_id))["ready_at"] is None


async def test_turns_past_their_deadline_expire_by_row_or_by_mail(stage: Stage) -> None:
    session, turn = await stage.submit()
    claim, started = await stage.running()
    await stage.hand.execute("UPDATE turns SET deadline = now()")

    due = await upkeep.overdue(stage.db)
    assert set(due) == {turn, started}
    ring = await mail.end_turns(stage.db, due, tenant_id=None, kind=MailKind.EXPIRE, reason="deadline")

    assert ring == [(claim.session_id, "default")]
    assert (await stage.turn(turn))["status"] == "expired"
    assert (await stage.row(session))["open_turns"] == 0
    assert await upkeep.overdue(stage.db) == [], "once told is enough"


async def test_an_expired_wait_is_rung_like_any_ready_session(stage: Stage) -> None:
    claim, _ = await waiting(stage, datetime.now(UTC) - timedelta(seconds=1))

    assert await upkeep.undispatched(stage.db, queue="default", patience=timedelta(0), limit=9) == [claim.session_id]


async def test_the_sweeper_goes_on_forgetting_until_little_is_left(stage: Stage) -> None:
    """A thousand rows every five minutes would be fewer than a busy fleet makes."""
    await stage.hand.execute(
        "INSERT INTO mail (id, session_id, kind, consumed_at)"
        " SELECT gen_random_uuid(), gen_random_uuid(), 'signal', now() - interval '2 days' FROM generate_series(1, 1500)"
    )
    nothing = cast(Any, None)
    sweeper = Sweeper(
        stage.db, nothing, heartbeat=nothing, config=nothing, clock=Clock(monotonic=lambda: 1e6), metrics=nothing
    )
    left = []
    for _ in range(3):
        await sweeper.forget()
        left.append((await stage.one("SELECT count(*) AS n FROM mail"))["n"])
        if left[-1] == 0:
            await stage.hand.execute(
                "INSERT INTO mail (id, session_id, kind, consumed_at)"
                " VALUES (gen_random_uuid(), gen_random_uuid(), 'signal', now() - interval '2 days')"
            )

    assert left == [500, 0, 1], "then it pauses"


async def test_the_sweeper_forgets_mail_of_ended_turns_and_never_that_of_open_ones(stage: Stage) -> None:
    """A cancel that comes while its turn is just ending is read by nobody."""
    ended, turn = await stage.running()
    open_one, other = await stage.running()
    await log.finish(stage.db, [finish(ended, turn, seq=2)])
    await stage.cancel(other)
    late = "INSERT INTO mail (id, session_id, turn_id, kind) VALUES (gen_random_uuid(), %s, %s, 'cancel')"
    await stage.hand.execute(late, (ended.session_id, turn))

    await upkeep.forget(stage.db, keys_after=timedelta(0), workers_after=timedelta(days=1))

    left = await (await stage.hand.execute("SELECT turn_id, session_id FROM mail")).fetchall()
    assert left == [{"turn_id": other, "session_id": open_one.session_id}]
