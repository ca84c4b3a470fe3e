"""Where a context may come from: whatever is in Redis, and whatever happens to answers, it is the fold of the log."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest
import redis
from psycopg import AsyncConnection
from psycopg.rows import dict_row
from sqlalchemy import Row, TextClause

from longshift import journal as journal_module
from longshift.archive import Archive
from longshift.clock import SYSTEM
from longshift.context import DEAR, Restored, Tier, Tiers, keep, restore
from longshift.db import leases, log
from longshift.db.database import Params
from longshift.errors import ArtifactCorrupt, LeaseLost, NotFound, StoreUnavailable, Unavailable
from longshift.events import Context, Event, Kind, NewEvent, fold
from longshift.hot import Hot, Key
from longshift.hot.copies import key_name
from longshift.journal import Journal
from longshift.lease import Fold, Lease
from longshift.metrics import WorkerMetrics
from longshift.model import Claim, Json, Kept, TurnRecord, TurnStatus, new_id
from longshift.port import Outside
from longshift.restoring import Restorer
from longshift.testing.waiting import wait_until
from longshift.warming import Warmer
from tests.integration.protocol.stage import Stage, Stepped, event

LENGTH = 30
Scenes = Callable[[], Awaitable["Scene"]]


@pytest.fixture
async def hot(redis_url: str) -> AsyncIterator[Hot]:
    hot = Hot(redis_url)
    yield hot
    await hot.close()


def facts(random: Random, count: int, *, turn: UUID | None = None) -> list[NewEvent]:
    """Events of all kinds that an agent makes between its steps, and steps."""

    def one() -> NewEvent:
        value = random.choice(["a\nb", 17, None, {"x": ["ü"]}, 0.1])
        kind, payload = random.choice(
            [
                (Kind.MESSAGE_SAID, {"role": "user", "content": value}),
                (Kind.STATE_CHANGED, {"set": {random.choice("abc"): value}}),
                (Kind.STATE_CHANGED, {"unset": [random.choice("abc")]}),
                (Kind.STEP_COMPLETED, {"name": "read", "result": value}),
                (Kind.CONTEXT_SUMMARIZED, {"replaces": random.randint(1, 3), "role": "system", "content": "so far"}),
            ]
        )
        return event(turn, kind, key=f"{kind}#{random.random()}", payload=json.dumps(payload))

    return [one() for _ in range(count)]


@dataclass
class Scene:
    """A session with a log that its holder wants the fold of, and a Redis."""

    stage: Stage
    hot: Hot
    redis_url: str
    claim: Claim
    log: list[Event]
    metrics: WorkerMetrics

    @property
    def key(self) -> Key:
        return self.claim.tenant_id, self.claim.session_id

    def fold(self, seq: int) -> Context:
        return fold(self.log[:seq])

    async def copied(self, context: Context, *, epoch: int | None = None) -> None:
        epoch = epoch if epoch is not None else self.claim.epoch
        assert await self.hot.contexts.store(self.key, context, epoch=epoch, kept=Kept(3, 7))

    async def restored(self, *, verify: float = 0, known: bool = True, **more: Any) -> Restored:
        tiers = Tiers(contexts=self.hot.contexts, metrics=self.metrics, verify=verify, **more)
        last = self.log[-1]
        session, event_id = self.claim.session_id, last.id if known else None
        return await restore(self.stage.db, session, through=last.seq, event_id=event_id, claim=self.claim, tiers=tiers)

    def drift(self) -> dict[str, float]:
        return drift_of(self.metrics)


def drift_of(metrics: WorkerMetrics) -> dict[str, float]:
    """What was counted, by reason."""
    [family] = metrics.drift.collect()
    return {s.labels["reason"]: s.value for s in family.samples if s.name.endswith("_total") and s.value}


@pytest.fixture
def scenes(stage: Stage, hot: Hot, redis_url: str) -> Scenes:
    """Makes scenes, each with a session of its own."""

    async def scene() -> Scene:
        session, _ = await stage.submit()
        claim = (await stage.claim(session)).claim
        assert await log.append(stage.db, [log.Append(claim, 1, tuple(facts(Random(5), LENGTH)))])
        return Scene(stage, hot, redis_url, claim, await log.read(stage.db, session), WorkerMetrics())

    return scene


@pytest.fixture
async def scene(scenes: Scenes) -> Scene:
    return await scenes()


# -- what may be in Redis


async def nothing(scene: Scene) -> None:
    pass


async def the_fold(scene: Scene) -> None:
    await scene.copied(scene.fold(LENGTH))


async def an_older_fold(scene: Scene) -> None:
    await scene.copied(scene.fold(11), epoch=1)


async def the_fold_and_a_flush(scene: Scene) -> None:
    await the_fold(scene)
    with redis.Redis.from_url(scene.redis_url) as client:
        client.flushall()


async def another_history_at_the_end(scene: Scene) -> None:
    await scene.copied(replace(scene.fold(LENGTH), event_id=new_id(), messages=["1"]))


async def another_history_before(scene: Scene) -> None:
    await scene.copied(replace(scene.fold(12), event_id=new_id(), messages=["1"]))


async def one_that_is_ahead(scene: Scene) -> None:
    await scene.copied(replace(scene.fold(LENGTH), seq=LENGTH + 1, event_id=new_id()))


async def of_a_newer_holder(scene: Scene) -> None:
    await scene.copied(replace(scene.fold(LENGTH), seq=LENGTH + 9, event_id=new_id()), epoch=scene.claim.epoch + 1)


async def a_tombstone(scene: Scene) -> None:
    assert await scene.hot.contexts.bury(scene.key, epoch=scene.claim.epoch + 1)


async def one_that_was_changed(scene: Scene) -> None:
    await the_fold(scene)
    with redis.Redis.from_url(scene.redis_url) as client:
        client.setrange(key_name(scene.key), 200, b"#")


async def something_else(scene: Scene) -> None:
    with redis.Redis.from_url(scene.redis_url) as client:
        client.set(key_name(scene.key), "[]")


STATES: list[tuple[Callable[[Scene], Awaitable[None]], Tier, str | None]] = [
    (nothing, Tier.WARM, None),
    (the_fold, Tier.HOT, None),
    (an_older_fold, Tier.HOT, None),
    (the_fold_and_a_flush, Tier.WARM, None),
    (another_history_at_the_end, Tier.WARM, "history"),
    (another_history_before, Tier.WARM, "history"),
    (one_that_is_ahead, Tier.WARM, "ahead"),
    (of_a_newer_holder, Tier.WARM, None),
    (a_tombstone, Tier.WARM, None),
    (one_that_was_changed, Tier.WARM, "digest"),
    (something_else, Tier.WARM, "unreadable"),
]


@pytest.mark.parametrize("known", [True, False], ids=["claimed", "resumed"])
async def test_whatever_redis_has_the_context_is_the_fold(scenes: Scenes, known: bool) -> None:
    """``known`` is the id of the last event at a claim; at a turn that comes again it is not, and the copy needs a proof."""
    for state, tier, reason in STATES:
        scene = await scenes()
        await state(scene)

        restored = await scene.restored(known=known)

        assert restored.context == scene.fold(LENGTH), state
        assert restored.tier is tier, state
        assert scene.drift() == ({} if reason is None else {reason: 1}), state
        if reason is not None:
            assert await scene.hot.contexts.get(scene.key) is None, "dropped"
            assert (await scene.restored(known=known)).context == scene.fold(LENGTH)
            assert sum(scene.drift().values()) == 1


async def test_a_copy_that_is_well_made_and_wrong_is_noticed_at_each_look(
    scenes: Scenes, caplog: pytest.LogCaptureFixture
) -> None:
    looks = 0
    for what in ("message", "order", "state", "nothing"):
        scene = await scenes()
        wrong = scene.fold(LENGTH)
        match what:
            case "message":
                wrong.messages[-1] = '{"role":"user","content":"secret","turn_id":null}'
            case "order":
                wrong.messages.append(wrong.messages.pop(0))
            case "state":
                wrong.remembered["a"] = '"secret"'
        for _ in range(3):
            await scene.copied(wrong)
            assert (await scene.restored(verify=1)).context == scene.fold(LENGTH)
            looks += what != "nothing"
        assert scene.drift().get("fold", 0) == (3 if what != "nothing" else 0)

    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == looks
    assert "secret" not in str([vars(record) for record in caplog.records])


async def test_a_wrong_fold_of_the_lease_is_noticed_too(scene: Scene) -> None:
    last = scene.log[-1]
    tiers = Tiers(metrics=scene.metrics, verify=1)
    wrong = Fold(replace(scene.fold(LENGTH), remembered={}), Kept())
    wrong.context.messages = wrong.context.messages[:-1]
    restored = await restore(
        scene.stage.db, scene.claim.session_id, through=last.seq, event_id=last.id, local=wrong, tiers=tiers
    )

    assert restored.context == scene.fold(LENGTH)
    assert scene.drift() == {"local": 1}


async def test_a_hot_context_of_the_last_event_asks_nothing_of_postgres(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.copied(scene.fold(LENGTH))
    monkeypatch.setattr(scene.stage, "db", None)

    assert (await scene.restored()).context == scene.fold(LENGTH)


async def test_redis_away_is_slower_and_nothing_else(scene: Scene) -> None:
    scene.hot = Hot("redis://127.0.0.1:1")

    assert (await scene.restored()).context == scene.fold(LENGTH)
    await scene.hot.close()


async def test_a_log_with_another_end_than_the_claim_saw_is_no_context(scene: Scene) -> None:
    """A failover has lost the tail: nobody may go on from there."""
    await scene.stage.hand.execute("DELETE FROM events WHERE session_id = %s AND seq > 20", (scene.claim.session_id,))

    for state in (nothing, an_older_fold):
        await state(scene)
        for known in (True, False):
            with pytest.raises(LeaseLost):
                await scene.restored(known=known)


async def test_a_copy_behind_the_newest_checkpoint_is_left_alone(scene: Scene) -> None:
    """Reading on from there could be the whole history."""
    await scene.copied(scene.fold(2))

    restored = await scene.restored(checkpoint_events=20)

    assert restored.tier is Tier.WARM
    assert restored.context == scene.fold(LENGTH)


async def test_a_tail_is_read_without_what_no_context_shows(scene: Scene) -> None:
    steps = sum(event.kind == Kind.STEP_COMPLETED for event in scene.log[10:-1])
    assert steps > 0
    await scene.copied(scene.fold(10))

    assert (await scene.restored()).rows <= LENGTH - 9 - steps


async def test_checkpoints_come_by_their_number_and_the_bookkeeping_survives_redis(scene: Scene) -> None:
    """Short events: by bytes none would be due."""
    half = Fold(scene.fold(15), Kept(0, 100))
    assert not await keep(scene.stage.db, scene.claim, half, every=16)
    assert await keep(scene.stage.db, scene.claim, half, every=15)
    assert half.kept.seq == 15
    await scene.hot.contexts.store(scene.key, half.context, epoch=scene.claim.epoch, kept=half.kept)

    restored = await scene.restored()

    assert restored.tier is Tier.HOT
    assert restored.fold.kept.seq == 15
    shown = [event for event in scene.log[15:] if event.kind != Kind.STEP_COMPLETED]
    assert restored.fold.kept.fresh == sum(len(json.dumps(event.payload)) for event in shown)
    assert not await keep(scene.stage.db, scene.claim, restored.fold, every=16)
    assert await keep(scene.stage.db, scene.claim, restored.fold, every=15)


# -- archived logs


class Stored:
    """An archive whose context is given."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def context(self, session_id: UUID) -> Context:
        return self._context.copy()


async def archived(scene: Scene, through: int) -> Any:
    await scene.stage.hand.execute(
        "UPDATE sessions SET archived_through = %s, archived_event_id = %s WHERE id = %s",
        (through, scene.log[through - 1].id, scene.claim.session_id),
    )
    await scene.stage.hand.execute(
        "DELETE FROM events WHERE session_id = %s AND seq <= %s", (scene.claim.session_id, through)
    )
    return cast(Archive, Stored(scene.fold(through)))


async def test_the_log_may_begin_in_the_archive(scenes: Scenes) -> None:
    for through, copy_at, tier in [
        (20, None, Tier.COLD),
        (30, None, Tier.COLD),
        (20, 20, Tier.HOT),
        (20, 25, Tier.HOT),
        (20, 10, Tier.COLD),  # what came after the copy is not in Postgres any more
    ]:
        scene = await scenes()
        archive = await archived(scene, through)
        if copy_at is not None:
            await scene.copied(scene.fold(copy_at))

        restored = await scene.restored(archive=archive, known=False, verify=1)

        assert restored.context == scene.fold(LENGTH)
        assert restored.tier is tier
        assert scene.drift() == {}
        if tier is Tier.COLD:  # so that the next one need not fetch it again
            assert await keep(scene.stage.db, scene.claim, restored.fold)
            again = await restore(scene.stage.db, scene.claim.session_id, through=LENGTH)
            assert again.context == scene.fold(LENGTH)


class Away:
    """An archive that cannot be read."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def context(self, session_id: UUID) -> Context:
        raise self._error


@pytest.mark.parametrize("error", [StoreUnavailable("away"), ArtifactCorrupt("rotten"), NotFound("gone")], ids=repr)
async def test_a_copy_is_used_though_there_is_nothing_to_compare_it_with(scene: Scene, error: Exception) -> None:
    await archived(scene, 20)
    await scene.copied(scene.fold(20))

    restored = await scene.restored(archive=cast(Archive, Away(error)), verify=1)

    assert (restored.tier, restored.context) == (Tier.HOT, scene.fold(LENGTH))
    assert scene.drift() == {}


async def test_without_an_archive_an_archived_log_is_not_taken_for_an_empty_one(scene: Scene) -> None:
    await archived(scene, 20)

    with pytest.raises(NotFound):
        await scene.restored()


async def test_what_is_warmed_for_a_turn_that_waits_is_what_it_will_ask_for(stage: Stage, hot: Hot) -> None:
    """Its own events are not part of it. Behind it another turn was accepted."""
    session, turn = await stage.submit()
    claim = (await stage.claim(session)).claim
    assert await log.append(stage.db, [log.Append(claim, 1, tuple(facts(Random(5), DEAR)))])
    begun = event(turn, Kind.TURN_STARTED, payload='{"attempt": 1, "input": 1}')
    assert await log.start(stage.db, [log.Start(claim, DEAR + 1, (begun,), turn, "1")])
    waits = event(turn, Kind.TURN_WAITING)
    assert await log.leave(
        stage.db, [log.Leave(claim, DEAR + 2, (waits,), turn, TurnStatus.WAITING, None, claim.mail_seq)]
    )
    await stage.submit(session)

    warmer = Warmer(stage.db, hot.contexts, cast(Archive, None))
    warmer.warm([(stage.tenant, session)])
    await wait_until(lambda: hot.contexts.known([(stage.tenant, session)]), description="warm")
    await warmer.close()
    await stage.signal(session)
    again, metrics = await stage.claim(session), WorkerMetrics()
    assert again.turn is not None
    assert again.turn.first_seq == DEAR + 1
    tiers = Tiers(contexts=hot.contexts, metrics=metrics)
    restored = await restore(stage.db, session, through=DEAR, claim=again.claim, tiers=tiers)

    assert restored.tier is Tier.HOT
    assert restored.context == fold((await log.read(stage.db, session))[:DEAR])
    assert drift_of(metrics) == {}


# -- leases


class Losing(Stepped):
    """A database whose answers get lost now and then, before or after it has done what it was told."""

    random = Random(0)
    chance = 0.0

    async def fetch(self, statement: TextClause, params: Params | None = None) -> Sequence[Row[Any]]:
        writes = statement in (log.APPEND, log.START, log.FINISH, log.LEAVE)
        if writes and self.random.random() < self.chance:
            raise Unavailable("the question is lost")
        rows = await super().fetch(statement, params)
        if writes and self.random.random() < self.chance:
            raise Unavailable("the answer is lost")
        return rows


@dataclass
class Fleet:
    """One session, run by worker after worker; each of them dies, waits, keeps its lease or gives it back at random."""

    stage: Stage
    hot: Hot
    redis_url: str
    random: Random
    metrics: WorkerMetrics
    session: UUID
    journal: Journal
    lease: Lease | None = None

    async def run(self, turns: int) -> None:
        for _ in range(turns):
            await self.stage.submit(self.session)
        while (await self.stage.row(self.session))["open_turns"]:
            await self.attempt()

    async def attempt(self) -> None:
        lease, record = await self.hold()
        known = await self.restorer.restore(lease, record)
        before, first = known.before, record.first_seq or lease.seq + 1
        payload = json.dumps({"attempt": record.attempts + 1, "input": {"n": self.random.random()}})
        begun = event(record.id, Kind.TURN_STARTED, payload=payload)
        await self.journal.write(lease, lambda seq: log.Start(lease.claim, seq, (begun,), record.id, "1"))
        assert before == fold((await self.log())[: first - 1])
        before.messages.append("what the turn adds to its own context comes into the lease's by the journal only")
        for _ in range(self.random.randrange(4)):
            await self.journal.append(lease, facts(self.random, self.random.randint(1, 4), turn=record.id))
            if self.random.random() < 0.3:
                await self.check(lease)
        await self.end(lease, record)

    async def hold(self) -> tuple[Lease, TurnRecord]:
        if self.lease is None:
            won = await self.stage.claim(self.session)
            lease, record = Lease(won.claim), won.turn
            self.journal.hold(lease)
        else:
            lease, record = self.lease, await leases.head(self.stage.db, self.session)
        assert record is not None
        return lease, record

    async def end(self, lease: Lease, record: TurnRecord) -> None:
        self.lease = None
        match self.random.choice(["keep", "keep", "release", "wait", "die", "flush"]):
            case "die":  # and somebody rescues what it held
                self.journal.drop(lease)
                await self.stage.hand.execute(
                    "UPDATE sessions SET lease_worker = NULL, ready_at = clock_timestamp() WHERE id = %s",
                    (self.session,),
                )
            case "wait":
                left = event(record.id, Kind.TURN_WAITING)
                await self.journal.write(
                    lease,
                    lambda seq: log.Leave(lease.claim, seq, (left,), record.id, TurnStatus.QUEUED, None, 0),
                )
            case what:
                ended = event(record.id, Kind.TURN_SUCCEEDED, payload='{"output":"so be it"}')
                done = await self.journal.write(
                    lease,
                    lambda seq: log.Finish(
                        lease.claim, seq, (ended,), record.id, TurnStatus.SUCCEEDED, "null", None, what == "keep"
                    ),
                )
                self.restorer.hand_on(lease)
                await self.hot.contexts.flush()
                await self.check(lease)
                self.lease = lease if done.flag else None
                if what == "flush":
                    with redis.Redis.from_url(self.redis_url) as client:
                        client.flushall()

    async def check(self, lease: Lease) -> None:
        """What the lease has with it is the fold of the log, to the letter."""
        has = lease.folded(lease.seq, lease.event_id)
        assert has is not None
        assert has.context == fold(await self.log())

    async def log(self) -> list[Event]:
        return await log.read(self.stage.db, self.session)

    @property
    def restorer(self) -> Restorer:
        tiers = Tiers(contexts=self.hot.contexts, metrics=self.metrics, verify=1, checkpoint_events=25)
        return Restorer(cast(Outside, SimpleNamespace(db=self.stage.db, clock=SYSTEM, tiers=tiers)))

    def restored(self) -> dict[str, Json]:
        [family] = self.metrics.contexts.collect()
        return {s.labels["tier"]: s.value for s in family.samples if s.name.endswith("_total")}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 20))])
async def test_the_fold_of_a_lease_is_the_fold_of_the_log_whatever_answers_are_lost(
    database_url: str, hot: Hot, redis_url: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RECONNECT", (0.0,))
    db, metrics = Losing(database_url), WorkerMetrics()
    async with await AsyncConnection.connect(database_url, autocommit=True, row_factory=dict_row) as hand:
        stage = Stage(database_url, db, hand)
        journal = Journal(db)
        journal.start_lanes()
        session, _ = await stage.submit()
        db.random, db.chance = Random(100 + seed), 0.1
        fleet = Fleet(stage, hot, redis_url, Random(seed), metrics, session, journal)

        await fleet.run(turns=25)

        assert drift_of(metrics) == {}
        assert fleet.restored().keys() == {"local", "hot", "warm"}
        await journal.close()
    await db.close()
