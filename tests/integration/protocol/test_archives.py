"""The cold tier's part of a log: what moves there, what is read from there, and who may be in the way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import UUID

import pytest

from longshift import lifecycle as lifecycle_module
from longshift import segments
from longshift.archive import Archive
from longshift.artifacts import open_store
from longshift.cold import Cold
from longshift.context import Tiers as ContextTiers
from longshift.context import restore
from longshift.db import aging, archives, checkpoints, files, log, views
from longshift.errors import ArtifactCorrupt, InUse, LongshiftError, NotFound, StoreUnavailable, Unavailable
from longshift.events import Event, Kind, fold
from longshift.hot import Hot
from longshift.hot.copies import Copy
from longshift.lifecycle import Lifecycle
from longshift.model import Kept, new_id
from tests.integration.protocol.stage import Stage, append, event, finish, start

T = TypeVar("T")


@dataclass
class Tiers:
    """The stage with a cold tier."""

    stage: Stage
    folder: Path
    cold: Cold
    archive: Archive
    lifecycle: Lifecycle

    async def used(self, session_id: UUID | None = None, *, steps: int = 3) -> UUID:
        """A session in which one more turn has run: its input, ``steps`` events, its output."""
        session_id, turn = await self.stage.submit(session_id)
        won = await self.stage.claim(session_id)
        claim, seq = won.claim, won.claim.last_seq
        begun = event(turn, Kind.TURN_STARTED, payload=json.dumps({"attempt": 1, "input": f"question {seq}"}))
        assert await log.start(self.stage.db, [log.Start(claim, seq + 1, (begun,), turn, "1")])
        rows = tuple(event(turn, key=f"k{n}", payload=f'{{"b": {n}, "a": "\\u2028"}}') for n in range(steps))
        if rows:
            assert await log.append(self.stage.db, [log.Append(claim, seq + 2, rows)])
        ended = event(turn, Kind.TURN_SUCCEEDED, payload=json.dumps({"output": f"answer {seq}"}))
        done = replace(finish(claim, turn, seq=seq + 2 + steps), events=(ended,))
        assert await log.finish(self.stage.db, [done])
        return session_id

    async def events(self, session_id: UUID) -> list[Event]:
        return [found async for found in self.fresh().events(session_id)]

    def fresh(self) -> Archive:
        """Nothing in memory: another process."""
        return Archive(self.stage.db, self.cold)

    async def warm(self, session_id: UUID) -> list[int]:
        return [found.seq for found in await log.read(self.stage.db, session_id)]

    async def spoil(self, artifact_id: UUID, *, remove: bool = False) -> None:
        record = await self.cold.find(artifact_id, tenant_id=self.stage.tenant)
        if remove:
            await self.cold.store.delete(record.key)
        else:
            await self.cold.store.put(record.key, b"something else", content_type="text/plain")


@pytest.fixture
async def tiers(stage: Stage, tmp_path: Path) -> AsyncIterator[Tiers]:
    store = open_store(f"file://{tmp_path}")
    cold = Cold(stage.db, store)
    archive = Archive(stage.db, cold)
    yield Tiers(stage, tmp_path, cold, archive, Lifecycle(stage.db, cold, archive))
    await store.close()


async def test_an_archived_log_is_read_as_it_was_and_is_no_longer_in_postgres(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "MOST_EVENTS", 3)
    session = await tiers.used(await tiers.used())
    before = await tiers.events(session)

    moved = await tiers.lifecycle.archive(session, tenant_id=tiers.stage.tenant)

    assert (moved.events, moved.through) == (10, 10)
    assert await tiers.warm(session) == []
    assert await tiers.events(session) == before
    assert [e.seq for e in (await tiers.fresh().read(session, after=4, limit=3)).events] == [5, 6, 7]
    assert (await tiers.stage.row(session))["idle_since"] is None


async def test_a_page_of_large_events_is_bounded_by_their_bytes_and_says_that_there_are_more(tiers: Tiers) -> None:
    session, turn = await tiers.stage.submit()
    claim = (await tiers.stage.claim(session)).claim
    assert await log.start(tiers.stage.db, [start(claim, turn)])
    large = json.dumps({"result": "x" * 1_000_000})
    for number in range(5):
        rows = tuple(event(turn, key=f"k{number}.{n}", payload=large) for n in range(4))
        assert await log.append(tiers.stage.db, [log.Append(claim, 2 + 4 * number, rows)])
    assert await log.finish(tiers.stage.db, [finish(claim, turn, seq=22)])

    for archived in (False, True):
        if archived:
            await tiers.lifecycle.archive(session)
        page = await tiers.fresh().read(session, after=0)
        assert (page.cut, [e.seq for e in page.events]) == (True, list(range(1, 11)))
        rest = await tiers.fresh().read(session, after=18)
        assert (rest.cut, [e.seq for e in rest.events]) == (False, [19, 20, 21, 22])
        assert [e.seq for e in await tiers.events(session)] == list(range(1, 23))


async def test_the_context_of_an_archived_log_is_its_fold_also_if_it_has_to_be_folded_anew(tiers: Tiers) -> None:
    session = await tiers.used(await tiers.used())
    expected = fold(await tiers.events(session))
    await tiers.lifecycle.archive(session)

    assert await tiers.fresh().context(session) == expected
    record = await archives.find(tiers.stage.db, session)
    assert record is not None
    await tiers.spoil(record.context_id)
    assert await tiers.fresh().context(session) == expected
    await tiers.spoil(record.context_id, remove=True)
    assert await tiers.fresh().context(session) == expected


async def test_a_log_goes_on_behind_its_archive_and_is_archived_again(tiers: Tiers) -> None:
    session = await tiers.used()
    for _ in range(3):
        await tiers.lifecycle.archive(session)
        await tiers.used(session)
        assert (await tiers.warm(session))[0] == (await tiers.stage.row(session))["archived_through"] + 1
    before = await tiers.events(session)
    await tiers.lifecycle.archive(session)

    assert [e.seq for e in before] == list(range(1, 21))
    assert await tiers.events(session) == before
    assert await tiers.fresh().context(session) == fold(before)
    refs = await tiers.stage.one("SELECT count(*) AS n FROM artifact_refs WHERE session_id = %s", session)
    assert refs["n"] == 4 + 2  # segments, and the newest manifest and context


async def test_a_restored_log_is_what_it_was(tiers: Tiers) -> None:
    session = await tiers.used(await tiers.used())
    text = "SELECT * , payload::text AS raw FROM events WHERE session_id = %s ORDER BY seq"
    before = await (await tiers.stage.hand.execute(text, (session,))).fetchall()
    await tiers.lifecycle.archive(session)
    await tiers.used(session)

    moved = await tiers.lifecycle.restore(session)

    after = await (await tiers.stage.hand.execute(text, (session,))).fetchall()
    assert moved.events == 10
    assert after[:10] == before
    assert [row["seq"] for row in after] == list(range(1, 16))
    row = await tiers.stage.row(session)
    assert (row["archived_through"], row["archived_event_id"], row["idle_since"] is None) == (0, None, False)
    assert await archives.find(tiers.stage.db, session) is None
    await tiers.used(session)
    assert len(await tiers.events(session)) == 20


async def test_a_session_in_use_is_not_archived(tiers: Tiers) -> None:
    claim, turn = await tiers.stage.running()

    with pytest.raises(InUse, match="open turn"):
        await tiers.lifecycle.archive(claim.session_id)
    with pytest.raises(NotFound):
        await tiers.lifecycle.archive(claim.session_id, tenant_id=new_id())

    assert await log.append(tiers.stage.db, [append(claim, turn, "a", seq=2)])


@pytest.mark.parametrize("early", [True, False])
async def test_a_turn_that_comes_before_or_after_the_decision_to_archive_goes_on(tiers: Tiers, early: bool) -> None:
    session = await tiers.used()
    before = await tiers.events(session)
    if early:
        tiers.stage.db.before[files.TOUCH] = lambda: tiers.stage.submit(session)
        with pytest.raises(InUse):
            await tiers.lifecycle.archive(session)
    else:
        async with tiers.stage.locked(session):  # a submit, say, has the row: the trim leaves it alone
            assert await archives.trim(tiers.stage.db, session, limit=10) is None
        await tiers.lifecycle.archive(session)
        await tiers.stage.submit(session)

    won = await tiers.stage.claim(session)

    assert (won.claim.last_seq, won.claim.last_event_id) == (before[-1].seq, before[-1].id)
    assert won.turn is not None
    assert await log.start(tiers.stage.db, [start(won.claim, won.turn.id)])
    assert (await tiers.events(session))[:-1] == before


async def test_what_was_interrupted_between_the_decision_and_the_trim_is_read_and_trimmed_later(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await tiers.used()
    before = await tiers.events(session)
    with monkeypatch.context() as dying:  # whoever archives dies when it has begun to trim
        dying.setattr(lifecycle_module, "PIECE", 2)
        dying.setattr(archives, "trim", _once(archives.trim))
        with pytest.raises(Unavailable):
            await tiers.lifecycle.archive(session)
    assert await tiers.warm(session) == [3, 4, 5]
    assert await tiers.events(session) == before
    assert (await tiers.stage.row(session))["idle_since"] is not None

    moved = await tiers.lifecycle.archive(session)

    assert (moved.events, await tiers.warm(session)) == (0, [])
    assert (await tiers.stage.row(session))["idle_since"] is None
    assert await tiers.events(session) == before


def _once(function: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """As long as Postgres answers: once."""
    calls = iter([function])

    async def call(*args: object, **options: object) -> T:
        for first in calls:
            return await first(*args, **options)
        raise Unavailable("gone")

    return call


async def test_a_restore_that_a_turn_or_a_trim_gets_in_the_way_of_changes_nothing(tiers: Tiers) -> None:
    session = await tiers.used(await tiers.used())
    before = await tiers.events(session)
    await tiers.lifecycle.archive(session)
    seen = await archives.head(tiers.stage.db, session)
    found = await archives.find(tiers.stage.db, session)
    assert found is not None
    manifest = await tiers.archive.manifest(session, found)
    lines = await tiers.archive.lines(manifest.segments[0], tenant_id=seen.tenant_id)
    stored = [segments.stored(line) for line in lines]

    assert await archives.put_back(tiers.stage.db, session, stored, seen=seen)
    assert await tiers.events(session) == before  # half done: the archive counts
    assert await archives.trim(tiers.stage.db, session, limit=4) == 4
    assert not await archives.unseal(tiers.stage.db, session, seen=seen)
    assert await tiers.events(session) == before

    await tiers.stage.submit(session)
    with pytest.raises(InUse):
        await tiers.lifecycle.restore(session)
    assert await tiers.events(session) == before


async def test_a_turn_after_a_restore_that_stopped_half_way_goes_on_where_the_archive_ends(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await tiers.used(await tiers.used())
    before = await tiers.events(session)
    await tiers.lifecycle.archive(session)
    with monkeypatch.context() as dying:
        dying.setattr(lifecycle_module, "PIECE", 4)
        dying.setattr(archives, "put_back", _once(archives.put_back))
        with pytest.raises(Unavailable):
            await tiers.lifecycle.restore(session)
    assert await tiers.warm(session) == [9, 10]
    shown = await views.session(tiers.stage.db, session, tenant_id=tiers.stage.tenant)
    assert shown is not None
    assert shown.last_seq == 10

    await tiers.stage.submit(session)
    won = await tiers.stage.claim(session)
    standing = (await log.standing(tiers.stage.db, [(won.claim, 11)]))[(session, won.claim.epoch)]

    end = before[-1].seq, before[-1].id
    assert (won.claim.last_seq, won.claim.last_event_id) == end
    assert (standing.last_seq, standing.last_event_id) == end


async def test_an_old_copy_is_not_continued_with_the_rows_that_half_a_restore_has_left(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await tiers.used(await tiers.used())
    old = fold((await tiers.events(session))[:3])
    await tiers.lifecycle.archive(session)
    with monkeypatch.context() as dying:
        dying.setattr(lifecycle_module, "PIECE", 4)
        dying.setattr(archives, "put_back", _once(archives.put_back))
        with pytest.raises(Unavailable):
            await tiers.lifecycle.restore(session)
    await tiers.used(session)
    log_now = await tiers.events(session)
    await tiers.stage.submit(session)
    claim = (await tiers.stage.claim(session)).claim

    class Contexts:
        async def get(self, key: object) -> Copy:
            return Copy(claim.epoch - 1, old, Kept(), b"")

        async def drop(self, key: object, seen: object) -> None:
            pass

    restored = await restore(
        tiers.stage.db,
        session,
        through=15,
        event_id=log_now[-1].id,
        claim=claim,
        tiers=ContextTiers(contexts=cast(Any, Contexts()), archive=tiers.archive),
    )

    assert restored.fold.context == fold(log_now)


@pytest.mark.parametrize("move", ["archive", "restore"])
async def test_a_reader_whose_archive_is_replaced_under_it_reads_on(tiers: Tiers, move: str) -> None:
    session = await tiers.used()
    await tiers.lifecycle.archive(session)
    await tiers.used(session)
    before = await tiers.events(session)
    # it has found the archive's row, and not fetched the manifest
    tiers.stage.db.before[files.FIND] = lambda: getattr(tiers.lifecycle, move)(session)

    assert await tiers.events(session) == before


async def test_a_log_that_another_archives_meanwhile_is_not_taken_for_one_with_a_gap(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await tiers.used(steps=150)
    before = await tiers.events(session)

    async def archive_and_trim_some() -> None:
        with monkeypatch.context() as dying:
            dying.setattr(lifecycle_module, "PIECE", 110)
            dying.setattr(archives, "trim", _once(archives.trim))
            with pytest.raises(Unavailable):
                await tiers.lifecycle.archive(session)

    async def first_page() -> None:
        tiers.stage.db.before[archives.STORED] = archive_and_trim_some

    tiers.stage.db.before[archives.STORED] = first_page
    with pytest.raises(InUse):
        await tiers.lifecycle.archive(session)
    assert await tiers.events(session) == before


async def test_no_checkpoint_stays_that_archived_events_would_have_to_follow(tiers: Tiers) -> None:
    session, turn = await tiers.stage.submit()
    won = await tiers.stage.claim(session)
    assert await log.start(tiers.stage.db, [start(won.claim, turn)])
    early = fold(await tiers.events(session))
    await checkpoints.save(tiers.stage.db, won.claim, early)
    assert await log.finish(tiers.stage.db, [finish(won.claim, turn, seq=2)])

    await tiers.lifecycle.archive(session)

    assert (await checkpoints.ground(tiers.stage.db, session, through=2)).context.seq == 0
    session, _ = await tiers.stage.submit(session)
    won = await tiers.stage.claim(session)
    await checkpoints.save(tiers.stage.db, won.claim, fold(await tiers.events(session)))
    assert (await checkpoints.ground(tiers.stage.db, session, through=2)).context.seq == 2


async def test_bytes_that_are_not_what_was_archived_are_refused(tiers: Tiers) -> None:
    session = await tiers.used()
    await tiers.lifecycle.archive(session)
    record = await archives.find(tiers.stage.db, session)
    assert record is not None
    manifest = await tiers.archive.manifest(session, record)

    await tiers.spoil(manifest.segments[0].artifact_id)
    with pytest.raises(ArtifactCorrupt):
        await tiers.events(session)
    assert await tiers.fresh().context(session) is not None  # a turn needs no more than this
    await tiers.spoil(record.manifest_id, remove=True)
    with pytest.raises(ArtifactCorrupt, match="missing"):
        await tiers.fresh().read(session, after=0)
    with pytest.raises(ArtifactCorrupt):
        await Lifecycle(tiers.stage.db, tiers.cold, tiers.fresh()).restore(session)
    assert (await tiers.fresh().read(session, after=5)).events == []


async def test_a_store_that_is_away_is_not_taken_for_postgres(tiers: Tiers) -> None:
    session = await tiers.used()
    await tiers.lifecycle.archive(session)
    away = open_store("s3://bucket?endpoint_url=http://127.0.0.1:1&region=x")
    tiers.cold.store = away

    with pytest.raises(StoreUnavailable):
        await tiers.fresh().read(session, after=0)

    await away.close()


async def test_a_lease_on_an_archived_session_stands_after_an_outage(tiers: Tiers) -> None:
    session = await tiers.used()
    await tiers.lifecycle.archive(session)
    await tiers.used(session)
    await tiers.lifecycle.archive(session)
    await tiers.stage.submit(session)
    won = await tiers.stage.claim(session)

    standing = (await log.standing(tiers.stage.db, [(won.claim, won.claim.last_seq + 1)]))[(session, won.claim.epoch)]

    assert standing.held
    assert (standing.last_seq, standing.last_event_id) == (won.claim.last_seq, won.claim.last_event_id)
    assert standing.last_seq == 10


async def test_a_session_whose_last_turn_is_cancelled_before_it_starts_is_idle_again(tiers: Tiers) -> None:
    claim, turn = await tiers.stage.running()
    _, waiting = await tiers.stage.submit(claim.session_id)
    assert await log.finish(tiers.stage.db, [finish(claim, turn, seq=2)])
    assert (await tiers.stage.row(claim.session_id))["idle_since"] is None

    await tiers.stage.cancel(waiting)

    row = await tiers.stage.row(claim.session_id)
    assert (row["open_turns"], row["ready_at"], row["idle_since"] is None) == (0, None, False)


async def test_a_session_that_is_locked_gets_its_time_to_live_later(tiers: Tiers) -> None:
    stage = tiers.stage
    sessions = sorted([(await stage.submit())[0] for _ in range(3)])
    after, last = UUID(int=0), UUID(int=(1 << 128) - 1)

    async with stage.locked(sessions[1]):
        assert await aging.adopt(stage.db, after=after, before=last, limit=10) == sessions[0]
    assert await aging.adopt(stage.db, after=sessions[0], before=last, limit=10) == sessions[2]

    assert all([(await stage.row(session))["expires_at"] for session in sessions])


async def test_a_reader_whose_session_is_deleted_under_it_comes_to_an_end(tiers: Tiers) -> None:
    session = await tiers.used()
    await tiers.lifecycle.archive(session)
    tiers.stage.db.before[archives.FIND] = lambda: tiers.lifecycle.delete(session)

    async with asyncio.timeout(5):
        assert await tiers.events(session) == []
        assert await tiers.events(session) == []


async def test_of_two_who_archive_the_slower_one_takes_nothing_back(tiers: Tiers) -> None:
    session = await tiers.used()

    async def meanwhile() -> None:  # another process archives, after another turn, while this one uploads
        await tiers.used(session)
        await Lifecycle(tiers.stage.db, tiers.cold, tiers.fresh()).archive(session)

    tiers.stage.db.before[files.TOUCH] = meanwhile
    with pytest.raises(InUse, match="meanwhile"):
        await tiers.lifecycle.archive(session)

    assert [e.seq for e in await tiers.events(session)] == list(range(1, 11))
    assert (await tiers.stage.row(session))["archived_through"] == 10


async def test_a_deletion_is_complete_only_when_redis_has_forgotten_the_session(tiers: Tiers) -> None:
    session = await tiers.used()
    hot = Hot("redis://127.0.0.1:1")  # nobody answers
    try:
        away = Lifecycle(tiers.stage.db, tiers.cold, tiers.archive, hot.contexts)
        deleted = await away.delete(session)
        epoch = (await tiers.stage.row(session))["lease_epoch"]
        with pytest.raises(LongshiftError):
            await away.finish_deletion(session, tenant_id=tiers.stage.tenant, epoch=epoch)
    finally:
        await hot.close()

    assert not deleted.complete
    assert (await tiers.stage.row(session))["purge_at"] is not None
    await tiers.lifecycle.finish_deletion(session, tenant_id=tiers.stage.tenant, epoch=epoch)
    assert (await tiers.stage.row(session))["purge_at"] is None
