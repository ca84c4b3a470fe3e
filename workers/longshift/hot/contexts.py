"""Hot contexts: copies that anybody may lose, and that nobody believes without having looked.

    put -> (in the background, many together) -> COMPARE_AND_SET         get -> (all of one tick together) -> MGET

A copy is written by whoever holds the session's lease, from what Postgres has acknowledged; or for a session that nobody
holds (pre-warming), under the epoch of its last lease. A process that was paused meanwhile writes late, under its old
epoch: the script refuses it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

from redis.exceptions import RedisError

from longshift.ending import end
from longshift.events import Context
from longshift.hot import copies
from longshift.hot.copies import PLACE, Broken, Copy, Key, key_name
from longshift.hot.link import Link
from longshift.model import Kept

logger = logging.getLogger(__name__)

PAUSE = 0.02
"""Seconds in which copies gather before they are written."""
BATCH = 1024 * 1024
"""Characters that are written in one round trip, about: encoding more would hold up the event loop."""
PENDING = 64 * 1024 * 1024
"""Characters that may wait to be written; beyond that, the oldest are not."""
LARGEST = 8 * 1024 * 1024
"""Characters of a context, at most: a larger one would hold up everybody who uses Redis."""
READ_LIMIT = 0.25
"""Seconds for which a turn's start waits for copies: after that Postgres is faster."""
READ_AT_ONCE = 200

# Numbers as text of a fixed length: Lua's own are doubles, exact only up to 2^53.
COMPARE_AND_SET = f"""
local new, old = ARGV[1], redis.pcall('GETRANGE', KEYS[1], 0, {PLACE - 1})
if type(old) == 'string' and #old == {PLACE} and old:match('^%d+ %d+ %x+$') then
    local mine, theirs = new:sub(1, 19), old:sub(1, 19)
    if theirs > mine then return 'stale' end
    if theirs == mine then
        local next, last = new:sub(21, 39), old:sub(21, 39)
        if next == last and new:sub(1, {PLACE}) == old then
            redis.call('PEXPIRE', KEYS[1], ARGV[2])
            return 'kept'
        end
        if next <= last then return 'behind' end
    end
end
redis.call('SET', KEYS[1], new, 'PX', ARGV[2])
return 'set'"""
DROP = (
    "if redis.call('GETRANGE', KEYS[1], 0, #ARGV[1] - 1) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
)


@dataclass(frozen=True, slots=True)
class Put:
    """A context to be copied; nobody changes it any more."""

    context: Context
    epoch: int
    kept: Kept
    size: int


class Contexts:
    """The hot copies of contexts, for one process. A Redis that fails has none, and takes none."""

    def __init__(self, link: Link, *, ttl: timedelta) -> None:
        self._link = link
        self._ttl = max(1, round(ttl.total_seconds() * 1000))
        self._asked: dict[Key, list[asyncio.Future[bytes | None]]] = {}
        self._puts: dict[Key, Put] = {}  # the oldest first
        self._size = 0
        self._reads: set[asyncio.Task[None]] = set()
        self._writer: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """What has not been written yet never will be: ``flush`` first."""
        await end([*self._reads, *([self._writer] if self._writer is not None else [])])

    # -- reading

    async def get(self, key: Key) -> Copy | Broken | None:
        """The copy of one session; None: there is none, or Redis does not answer.

        All that is asked for in one tick of the event loop goes in one round trip.
        """
        if not self._link.up:
            return None
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._ask)
        future = loop.create_future()
        self._asked.setdefault(key, []).append(future)
        raw = await future
        return copies.read(raw) if raw is not None else None

    async def known(self, keys: Iterable[Key]) -> set[Key]:
        """Which of these sessions have something here, in one round trip. All of them if Redis does not answer: there is
        nothing that anybody could do for them."""
        wanted = list(keys)
        if not wanted or not self._link.up:
            return set(wanted)
        pipeline = self._link.redis.pipeline(transaction=False)
        for key in wanted:
            pipeline.exists(key_name(key))
        found = await self._link.ask(pipeline.execute(), otherwise=None)
        return set(wanted) if found is None else {key for key, there in zip(wanted, found, strict=True) if there}

    def _ask(self) -> None:
        asked, self._asked = list(self._asked.items()), {}
        for start in range(0, len(asked), READ_AT_ONCE):
            task = asyncio.create_task(self._fetch(asked[start : start + READ_AT_ONCE]), name="hot-contexts-read")
            self._reads.add(task)
            task.add_done_callback(self._reads.discard)

    async def _fetch(self, asked: Sequence[tuple[Key, list[asyncio.Future[bytes | None]]]]) -> None:
        found: Sequence[bytes | None] = [None] * len(asked)
        try:
            async with asyncio.timeout(READ_LIMIT):
                names = [key_name(key) for key, _ in asked]
                found = cast(list[bytes | None], await self._link.redis.mget(names))
        except TimeoutError:  # ours: this process may be busy, which says nothing of Redis
            logger.debug("hot contexts do not come in time", extra={"contexts": len(asked)})
        except (RedisError, OSError) as error:
            self._link.failed(error)
        finally:
            for (_, futures), raw in zip(asked, found, strict=True):
                for future in futures:
                    if not future.done():
                        future.set_result(raw)

    # -- writing

    def put(self, key: Key, context: Context, *, epoch: int, kept: Kept) -> None:
        """Copy ``context``, soon, in the background, if nothing newer is there; it must not be changed from now on."""
        size = context.size
        if context.event_id is None or size > LARGEST or not self._link.up:
            return
        self._forget(key)
        self._puts[key] = Put(context, epoch, kept, size)
        self._size += size
        while self._size > PENDING:
            self._forget(next(iter(self._puts)))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_soon(), name="hot-contexts-write")

    async def flush(self) -> None:
        """Write all that waits."""
        while self._puts:
            batch: dict[Key, Put] = {}
            size = 0
            while self._puts and size < BATCH:
                key = next(iter(self._puts))
                batch[key] = self._puts[key]
                size += self._forget(key)
            values = [copies.write(put.context, epoch=put.epoch, kept=put.kept) for put in batch.values()]
            if not await self._set(list(batch), values):
                while self._puts:  # they would wait as long as Redis is away, and be old by then
                    self._forget(next(iter(self._puts)))

    async def store(self, key: Key, context: Context, *, epoch: int, kept: Kept) -> bool:
        """The same at once; whether the copy is there now."""
        if context.size > LARGEST:
            return False
        answers = await self._set([key], [copies.write(context, epoch=epoch, kept=kept)])
        return answers in ([b"set"], [b"kept"])

    async def bury(self, key: Key, *, epoch: int) -> bool:
        """The session is deleted: nothing of this epoch or an older one is copied any more; whether Redis took it.

        ``epoch``: a new one, of which no context was ever written.
        """
        self._forget(key)
        return await self._set([key], [copies.write_buried(epoch=epoch)]) in ([b"set"], [b"kept"])

    async def drop(self, key: Key, found: Copy | Broken) -> None:
        """Remove what was found, unless something else is there by now."""
        evaluated = cast(Any, self._link.redis.eval(DROP, 1, key_name(key), found.mark))
        await self._link.send(evaluated)

    def _forget(self, key: Key) -> int:
        put = self._puts.pop(key, None)
        size = put.size if put is not None else 0
        self._size -= size
        return size

    async def _write_soon(self) -> None:
        while self._puts:
            await asyncio.sleep(PAUSE)
            await self.flush()

    async def _set(self, keys: Sequence[Key], values: Sequence[bytes]) -> list[object]:
        """What the script says of each; nothing if Redis does not answer."""
        pipeline = self._link.redis.pipeline(transaction=False)
        for key, value in zip(keys, values, strict=True):
            pipeline.eval(COMPARE_AND_SET, 1, key_name(key), value, self._ttl)
        # a Redis without memory refuses each by itself, which is its right
        answers: list[object] = await self._link.ask(pipeline.execute(raise_on_error=False), otherwise=[])
        return answers
