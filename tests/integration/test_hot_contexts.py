"""Copies of contexts in a real Redis: the compare-and-set, what it refuses, and that nothing wrong is ever taken for a copy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from random import Random

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longshift.embedded import LocalRedis
from longshift.events import Context
from longshift.hot import Broken, Copy, Hot, Key
from longshift.hot.copies import key_name
from longshift.model import Kept, new_id
from longshift.testing.waiting import wait_until

CLIENTS = 6
WRITES = 60


@pytest.fixture
async def hot(redis_url: str) -> AsyncIterator[Hot]:
    hot = Hot(redis_url)
    yield hot
    await hot.close()


def new_key() -> Key:
    return new_id(), new_id()


def context(seq: int, *, said: str = "hello") -> Context:
    return Context(seq, new_id(), [f'{{"role":"user","content":"{said}","turn_id":null}}'], {"page": "17"})


async def seq_of(hot: Hot, key: Key) -> int | None:
    copy = await hot.contexts.get(key)
    assert not isinstance(copy, Broken)
    return copy.context.seq if copy is not None and copy.context is not None else None


async def test_what_is_read_is_what_was_written(hot: Hot) -> None:
    key, written, kept = new_key(), context(7, said="grüß dich 🙂"), Kept(5, 12)

    assert await hot.contexts.store(key, written, epoch=3, kept=kept)

    copy = await hot.contexts.get(key)
    assert isinstance(copy, Copy)
    assert (copy.context, copy.epoch, copy.kept) == (written, 3, kept)
    assert await hot.contexts.get(new_key()) is None


async def test_a_copy_moves_forward_and_yields_to_a_newer_epoch_only(hot: Hot) -> None:
    key, at_nine, huge = new_key(), context(9), 2**62  # as doubles, this epoch and the next one are the same number
    store = hot.contexts.store

    assert await store(key, context(5), epoch=huge, kept=Kept())
    assert await store(key, at_nine, epoch=huge, kept=Kept())
    assert await store(key, at_nine, epoch=huge, kept=Kept())
    assert not await store(key, context(9), epoch=huge, kept=Kept())
    assert not await store(key, context(8), epoch=huge, kept=Kept())
    assert not await store(key, context(99), epoch=huge - 1, kept=Kept())
    assert await seq_of(hot, key) == 9
    assert await store(key, context(2), epoch=huge + 1, kept=Kept())
    assert await seq_of(hot, key) == 2


async def test_a_late_write_of_a_worker_that_was_paused_yields(hot: Hot) -> None:
    key, newer = new_key(), context(30)
    hot.contexts.put(key, context(20), epoch=1, kept=Kept())  # and then SIGSTOP
    await hot.contexts.store(key, newer, epoch=2, kept=Kept())

    await hot.contexts.flush()

    assert await seq_of(hot, key) == 30


async def test_nothing_old_comes_back_after_a_deletion(hot: Hot) -> None:
    key = new_key()
    await hot.contexts.store(key, context(5), epoch=3, kept=Kept())

    assert await hot.contexts.bury(key, epoch=4)

    copy = await hot.contexts.get(key)
    assert isinstance(copy, Copy)
    assert copy.context is None
    assert not await hot.contexts.store(key, context(50), epoch=3, kept=Kept())
    assert not await hot.contexts.store(key, context(50), epoch=4, kept=Kept())
    assert not await hot.contexts.bury(key, epoch=3)


async def test_only_what_was_found_is_dropped(hot: Hot) -> None:
    key = new_key()
    await hot.contexts.store(key, context(5), epoch=3, kept=Kept())
    found = await hot.contexts.get(key)
    assert found is not None
    await hot.contexts.store(key, context(6), epoch=3, kept=Kept())

    await hot.contexts.drop(key, found)
    assert await seq_of(hot, key) == 6

    newer = await hot.contexts.get(key)
    assert newer is not None
    await hot.contexts.drop(key, newer)
    assert await hot.contexts.get(key) is None


async def test_a_copy_has_a_time_to_live_that_each_write_renews(redis_url: str) -> None:
    hot, key, written = Hot(redis_url, context_ttl=timedelta(seconds=100)), new_key(), context(5)
    await hot.contexts.store(key, written, epoch=1, kept=Kept())
    with redis.Redis.from_url(redis_url) as client:
        client.pexpire(key_name(key), 1000)
        await hot.contexts.store(key, written, epoch=1, kept=Kept())
        assert 90_000 < client.pttl(key_name(key)) <= 100_000
        await hot.contexts.bury(key, epoch=2)
        assert 90_000 < client.pttl(key_name(key)) <= 100_000
    await hot.close()


async def test_all_that_is_asked_in_one_tick_goes_in_one_command(hot: Hot, redis_url: str) -> None:
    keys = [new_key() for _ in range(20)]
    for seq, key in enumerate(keys[:10], 1):
        hot.contexts.put(key, context(seq), epoch=1, kept=Kept())
    await hot.contexts.flush()
    with redis.Redis.from_url(redis_url) as client:
        client.config_resetstat()

        found = await asyncio.gather(*(hot.contexts.get(key) for key in keys))
        assert await hot.contexts.known(keys) == set(keys[:10])

        counts = client.info("commandstats")
    assert [copy is not None for copy in found] == [True] * 10 + [False] * 10
    assert counts["cmdstat_mget"]["calls"] == 1


async def test_what_is_put_is_written_in_the_background(hot: Hot) -> None:
    key = new_key()

    hot.contexts.put(key, context(4), epoch=1, kept=Kept())
    hot.contexts.put(key, context(8), epoch=1, kept=Kept())

    assert await wait_until(lambda: _is_eight(hot, key), description="the copy is written")


async def _is_eight(hot: Hot, key: Key) -> bool:
    return await seq_of(hot, key) == 8


# -- real concurrency


@dataclass(frozen=True)
class Wish:
    epoch: int
    seq: int


async def test_of_many_writers_at_once_the_newest_epoch_wins_and_nothing_goes_back(redis_url: str) -> None:
    """Each client has connections of its own and writes in an order of its own. In one epoch there is one history, so that
    a copy is known by its place; a reader looks all the while."""
    key, random = new_key(), Random(11)
    contexts = {Wish(epoch, seq): context(seq, said=f"{epoch}.{seq}") for epoch in (1, 2, 3) for seq in range(1, 15)}
    clients = [Hot(redis_url) for _ in range(CLIENTS)]
    plans = [random.choices(list(contexts), k=WRITES) for _ in clients]
    seen: list[Wish] = []
    done = asyncio.Event()

    async def write(hot: Hot, plan: list[Wish]) -> None:
        for wish in plan:
            await hot.contexts.store(key, contexts[wish], epoch=wish.epoch, kept=Kept())

    async def look(hot: Hot) -> None:
        while not done.is_set():
            copy = await hot.contexts.get(key)
            assert copy is None or isinstance(copy, Copy), "a read always parses"
            if copy is not None and copy.context is not None:
                wish = Wish(copy.epoch, copy.context.seq)
                assert copy.context == contexts[wish]
                seen.append(wish)

    reader = Hot(redis_url)
    looking = asyncio.create_task(look(reader))
    await asyncio.gather(*(write(hot, plan) for hot, plan in zip(clients, plans, strict=True)))
    done.set()
    await looking

    assert seen == sorted(seen, key=lambda wish: (wish.epoch, wish.seq)), "the copy never goes back"
    last = max(wish.epoch for plan in plans for wish in plan)
    newest = max(wish.seq for plan in plans for wish in plan if wish.epoch == last)
    assert await seq_of(reader, key) == newest
    for hot in [*clients, reader]:
        await hot.close()


wishes = st.lists(st.builds(Wish, st.integers(1, 4), st.integers(1, 6)), max_size=25)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(wishes)
def test_the_script_does_what_the_model_says(redis_server: LocalRedis, plan: list[Wish]) -> None:
    asyncio.run(_follow(redis_server.url, plan))


async def _follow(url: str, plan: list[Wish]) -> None:
    """The model is one comparison: by epoch, then by place."""
    hot, key, have = Hot(url), new_key(), (0, 0)
    contexts = {wish: context(wish.seq) for wish in set(plan)}
    for wish in plan:
        taken = await hot.contexts.store(key, contexts[wish], epoch=wish.epoch, kept=Kept())
        assert taken == ((wish.epoch, wish.seq) >= have if wish.epoch == have[0] else wish.epoch > have[0])
        have = max(have, (wish.epoch, wish.seq)) if taken else have
        copy = await hot.contexts.get(key)
        assert isinstance(copy, Copy)
        assert copy.context is not None
        assert (copy.epoch, copy.context.seq) == have
    await hot.close()


# -- what is not as it was written


async def test_no_byte_of_a_copy_can_change_unnoticed(hot: Hot, redis_url: str) -> None:
    key = new_key()
    await hot.contexts.store(key, context(1234, said="x" * 300), epoch=77, kept=Kept(5, 12))
    random = Random(3)
    with redis.Redis.from_url(redis_url) as client:
        right = client.get(key_name(key))
        assert isinstance(right, bytes)
        for place in range(len(right)):
            wrong = bytearray(right)
            wrong[place] ^= random.randrange(1, 256)
            client.set(key_name(key), bytes(wrong))
            assert isinstance(await hot.contexts.get(key), Broken), f"byte {place}"
        for wrong_value in (right[:-1], right + b"x", right[: len(right) // 2], b"", b"\n", right[1:], b"[]"):
            client.set(key_name(key), wrong_value)
            assert isinstance(await hot.contexts.get(key), Broken), wrong_value[:20]


@pytest.mark.parametrize("what", ["text", "nothing", "a list"])
async def test_what_is_no_copy_is_replaced_by_one(hot: Hot, redis_url: str, what: str) -> None:
    key = new_key()
    with redis.Redis.from_url(redis_url) as client:
        match what:
            case "text":
                client.set(key_name(key), "9" * 72)
            case "nothing":
                client.set(key_name(key), "")
            case _:
                client.rpush(key_name(key), "a", "b")

    assert await hot.contexts.store(key, context(5), epoch=1, kept=Kept())
    assert await seq_of(hot, key) == 5


async def test_a_redis_that_is_away_has_no_copies_and_takes_none() -> None:
    hot, key = Hot("redis://127.0.0.1:1", timeout=timedelta(milliseconds=200)), new_key()
    for _ in range(2):  # the second time it is known
        assert await hot.contexts.get(key) is None
        assert not await hot.contexts.store(key, context(5), epoch=1, kept=Kept())
        hot.contexts.put(key, context(5), epoch=1, kept=Kept())
        await hot.contexts.flush()
        assert await hot.contexts.known([key]) == {key}
        assert not await hot.contexts.bury(key, epoch=2)
    await hot.close()
