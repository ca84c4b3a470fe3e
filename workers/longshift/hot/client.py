"""What a process says to Redis and hears from it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from itertools import chain
from typing import Any
from uuid import UUID

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from longshift import wakeup
from longshift.errors import ConfigError, Unavailable
from longshift.events import storable
from longshift.hot.contexts import Contexts
from longshift.hot.facts import Facts, look
from longshift.hot.link import Link, reason
from longshift.hot.listener import Listener

Rung = Iterable[tuple[UUID, str]]

KEEPALIVE = {
    getattr(socket, name): value
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)  # the first is not known to macOS
}
"""A Redis whose machine has vanished is noticed in 25 s. The system's own 2 hours would be the time for which a worker that
only listens takes no wake-up."""

PUBLISH = "for i = 1, #ARGV, 2 do redis.call('PUBLISH', ARGV[i], ARGV[i + 1]) end"
ANNOUNCED_AT_ONCE = 500


def turn_channel(turn_id: UUID) -> str:
    return f"longshift.turn.{turn_id.hex}"


def log_channel(session_id: UUID) -> str:
    return f"longshift.log.{session_id.hex}"


class Hot:
    """One process's connections to Redis; ``contexts`` are the hot copies of what agents see."""

    def __init__(
        self, url: str, *, timeout: timedelta = timedelta(seconds=2), context_ttl: timedelta = timedelta(hours=1)
    ) -> None:
        """``context_ttl``: how long a hot context stays after it was last written."""
        seconds = timeout.total_seconds()
        self._limit = 2 * seconds
        tcp: dict[str, Any] = {"socket_keepalive": True, "socket_keepalive_options": KEEPALIVE}
        if url.startswith("unix:"):  # redis-py's connection to a Unix socket refuses them
            tcp = {}
        try:
            self._redis = Redis.from_url(
                url,
                socket_timeout=seconds,
                socket_connect_timeout=seconds,
                **tcp,
                health_check_interval=25,
                retry=Retry(NoBackoff(), 1),
                max_connections=32,
            )
        except ValueError as error:
            raise ConfigError(f"LONGSHIFT_REDIS_URL must begin with redis://, rediss:// or unix://: {error}") from None
        self._link = Link(self._redis, limit=self._limit)
        self._listener = Listener(self._redis)
        self.contexts = Contexts(self._link, ttl=context_ttl)

    @property
    def up(self) -> bool:
        """Whether Redis answered when it was last asked."""
        return self._link.up

    async def close(self) -> None:
        await self.contexts.close()
        await self._listener.close()
        await self._redis.aclose()

    async def check(self) -> None:
        """Raises ``Unavailable`` if Redis does not answer."""
        try:
            async with asyncio.timeout(self._limit):
                await self._redis.ping()
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis does not answer at LONGSHIFT_REDIS_URL: {reason(error)}") from None

    async def facts(self) -> Facts:
        """What Redis says of itself, and whether it takes a write: a key of a moment.

        Raises:
            Unavailable: it does not answer.
        """
        try:
            async with asyncio.timeout(self._limit):
                return await look(self._redis)
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis does not answer at LONGSHIFT_REDIS_URL: {reason(error)}") from None

    async def ring(self, sessions: Rung, *, first: bool = False) -> bool:
        """Send wake-ups for (session, queue) pairs; False if Redis did not take them (the sweeper rings again).

        ``first``: before all others in their queue; for turns that had begun, and lost their worker.
        """
        by_queue: dict[str, list[UUID]] = {}
        for session_id, queue in sessions:
            by_queue.setdefault(queue, []).append(session_id)
        if not by_queue:
            return True
        pipeline = self._redis.pipeline(transaction=False)
        for queue, ids in by_queue.items():
            push = pipeline.rpush if first else pipeline.lpush  # workers take from the right
            push(wakeup.queue_key(queue), *_messages(ids, queue=queue))
        return await self._link.send(pipeline.execute())

    async def backlog(self, queues: Sequence[str]) -> dict[str, int] | None:
        """Wake-up messages not yet taken, by queue; None if Redis does not answer."""
        pipeline = self._redis.pipeline(transaction=False)
        for queue in queues:
            pipeline.llen(wakeup.queue_key(queue))
        found = await self._link.ask(pipeline.execute(), otherwise=None)
        return None if found is None else dict(zip(queues, found, strict=True))

    async def announce(self, messages: Iterable[tuple[str, str]]) -> bool:
        """Publish (channel, text) pairs: one command and one reply for many, since most have no listener."""
        pairs = list(messages)
        for start in range(0, len(pairs), ANNOUNCED_AT_ONCE):
            arguments = chain.from_iterable(pairs[start : start + ANNOUNCED_AT_ONCE])
            if not await self._link.send(self._redis.eval(PUBLISH, 0, *arguments)):
                return False
        return True

    @asynccontextmanager
    async def listen(self, *channels: str) -> AsyncIterator[asyncio.Queue[str]]:
        """The messages of these channels while the block lasts. Some may be missed: look at Postgres now and then."""
        async with self._listener.listen(*channels) as queue:
            yield queue

    def listeners(self) -> int:
        """How many channels somebody in this process listens to."""
        return len(self._listener.channels)


def delta_message(text: str, *, turn_id: UUID, step: str, attempt: int) -> str:
    return json.dumps(
        {"delta": storable(text), "turn": turn_id.hex, "step": step, "attempt": attempt}, ensure_ascii=False
    )


def _messages(ids: Sequence[UUID], *, queue: str) -> list[bytes]:
    """One session a message while they are few, so that workers share them; fuller messages in a burst, because each costs
    its worker about a millisecond."""
    size = min(wakeup.MAX_SESSIONS, max(1, len(ids) // 16))
    return [wakeup.encode(ids[i : i + size], queue=queue) for i in range(0, len(ids), size)]
