"""Poison: which turns a death makes suspects, who may claim them, and when one is condemned."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

import pytest

from longshift.db import leases, log, mail, upkeep
from longshift.db.liveness import REGISTER
from longshift.model import Claim, MailKind, TurnStatus, new_id
from tests.integration.protocol.stage import GATE, SOFTWARE, Stage, append, finish, leave, start

QUEUES = ["default"]


async def process(stage: Stage, *, isolated: bool = False) -> tuple[UUID, UUID]:
    """A process and the worker that it is: their ids."""
    worker, identity = new_id(), new_id()
    row = {"id": worker, "host": "here", "pid": 1, "queues": QUEUES, "capacity": 10, "lock_key": None}
    await stage.db.execute(REGISTER, row | SOFTWARE | {"process": identity, "isolated": isolated})
    return identity, worker


async def die(stage: Stage, identity: UUID, *, crashed: bool) -> None:
    assert await upkeep.bury(stage.db, process=identity, crashed=crashed)
    await upkeep.rescue(stage.db)


async def in_a_ward(stage: Stage, *, most: int = 100) -> tuple[UUID, list[leases.Won]]:
    """A ward that has claimed a group, its turns started."""
    identity, ward = await process(stage, isolated=True)
    group = await leases.claim_suspects(stage.db, worker_id=ward, queues=QUEUES, most=most)
    for won in group:
        assert won.turn is not None
        await log.start(stage.db, [start(won.claim, won.turn.id)])
    return identity, group


async def crashed_together(stage: Stage, number: int) -> list[tuple[Claim, UUID]]:
    """So many turns whose process has crashed under them."""
    identity, worker = await process(stage)
    running = [await stage.running(worker) for _ in range(number)]
    await die(stage, identity, crashed=True)
    return running


async def suspect(stage: Stage, session_id: UUID) -> tuple[int | None, int]:
    row = await stage.row(session_id)
    return row["suspect"], row["crashes"]


async def test_a_process_that_somebody_killed_makes_nobody_suspect(stage: Stage) -> None:
    identity, worker = await process(stage)
    claim, _ = await stage.running(worker)
    await die(stage, identity, crashed=False)

    assert await suspect(stage, claim.session_id) == (None, 1)
    assert (await stage.claim(claim.session_id)).crashes == 1


async def test_a_process_that_crashed_by_itself_makes_suspects_that_no_ordinary_claim_takes(stage: Stage) -> None:
    running = await crashed_together(stage, 20)
    sessions = [claim.session_id for claim, _ in running]

    assert {await suspect(stage, session) for session in sessions} == {(3, 1)}  # an eighth of 20, rounded up
    assert await leases.claim(stage.db, sessions, worker_id=await stage.worker()) == []
    assert (await upkeep.ready(stage.db))[0] == []


async def test_a_ward_takes_a_group_of_the_size_that_its_suspects_allow(stage: Stage) -> None:
    running = await crashed_together(stage, 20)
    groups = []
    for _ in range(7):
        _, group = await in_a_ward(stage)
        groups.append({won.claim.session_id for won in group})

    assert [len(group) for group in groups] == [3] * 6 + [2]
    assert set.union(*groups) == {claim.session_id for claim, _ in running}
    assert (await in_a_ward(stage))[1] == []


async def test_a_claim_of_suspects_needs_a_live_ward_and_its_queues(stage: Stage) -> None:
    await crashed_together(stage, 2)
    identity, ward = await process(stage, isolated=True)

    assert await leases.claim_suspects(stage.db, worker_id=ward, queues=["other"], most=9) == []
    await upkeep.bury(stage.db, process=identity, crashed=False)
    assert await leases.claim_suspects(stage.db, worker_id=ward, queues=QUEUES, most=9) == []


async def test_groups_shrink_until_one_is_alone_and_only_that_one_is_condemned(stage: Stage) -> None:
    """A thousand would go by 125, 16, 2 and 1; nine go by 2 and 1."""
    running = await crashed_together(stage, 9)
    poison_session, poison_turn = running[4][0].session_id, running[4][1]
    deaths = 1
    while await _is_suspect(stage, poison_session):
        identity, group = await in_a_ward(stage)
        sessions = {won.claim.session_id for won in group}
        if poison_session in sessions:
            await die(stage, identity, crashed=True)
            deaths += 1
        else:
            await _finish(stage, group)

    assert deaths == 3  # of the nine, of two, and alone
    letter = await stage.one("SELECT * FROM mail WHERE turn_id = %s", poison_turn)
    assert (letter["kind"], letter["consumed_at"]) == (MailKind.CONDEMN, None)
    assert "3 processes died" in letter["payload"]["reason"]
    won = await stage.claim(poison_session)
    assert [m.kind for m in await leases.urgent_mail(stage.db, worker_id=won.claim.worker_id)] == [MailKind.CONDEMN]
    others = await stage.one("SELECT count(*) AS n FROM mail")
    assert others["n"] == 1


async def _is_suspect(stage: Stage, session: UUID) -> bool:
    return (await suspect(stage, session))[0] is not None


async def _finish(stage: Stage, group: Sequence[leases.Won]) -> None:
    for won in group:
        assert won.turn is not None
        done = finish(won.claim, won.turn.id, seq=won.claim.last_seq + 2)
        assert await log.finish(stage.db, [done])


async def test_a_turn_that_records_a_step_between_its_crashes_is_not_condemned(stage: Stage) -> None:
    [(claim, turn)] = await crashed_together(stage, 1)
    for _ in range(5):
        identity, [won] = await in_a_ward(stage)
        assert await log.append(stage.db, [append(won.claim, turn, "step", seq=won.claim.last_seq + 2)])
        await die(stage, identity, crashed=True)

        assert await suspect(stage, claim.session_id) == (1, 1)


async def test_who_was_not_alone_is_never_condemned(stage: Stage) -> None:
    running = await crashed_together(stage, 20)
    for _ in range(6):
        identity, worker = await process(stage)
        await stage.hand.execute("UPDATE sessions SET suspect = NULL")
        for claim, turn in running:
            won = await stage.claim(claim.session_id, worker)
            await log.start(stage.db, [start(won.claim, turn)])
        await die(stage, identity, crashed=True)

    assert {await suspect(stage, claim.session_id) for claim, _ in running} == {(3, 7)}
    assert (await stage.one("SELECT count(*) AS n FROM mail"))["n"] == 0


async def test_the_third_unexplained_death_in_a_row_makes_a_suspect(stage: Stage) -> None:
    session, turn = await stage.submit()
    for deaths in (1, 2, 3):
        worker = await stage.worker()
        won = await stage.claim(session, worker)
        await log.start(stage.db, [start(won.claim, turn)])
        await stage.kill(worker)
        await upkeep.rescue(stage.db)

        assert await suspect(stage, session) == (1 if deaths == 3 else None, deaths)


async def test_a_session_whose_turn_had_not_begun_is_no_suspect(stage: Stage) -> None:
    identity, worker = await process(stage)
    session, _ = await stage.submit()
    await stage.claim(session, worker)
    await die(stage, identity, crashed=True)

    assert await suspect(stage, session) == (None, 0)


@pytest.mark.parametrize(
    ("ending", "left"),
    [("finish", (None, 0)), (TurnStatus.WAITING, (None, 0)), (TurnStatus.QUEUED, (1, 1)), ("acquitted", (None, 1))],
)
async def test_suspicion_ends_with_the_turn_or_its_wait_but_not_with_an_interrupt(
    stage: Stage, ending: str, left: tuple[int | None, int]
) -> None:
    [(claim, turn)] = await crashed_together(stage, 1)
    _, [won] = await in_a_ward(stage)
    seq = won.claim.last_seq + 2
    if ending == "finish":
        await log.finish(stage.db, [finish(won.claim, turn, seq=seq)])
    elif ending == "acquitted":
        await leases.acquit(stage.db, worker_id=won.claim.worker_id)
        await log.leave(stage.db, [leave(won.claim, turn, seq=seq, seen=0, status=TurnStatus.QUEUED)])
    else:
        await log.leave(stage.db, [leave(won.claim, turn, seq=seq, seen=0, status=TurnStatus(ending))])

    assert await suspect(stage, claim.session_id) == left


async def test_a_death_that_was_noticed_as_silence_before_is_still_explained_by_its_report(stage: Stage) -> None:
    identity, worker = await process(stage)
    claim, _ = await stage.running(worker)
    await stage.kill(worker)
    await die(stage, identity, crashed=True)

    assert await suspect(stage, claim.session_id) == (1, 1)


async def test_a_session_that_nobody_claims_is_rung_at_longer_and_longer_intervals(stage: Stage) -> None:
    session, _ = await stage.submit()

    async def rung(seconds_ago: float) -> bool:
        await stage.hand.execute(
            "UPDATE sessions SET dispatched_at = clock_timestamp() - make_interval(secs => %s)", (seconds_ago,)
        )
        return bool(await upkeep.undispatched(stage.db, queue="default", patience=timedelta(seconds=2), limit=9))

    assert [await rung(seconds) for seconds in (1.5, 2.5)] == [False, True]
    assert [await rung(seconds) for seconds in (2.5, 4.5)] == [False, True]
    for _ in range(10):
        await rung(1000)
    assert [await rung(seconds) for seconds in (60, 65)] == [False, True]
    await stage.claim(session)
    assert (await stage.row(session))["rings"] == 0


async def test_the_suspect_that_has_waited_longest_is_claimed_first_however_old_its_session(stage: Stage) -> None:
    running = await crashed_together(stage, 3)
    last = max(claim.session_id for claim, _ in running)
    await stage.hand.execute(
        "UPDATE sessions SET ready_at = ready_at - interval '1 minute' WHERE id = %s AND suspect = 1", (last,)
    )
    _, [won] = await in_a_ward(stage)

    assert won.claim.session_id == last


@pytest.mark.parametrize("kind", [MailKind.CANCEL, MailKind.EXPIRE])
async def test_the_end_of_a_suspect_needs_no_ward(stage: Stage, kind: MailKind) -> None:
    """Its turn does not run again, so that anybody may end it, also where no ward can be started."""
    [(claim, turn)] = await crashed_together(stage, 1)
    await mail.end_turns(stage.db, [turn], tenant_id=None, kind=kind, reason="test")

    won = await stage.claim(claim.session_id)
    assert [m.kind for m in await leases.urgent_mail(stage.db, worker_id=won.claim.worker_id)] == [kind]


async def test_the_end_of_a_suspect_whose_ward_crashed_before_it_was_told_needs_no_other_ward(stage: Stage) -> None:
    [(claim, turn)] = await crashed_together(stage, 1)
    identity, _ = await in_a_ward(stage)
    await stage.cancel(turn)
    await die(stage, identity, crashed=True)

    assert (await stage.claim(claim.session_id)).turn is not None


async def test_a_step_that_was_recorded_before_an_interrupt_begins_the_row_of_deaths_anew(stage: Stage) -> None:
    [(claim, turn)] = await crashed_together(stage, 1)
    _, [won] = await in_a_ward(stage)
    seq = won.claim.last_seq + 2
    assert await log.append(stage.db, [append(won.claim, turn, "step", seq=seq)])
    assert await log.leave(stage.db, [leave(won.claim, turn, seq=seq + 1, seen=0, status=TurnStatus.QUEUED)])

    assert await suspect(stage, claim.session_id) == (1, 0)


SLOW_IDS = f"""
CREATE FUNCTION slow.same(a uuid, b uuid) RETURNS boolean VOLATILE LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.pg_advisory_lock_shared({GATE}); PERFORM pg_catalog.pg_advisory_unlock_shared({GATE});
    RETURN a OPERATOR(pg_catalog.=) b;
END $$;
CREATE OPERATOR slow.= (LEFTARG = uuid, RIGHTARG = uuid, FUNCTION = slow.same);"""


async def test_a_step_that_commits_between_the_snapshot_of_a_rescue_and_its_lock_counts(stage: Stage) -> None:
    worker = await stage.worker()
    claim, turn = await stage.running(worker)
    await stage.hand.execute("UPDATE sessions SET crashes = 2")
    await stage.kill(worker)
    async with stage.slow() as slow:
        await stage.hand.execute(SLOW_IDS)
        async with stage.stopped(upkeep.take_away(slow, [worker], limit=10)) as task:
            assert await log.append(stage.db, [append(claim, turn, "late", seq=2)])
        await task
    row = await stage.row(claim.session_id)
    assert row["lease_worker"] is None
    assert (row["crashes"], row["suspect"]) == (1, None)


async def test_a_lonely_ward_that_nobody_saw_die_counts_half_as_much_as_one_that_somebody_did(stage: Stage) -> None:
    """Its machine may have been taken away, and that three times, too."""
    [(claim, turn)] = await crashed_together(stage, 1)
    for deaths in range(2, 2 * upkeep.PATIENCE + 1):
        assert await _is_suspect(stage, claim.session_id), f"condemned after {deaths - 1}"
        _, [won] = await in_a_ward(stage)
        await stage.hand.execute("UPDATE workers SET held = 1, dead_at = now() WHERE id = %s", (won.claim.worker_id,))
        await upkeep.rescue(stage.db)

    mail = await stage.one("SELECT kind FROM mail WHERE turn_id = %s", turn)
    assert mail["kind"] == MailKind.CONDEMN


async def test_a_turn_alone_in_an_ordinary_process_is_never_condemned_for_its_deaths(stage: Stage) -> None:
    """It may have been killed from outside each time: first a ward has to show that it dies there, too."""
    session, turn = await stage.submit()
    for deaths in (1, 2, 3):
        identity, worker = await process(stage)
        won = await stage.claim(session, worker)
        await log.start(stage.db, [start(won.claim, turn)])
        await die(stage, identity, crashed=False)

        assert await suspect(stage, session) == (1 if deaths == upkeep.PATIENCE else None, deaths)
    assert (await stage.one("SELECT count(*) AS n FROM mail"))["n"] == 0
