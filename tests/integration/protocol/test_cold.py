"""Writers and collectors of artifacts, against each other: what is referred to can always be read, the rest always goes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import pytest

from longshift.artifacts import ArtifactStore, Spooled, open_store, spool
from longshift.cold import Cold, Dropped
from longshift.collector import Collector
from longshift.db import collection, files, intake
from longshift.db.database import Database
from longshift.db.files import NewArtifact
from longshift.db.idempotency import Idempotency
from longshift.db.intake import Entry
from longshift.errors import Conflict, IdempotencyMismatch, NotFound, Unavailable
from longshift.metrics import WorkerMetrics
from longshift.model import NewTurn, Prefix, new_id, show_id
from longshift.testing.waiting import wait_until
from tests.integration.protocol.stage import Stage

NOW = timedelta(0)
LONG = timedelta(hours=1)
TEXT = b"the same bytes"
HASH = hashlib.sha256(TEXT).hexdigest()


class Shelf:
    """An artifact store in which something else happens before a call, and that may be away."""

    def __init__(self, store: ArtifactStore, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.before: Callable[[str, str], Awaitable[None]] = _nothing
        self.puts: list[str] = []

    @property
    def keys(self) -> list[str]:
        """What lies in the store."""
        files = (path for path in self.folder.rglob("*@") if path.is_file())
        return sorted(str(path.relative_to(self.folder)).removesuffix("@") for path in files)

    async def put(self, key: str, data: Any, *, size: int | None = None, content_type: str) -> None:
        self.puts.append(key)
        await self.before("put", key)
        await self.store.put(key, data, size=size, content_type=content_type)
        await self.before("put done", key)

    async def delete(self, key: str) -> None:
        await self.before("delete", key)
        await self.store.delete(key)
        await self.before("delete done", key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


async def _nothing(doing: str, key: str) -> None:
    pass


@pytest.fixture
async def shelf(tmp_path: Path) -> AsyncIterator[Shelf]:
    store = open_store((tmp_path / "store").as_uri(), threads=8)
    yield Shelf(store, tmp_path / "store")
    await store.close()


def cold_of(stage: Stage, shelf: Shelf, *, grace: timedelta = LONG, quiet: timedelta = LONG) -> Cold:
    return Cold(stage.db, shelf, grace=grace, quiet=quiet)


async def session_of(stage: Stage) -> UUID:
    session_id = new_id()
    await stage.hand.execute(
        "INSERT INTO sessions (id, tenant_id, queue) VALUES (%s, %s, 'default')", (session_id, stage.tenant)
    )
    return session_id


async def put(cold: Cold, stage: Stage, data: bytes = TEXT, **options: Any) -> UUID:
    record, _ = await cold.put(data, tenant_id=stage.tenant, name="n", content_type="text/plain", **options)
    return record.id


async def delete_session(stage: Stage, cold: Cold, session_id: UUID) -> Any:
    async with stage.second() as hand, hand.transaction():
        await hand.execute("SELECT 1 FROM sessions WHERE id = %s FOR UPDATE", (session_id,))
        await hand.execute("UPDATE sessions SET deleted_at = clock_timestamp() WHERE id = %s", (session_id,))
    return await cold.drop(tenant_id=stage.tenant, session_ids=[session_id])


async def rows(stage: Stage) -> dict[str, int]:
    tables = ("artifacts", "artifact_refs", "blobs", "garbage")
    counts = ", ".join(f"(SELECT count(*) FROM {table}) AS {table}" for table in tables)
    return await stage.one(f"SELECT {counts}")


# -- what is kept, and how long


async def test_a_put_takes_two_statements_and_bytes_that_are_there_are_not_sent_again(
    stage: Stage, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold, session = cold_of(stage, shelf), await session_of(stage)
    asked: list[Any] = []
    fetch = Database.fetch

    async def counted(self: Database, statement: Any, params: Any = None) -> Any:
        asked.append(statement)
        return await fetch(self, statement, params)

    monkeypatch.setattr(Database, "fetch", counted)
    first = await put(cold, stage, session_id=session)
    assert asked == [files.TOUCH, files.ADD_FOR]
    second = await put(cold, stage, session_id=session)

    assert first != second
    assert len(shelf.puts) == 1
    assert await cold.read(second, tenant_id=stage.tenant) == TEXT


async def test_an_artifact_goes_with_the_last_session_that_refers_to_it(stage: Stage, shelf: Shelf) -> None:
    cold, one, two = cold_of(stage, shelf), await session_of(stage), await session_of(stage)
    shared = await put(cold, stage, session_id=one)
    await put(cold, stage, b"of one", session_id=one)
    assert await cold.read(shared, tenant_id=stage.tenant, session_id=two) == TEXT  # and so two keeps it

    dropped = await delete_session(stage, cold, one)
    assert (dropped.artifacts, dropped.blobs, dropped.bytes) == (1, 1, len(b"of one"))
    assert await cold.read(shared, tenant_id=stage.tenant) == TEXT
    dropped = await delete_session(stage, cold, two)

    assert (dropped.artifacts, dropped.blobs, dropped.bytes) == (1, 1, len(TEXT))
    assert shelf.keys == []
    assert (await cold.drop(tenant_id=stage.tenant, session_ids=[one, two])).artifacts == 0


async def test_an_upload_that_nobody_uses_goes_after_a_while_and_one_that_is_used_stays(
    stage: Stage, shelf: Shelf
) -> None:
    cold, session = cold_of(stage, shelf), await session_of(stage)
    unused, used = await put(cold, stage, b"unused"), await put(cold, stage, b"used")
    await cold.find(used, tenant_id=stage.tenant, session_id=session)

    assert (await cold.collect(keep_uploads=LONG)).artifacts == 0
    assert (await cold.collect(keep_uploads=NOW)).artifacts == 1

    with pytest.raises(NotFound):
        await cold.read(unused, tenant_id=stage.tenant)
    assert await cold.read(used, tenant_id=stage.tenant) == b"used"
    assert (await delete_session(stage, cold, session)).artifacts == 1


async def test_a_turn_keeps_what_its_input_names_and_is_in_and_nothing_of_others(stage: Stage, shelf: Shelf) -> None:
    cold = cold_of(stage, shelf)
    named, large, inside = [await put(cold, stage, data) for data in (b"named", b"input", b"inside")]
    foreign, _ = await cold.put(b"x", tenant_id=new_id(), name="n", content_type="text/plain")
    name, absent, other = (show_id(Prefix.ARTIFACT, each) for each in (named, new_id(), foreign.id))
    small = {"deep": [{name: f"see {name}."}, f"{name}0 {name[4:]}"], "b": f"{absent} {other}"}
    turns = (
        NewTurn(agent="echo", input=small, queue="default"),
        NewTurn(agent="echo", input=None, queue="default", input_artifact=large, named=frozenset({inside})),
    )
    entries = [Entry(turn, new_id()) for turn in turns]

    await intake.submit(
        stage.db,
        entries,
        tenant_id=stage.tenant,
        resource_id=turns[0].id,
        now=datetime.now(UTC),
        lifetime=LONG,
    )

    rows = await (await stage.hand.execute("SELECT artifact_id, session_id FROM artifact_refs")).fetchall()
    one, two = (entry.session_id for entry in entries)
    assert {(row["artifact_id"], row["session_id"]) for row in rows} == {(named, one), (large, two), (inside, two)}


async def test_a_released_artifact_goes_and_the_others_of_its_session_stay(stage: Stage, shelf: Shelf) -> None:
    cold, session = cold_of(stage, shelf), await session_of(stage)
    old, new = await put(cold, stage, b"old", session_id=session), await put(cold, stage, b"new", session_id=session)

    assert (await cold.release([old], tenant_id=stage.tenant, session_id=session)).blobs == 1

    assert await cold.read(new, tenant_id=stage.tenant) == b"new"
    assert len(shelf.keys) == 1


async def test_a_tenants_deletion_takes_all_its_artifacts_and_no_others(stage: Stage, shelf: Shelf) -> None:
    cold, session = cold_of(stage, shelf), await session_of(stage)
    other, _ = await cold.put(TEXT, tenant_id=new_id(), name="n", content_type="text/plain")
    await put(cold, stage, session_id=session)
    await put(cold, stage, b"upload")
    await files.touch(stage.db, "0" * 64, tenant_id=stage.tenant, size=7)

    dropped = await cold.drop_tenant(stage.tenant)

    assert (dropped.artifacts, dropped.blobs, dropped.bytes) == (2, 3, len(TEXT) + len(b"upload") + 7)
    assert shelf.keys == [other.key]


# -- ids and promises


async def test_the_same_id_again_is_the_same_artifact_and_never_gets_other_bytes(stage: Stage, shelf: Shelf) -> None:
    cold, session, identity = cold_of(stage, shelf), await session_of(stage), new_id()
    await put(cold, stage, artifact_id=identity, session_id=session)
    await put(cold, stage, artifact_id=identity, session_id=session)

    with pytest.raises(Conflict, match="has other bytes"):
        await put(cold, stage, b"other", artifact_id=identity, session_id=session)
    with pytest.raises(NotFound, match="somebody else"):
        await cold.put(TEXT, tenant_id=new_id(), name="n", content_type="text/plain", artifact_id=identity)

    assert (await rows(stage))["artifacts"] == 1
    assert (await cold_of(stage, shelf, grace=NOW).collect(keep_uploads=LONG)).blobs == 2  # of those that were refused
    assert await cold.read(identity, tenant_id=stage.tenant) == TEXT


async def test_nothing_is_added_to_a_session_that_is_deleted(stage: Stage, shelf: Shelf) -> None:
    cold, session = cold_of(stage, shelf), await session_of(stage)
    async with stage.second() as deleting, deleting.transaction():
        await deleting.execute("SELECT 1 FROM sessions WHERE id = %s FOR UPDATE", (session,))
        putting = stage.begin(put(cold, stage, session_id=session))
        await stage.until_blocked()
        await deleting.execute("UPDATE sessions SET deleted_at = clock_timestamp() WHERE id = %s", (session,))

    with pytest.raises(NotFound, match="session"):
        await putting
    assert (await rows(stage))["artifacts"] == 0


async def test_a_repeated_request_gets_the_artifact_of_the_first_and_sends_nothing(stage: Stage, shelf: Shelf) -> None:
    cold, promise = cold_of(stage, shelf), Idempotency("artifacts", "k", b"hash")
    first, replayed = await cold.put(
        TEXT, tenant_id=stage.tenant, name="n", content_type="text/plain", idempotency=promise
    )
    again = await cold.put(TEXT, tenant_id=stage.tenant, name="n", content_type="text/plain", idempotency=promise)

    assert (replayed, again, len(shelf.puts)) == (False, (first, True), 1)
    other = Idempotency("artifacts", "k", b"other")
    with pytest.raises(IdempotencyMismatch):
        await cold.put(b"other", tenant_id=stage.tenant, name="n", content_type="text/plain", idempotency=other)


# -- the collector at each moment of a writer, and the other way round


async def test_a_put_that_meets_the_collector_after_its_touch_begins_anew(stage: Stage, shelf: Shelf) -> None:
    """The bytes were there when it looked; they are gone before its artifact is written."""
    session, other = await session_of(stage), await session_of(stage)
    cold = cold_of(stage, shelf)
    await put(cold, stage, session_id=other)
    stage.db.before[files.ADD_FOR] = lambda: delete_session(stage, cold, other)

    kept = await put(cold, stage, session_id=session)

    assert len(shelf.puts) == 2
    assert len(set(shelf.puts)) == 2  # the second under another key: a late delete of the first does not meet it
    assert shelf.keys == [shelf.puts[1]]
    assert await cold.read(kept, tenant_id=stage.tenant) == TEXT


async def test_the_collector_waits_for_a_put_that_is_writing_and_spares_its_blob(stage: Stage, shelf: Shelf) -> None:
    """It begins before the put has committed: what it saw then is not what decides."""
    cold, session = cold_of(stage, shelf, grace=NOW), await session_of(stage)
    blob = await files.touch(stage.db, HASH, tenant_id=stage.tenant, size=len(TEXT))
    new = NewArtifact(HASH, len(TEXT), "text/plain", "n")
    params = {"id": new.id, "tenant": stage.tenant, "sha256": HASH, "generation": blob.generation, "session": session}
    async with stage.db.transaction() as writing:
        await writing.execute(files.ADD_FOR, params | {"content_type": "text/plain", "name": "n"})
        assert (await collection.orphans(stage.db, grace=NOW, limit=10)).looked == 0  # passed by
        collecting = stage.begin(cold.drop_tenant(stage.tenant))
        await wait_until(collecting.done, description="it found nothing that it could lock")
    assert (await collecting).artifacts == 0
    assert (await rows(stage))["blobs"] == 1

    locked = stage.begin(collection.orphans(stage.db, grace=NOW, limit=10))
    assert (await locked).looked == 0


async def test_a_deletion_waits_for_a_put_of_the_same_bytes_and_leaves_them(stage: Stage, shelf: Shelf) -> None:
    cold, one, two = cold_of(stage, shelf), await session_of(stage), await session_of(stage)
    await put(cold, stage, session_id=one)
    blob = await files.touch(stage.db, HASH, tenant_id=stage.tenant, size=len(TEXT))
    new = NewArtifact(HASH, len(TEXT), "text/plain", "n")
    params = {"id": new.id, "tenant": stage.tenant, "sha256": HASH, "generation": blob.generation, "session": two}
    async with stage.db.transaction() as writing:
        await writing.execute(files.ADD_FOR, params | {"content_type": "text/plain", "name": "n"})
        deleting = stage.begin(delete_session(stage, cold, one))
        await stage.until_blocked()
    dropped = await deleting

    assert (dropped.artifacts, dropped.blobs) == (1, 0)
    assert await cold.read(new.id, tenant_id=stage.tenant) == TEXT


async def test_a_reference_that_comes_while_the_collector_waits_saves_the_artifact(stage: Stage, shelf: Shelf) -> None:
    cold, session = cold_of(stage, shelf), await session_of(stage)
    upload = await put(cold, stage)
    async with stage.db.transaction() as submitting:
        await files.refer(submitting, [(session, {upload})], tenant_id=stage.tenant)
        collecting = stage.begin(collection.loose(stage.db, older_than=NOW, limit=10))
        await stage.until_blocked()
    assert (await collecting).artifacts == 0

    assert await cold.read(upload, tenant_id=stage.tenant) == TEXT


async def test_what_a_dead_writer_left_is_collected_after_the_grace_and_a_late_upload_after_that(
    stage: Stage, shelf: Shelf
) -> None:
    blob = await files.touch(stage.db, HASH, tenant_id=stage.tenant, size=len(TEXT))
    key = f"{stage.tenant.hex}/{HASH}/{blob.generation}"

    assert (await cold_of(stage, shelf).collect(keep_uploads=LONG)).blobs == 0
    assert (await cold_of(stage, shelf, grace=NOW).collect(keep_uploads=LONG)).blobs == 1
    await shelf.store.put(key, TEXT, content_type="text/plain")  # whoever was given up
    await cold_of(stage, shelf, quiet=NOW).collect(keep_uploads=LONG)

    assert shelf.keys == []
    assert set((await rows(stage)).values()) == {0}


async def test_an_upload_that_outlasts_the_collection_of_its_blob_leaves_nothing(stage: Stage, shelf: Shelf) -> None:
    """Its generation is gone, deleted and forgotten before it is through: the writer itself has it collected again."""
    cold = cold_of(stage, shelf, grace=NOW, quiet=NOW)
    session = await session_of(stage)

    async def collected_meanwhile(doing: str, key: str) -> None:
        if doing == "put" and len(shelf.puts) == 1:
            for _ in range(2):
                await cold.collect(keep_uploads=LONG)
            assert set((await rows(stage)).values()) == {0}

    shelf.before = collected_meanwhile
    kept = await put(cold, stage, session_id=session)
    await cold.collect(keep_uploads=LONG)

    assert shelf.keys == [shelf.puts[1]]
    assert await cold.read(kept, tenant_id=stage.tenant) == TEXT


async def test_what_stands_is_not_discarded(stage: Stage, shelf: Shelf) -> None:
    blob = await files.touch(stage.db, HASH, tenant_id=stage.tenant, size=len(TEXT))

    await files.discard(stage.db, HASH, tenant_id=stage.tenant, generation=blob.generation, size=len(TEXT))

    assert HASH not in [found.sha256 for found in await collection.fresh(stage.db, limit=100)]


async def test_what_is_discarded_again_is_deleted_again(stage: Stage, shelf: Shelf) -> None:
    blob = await files.touch(stage.db, HASH, tenant_id=stage.tenant, size=len(TEXT))
    await cold_of(stage, shelf, grace=NOW).collect(keep_uploads=LONG)
    assert await collection.fresh(stage.db, limit=10) == []
    await files.discard(stage.db, HASH, tenant_id=stage.tenant, generation=blob.generation, size=len(TEXT))
    assert len(await collection.fresh(stage.db, limit=10)) == 1


async def test_a_long_upload_is_not_taken_for_abandoned(stage: Stage, shelf: Shelf) -> None:
    cold = Cold(stage.db, shelf, grace=LONG, renew=timedelta(milliseconds=10))
    session = await session_of(stage)
    aged = "UPDATE blobs SET orphan_since = orphan_since - interval '2 hours' RETURNING orphan_since"

    async def slow(doing: str, key: str) -> None:
        if doing == "put":
            old = (await stage.one(aged))["orphan_since"]

            async def renewed() -> bool:
                return bool((await stage.one("SELECT orphan_since FROM blobs"))["orphan_since"] > old)

            _: bool = await wait_until(renewed, description="the writer says that it is at work")
            assert (await cold.collect(keep_uploads=LONG)).blobs == 0

    shelf.before = slow
    await put(cold, stage, session_id=session)
    assert len(shelf.puts) == 1


async def test_a_deletion_is_finished_when_the_store_is_back(stage: Stage, shelf: Shelf) -> None:
    cold, session = cold_of(stage, shelf), await session_of(stage)
    await put(cold, stage, session_id=session)

    async def away(doing: str, key: str) -> None:
        raise Unavailable("the store is away")

    shelf.before = away
    dropped = await delete_session(stage, cold, session)
    with pytest.raises(Unavailable):
        await cold.collect(keep_uploads=LONG)
    assert (dropped.blobs, len(shelf.keys)) == (1, 1)
    shelf.before = _nothing
    await cold.collect(keep_uploads=LONG)

    assert shelf.keys == []


async def test_an_object_that_cannot_be_deleted_does_not_keep_the_others_from_it(stage: Stage, shelf: Shelf) -> None:
    cold, session = cold_of(stage, shelf), await session_of(stage)
    for data in (b"1", b"2", b"3"):
        await put(cold, stage, data, session_id=session)
    held = shelf.puts[0]

    async def refused(doing: str, key: str) -> None:
        if key == held:
            raise Unavailable("AccessDenied")

    shelf.before = refused
    await delete_session(stage, cold, session)

    assert shelf.keys == [held]


async def test_a_reader_finds_bytes_that_were_dropped_and_put_again_meanwhile(stage: Stage, shelf: Shelf) -> None:
    cold, one, two, identity = cold_of(stage, shelf), await session_of(stage), await session_of(stage), new_id()
    await put(cold, stage, artifact_id=identity, session_id=one)
    before = await cold.find(identity, tenant_id=stage.tenant)
    await delete_session(stage, cold, one)
    await put(cold, stage, artifact_id=identity, session_id=two)

    assert b"".join([chunk async for chunk in cold.stream(before)]) == TEXT
    (shelf.folder / f"{shelf.puts[1]}@").unlink()
    with pytest.raises(NotFound, match="gone from the store"):
        await cold.read(identity, tenant_id=stage.tenant)


# -- all at once


class Chaos:
    """Writers that die at any point, sessions that go, collectors with no patience, all over a few contents."""

    def __init__(self, stage: Stage, shelf: Shelf, *, seed: int) -> None:
        self.stage, self.shelf, self.random = stage, shelf, Random(seed)
        self.cold = Cold(stage.db, shelf, grace=NOW, quiet=LONG, renew=timedelta(milliseconds=2))
        self.live: dict[UUID, dict[UUID, bytes]] = {}  # by session: its artifacts, as long as it is not being deleted
        self.late: list[tuple[str, bytes]] = []
        self.deleted: list[UUID] = []
        shelf.before = self.disturb

    async def disturb(self, doing: str, key: str) -> None:
        fate = self.random.random()
        if fate < 0.1:
            raise Unavailable("the store is away")
        if fate < 0.15:
            raise asyncio.CancelledError  # the process dies here
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)
        if fate > 0.8:
            await asyncio.sleep(self.random.random() / 200)

    async def write(self, count: int) -> None:
        for _ in range(count):
            if len(self.live) < 2:  # few, so that contents lose their last one often
                self.live[await session_of(self.stage)] = {}
            session = self.random.choice(list(self.live))  # it may be deleted before the put is through
            data = bytes([self.random.randrange(8)]) * 100
            identity = new_id() if self.random.random() < 0.7 else UUID(int=data[0])
            try:
                made = await put(self.cold, self.stage, data, artifact_id=identity, session_id=session)
            except Unavailable:
                continue
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
                digest = hashlib.sha256(data).hexdigest()
                self.late += [(key, data) for key in self.shelf.puts if digest in key]  # uploads that may still come
                continue
            except NotFound:
                assert session not in self.live  # it was deleted meanwhile
                continue
            if session in self.live:
                self.live[session][made] = data

    async def drop(self) -> None:
        while True:
            await asyncio.sleep(self.random.random() / 50)
            if self.live:
                session = self.random.choice(list(self.live))
                del self.live[session]
                self.deleted.append(session)
                await self._survive(delete_session(self.stage, self.cold, session))

    async def collect(self) -> None:
        while True:
            await asyncio.sleep(self.random.random() / 200)
            await self._survive(self.cold.collect(keep_uploads=NOW))

    async def check(self) -> None:
        """What a living session refers to can be read."""
        for session, artifacts in list(self.live.items()):
            for artifact, data in list(artifacts.items())[-20:]:
                try:
                    assert await self.cold.read(artifact, tenant_id=self.stage.tenant) == data
                except NotFound:
                    assert session not in self.live

    async def check_always(self) -> None:
        while True:
            await asyncio.sleep(self.random.random() / 200)
            await self.check()

    async def _survive(self, work: Awaitable[Any]) -> None:
        try:
            await work
        except (Unavailable, asyncio.CancelledError):
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise


async def race(stage: Stage, shelf: Shelf, *, seed: int, rounds: int) -> None:
    chaos = Chaos(stage, shelf, seed=seed)
    async with asyncio.TaskGroup() as group:
        others = [chaos.collect(), chaos.collect(), chaos.drop(), chaos.check_always()]
        tasks = [group.create_task(other) for other in others]
        await asyncio.gather(*(chaos.write(rounds) for _ in range(4)))
        for task in tasks:
            task.cancel()
    shelf.before = _nothing
    await chaos.check()
    for key, data in dict(chaos.late).items():  # uploads of the dead, now
        await shelf.store.put(key, data, content_type="text/plain")
    await chaos.check()
    assert len(set(shelf.puts)) > rounds / 10  # else nothing was ever collected under a writer
    for session in [*chaos.live, *chaos.deleted]:  # deletions that were cut off are finished, too
        await delete_session(stage, chaos.cold, session)
    for quiet in (LONG, NOW):
        await Cold(stage.db, shelf, grace=NOW, quiet=quiet).collect(keep_uploads=NOW)
    assert shelf.keys == []
    assert set((await rows(stage)).values()) == {0}


@pytest.mark.parametrize("seed", [1, 2])
async def test_writers_collectors_and_deletions_race_and_nothing_is_lost_or_left(
    stage: Stage, shelf: Shelf, seed: int
) -> None:
    await race(stage, shelf, seed=seed, rounds=40)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10, 20))
async def test_the_same_for_longer(stage: Stage, shelf: Shelf, seed: int) -> None:
    await race(stage, shelf, seed=seed, rounds=300)


async def test_a_spooled_file_is_put_like_bytes(stage: Stage, shelf: Shelf) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield TEXT

    with await spool(pieces(), limit=100) as body:
        assert isinstance(body, Spooled)
        record, _ = await cold_of(stage, shelf).put(body, tenant_id=stage.tenant, name="n", content_type="text/plain")

    assert (record.sha256, record.size) == (HASH, len(TEXT))


async def test_the_collector_of_the_fleet_counts_what_it_removes_and_survives_a_store_that_is_away(
    stage: Stage, shelf: Shelf
) -> None:
    metrics = WorkerMetrics()
    collector = Collector(cold_of(stage, shelf), leads=lambda: True, keep_uploads=NOW, metrics=metrics)
    await put(cold_of(stage, shelf), stage)

    async def away(doing: str, key: str) -> None:
        raise Unavailable("the store is away")

    shelf.before = away
    assert await collector.collect() == Dropped()
    shelf.before = _nothing
    await put(cold_of(stage, shelf), stage, b"other")
    assert await collector.collect() == Dropped(1, 1, len(b"other"))

    assert shelf.keys == []
    counted = {
        what: metrics.registry.get_sample_value("longshift_collected_total", {"what": what})
        for what in ("artifacts", "blobs", "bytes")
    }
    assert counted == {"artifacts": 1, "blobs": 1, "bytes": 5}
