"""Redis: wake-ups, notifications and deltas. The only module that talks to it; nothing here is needed for correctness.

    longshift.wake.<queue>       list     wake-ups, see wakeup.py; lossy by design, the sweeper rings again
    longshift.turn.<turn hex>    channel  a turn changed: its new status
    longshift.log.<session hex>  channel  the log grew: {"seq": n}; or a delta: {"delta", "turn", "step", "attempt"}

There is no key without a time to live beside the wake-up lists. Every failure of Redis is swallowed here, logged once
per outage and reported by ``up``: the fleet is slower without it, never wrong. Nothing waits long for a Redis that hangs:
each call has a limit as a whole, whatever it does to connect and to try again, and listeners do not wait for each other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from itertools import chain
from typing import Any
from uuid import UUID

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from longshift import wakeup
from longshift.ending import end
from longshift.errors import ConfigError, Unavailable
from longshift.events import storable

logger = logging.getLogger(__name__)
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
FOLLOWED_WITHIN = 0.5
"""Seconds that a new listener waits for Redis; then it looks at Postgres without."""
RETRY_PAUSE = 0.5


def turn_channel(turn_id: UUID) -> str:
    return f"longshift.turn.{turn_id.hex}"


def log_channel(session_id: UUID) -> str:
    return f"longshift.log.{session_id.hex}"


class Hot:
    """One process's connections to Redis."""

    def __init__(self, url: str, *, timeout: timedelta = timedelta(seconds=2)) -> None:
        seconds = timeout.total_seconds()
        self._limit = 2 * seconds  # of a whole call: redis-py's own limits hold for each of its attempts
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
        self._listener = Listener(self._redis)
        self.up = True

    async def close(self) -> None:
        await self._listener.close()
        await self._redis.aclose()

    async def check(self) -> None:
        """Raises ``Unavailable`` if Redis does not answer."""
        try:
            async with asyncio.timeout(self._limit):
                await self._redis.ping()
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis does not answer at LONGSHIFT_REDIS_URL: {_reason(error)}") from None

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
        return await self._send(pipeline.execute())

    async def backlog(self, queues: Sequence[str]) -> dict[str, int] | None:
        """Wake-up messages not yet taken, by queue; None if Redis does not answer."""
        pipeline = self._redis.pipeline(transaction=False)
        for queue in queues:
            pipeline.llen(wakeup.queue_key(queue))
        try:
            async with asyncio.timeout(self._limit):
                return dict(zip(queues, await pipeline.execute(), strict=True))
        except (RedisError, OSError) as error:
            self._failed(error)
            return None

    async def announce(self, messages: Iterable[tuple[str, str]]) -> bool:
        """Publish (channel, text) pairs: one command and one reply for many, since most have no listener."""
        pairs = list(messages)
        for start in range(0, len(pairs), ANNOUNCED_AT_ONCE):
            arguments = chain.from_iterable(pairs[start : start + ANNOUNCED_AT_ONCE])
            if not await self._send(self._redis.eval(PUBLISH, 0, *arguments)):
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

    async def _send(self, sending: Any) -> bool:
        try:
            async with asyncio.timeout(self._limit):
                await sending
        except (RedisError, OSError) as error:
            self._failed(error)
            return False
        if not self.up:
            self.up = True
            logger.info("redis answers again")
        return True

    def _failed(self, error: BaseException) -> None:
        if self.up:
            self.up = False
            logger.warning("redis does not answer", extra={"reason": _reason(error)})


class Listener:
    """One pub/sub connection shared by everybody in the process who waits for something.

    One task sends (``_follow``), one reads; whoever listens talks to neither, so that a Redis that hangs delays nobody by
    more than ``FOLLOWED_WITHIN``.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._queues: dict[str, set[asyncio.Queue[str]]] = {}
        self._subscribed: set[str] = set()
        self._changed = asyncio.Event()
        self._followed = asyncio.Event()  # replaced after each change
        self._pubsub: PubSub | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def channels(self) -> frozenset[str]:
        """Those subscribed to."""
        return frozenset(self._subscribed)

    @asynccontextmanager
    async def listen(self, *channels: str) -> AsyncIterator[asyncio.Queue[str]]:
        queue: asyncio.Queue[str] = asyncio.Queue(maxsize=1000)
        for channel in channels:
            self._queues.setdefault(channel, set()).add(queue)
        try:
            await self._until_followed(channels)
            yield queue
        finally:
            for channel in channels:
                self._queues[channel].discard(queue)
                if not self._queues[channel]:
                    del self._queues[channel]
            self._changed.set()

    async def close(self) -> None:
        await end(self._tasks)
        if self._pubsub is not None:
            await self._pubsub.aclose()

    async def _until_followed(self, channels: Sequence[str]) -> None:
        self._changed.set()
        if self._pubsub is None:
            self._pubsub = self._redis.pubsub(ignore_subscribe_messages=True)
            self._tasks = [
                asyncio.create_task(self._follow(self._pubsub), name="redis-follower"),
                asyncio.create_task(self._read(self._pubsub), name="redis-listener"),
            ]
        with suppress(TimeoutError):
            async with asyncio.timeout(FOLLOWED_WITHIN):
                while not self._subscribed.issuperset(channels):
                    await self._followed.wait()

    async def _follow(self, pubsub: PubSub) -> None:
        """Subscribe and unsubscribe, for ever, as those who listen need it."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            wanted = set(self._queues)
            try:
                if new := wanted - self._subscribed:
                    await pubsub.subscribe(*new)
                    self._subscribed |= new
                if old := self._subscribed - wanted:
                    await pubsub.unsubscribe(*old)
                    self._subscribed -= old
            except Exception as error:  # noqa: BLE001 - redis-py raises anything when its reader loses the connection
                # meanwhile, also AttributeError; and if this task ended, nobody in the process would hear anything again
                logger.debug("cannot subscribe", extra={"reason": _reason(error)})
                self._changed.set()
                await asyncio.sleep(RETRY_PAUSE)
            self._followed.set()
            self._followed = asyncio.Event()

    async def _read(self, pubsub: PubSub) -> None:
        """Hand out messages, for ever; redis-py re-subscribes after a reconnect what was subscribed before."""
        while True:
            try:
                message = await pubsub.get_message(timeout=5.0)
            except Exception as error:  # noqa: BLE001 - as above; and RuntimeError while it has never been connected
                logger.debug("cannot listen", extra={"reason": _reason(error)})
                await asyncio.sleep(RETRY_PAUSE)
                continue
            if message is None:
                continue
            text = message["data"].decode(errors="replace")  # anybody may publish anything
            for queue in self._queues.get(message["channel"].decode(errors="replace"), ()):
                with suppress(asyncio.QueueFull):
                    queue.put_nowait(text)


def delta_message(text: str, *, turn_id: UUID, step: str, attempt: int) -> str:
    return json.dumps(
        {"delta": storable(text), "turn": turn_id.hex, "step": step, "attempt": attempt}, ensure_ascii=False
    )


def _messages(ids: Sequence[UUID], *, queue: str) -> list[bytes]:
    """One session a message while they are few, so that workers share them; fuller messages in a burst, because each costs
    its worker about a millisecond."""
    size = min(wakeup.MAX_SESSIONS, max(1, len(ids) // 16))
    return [wakeup.encode(ids[i : i + size], queue=queue) for i in range(0, len(ids), size)]


def _reason(error: BaseException) -> str:
    """What happened, without addresses that might carry a password."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}"
