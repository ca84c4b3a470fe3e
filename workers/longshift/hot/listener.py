"""One pub/sub connection for everybody in the process who waits for something."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import Context

from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from longshift.ending import end
from longshift.hot.link import reason

logger = logging.getLogger(__name__)

FOLLOWED_WITHIN = 0.5
"""Seconds that a new listener waits for Redis; then it looks at Postgres without."""
RETRY_PAUSE = 0.5


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
            # in contexts of their own: these outlast the request or the turn that happened to listen first
            self._tasks = [
                asyncio.create_task(self._follow(self._pubsub), name="redis-follower", context=Context()),
                asyncio.create_task(self._read(self._pubsub), name="redis-listener", context=Context()),
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
                logger.debug("cannot subscribe", extra={"reason": reason(error)})
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
                logger.debug("cannot listen", extra={"reason": reason(error)})
                await asyncio.sleep(RETRY_PAUSE)
                continue
            if message is None:
                continue
            text = message["data"].decode(errors="replace")  # anybody may publish anything
            for queue in self._queues.get(message["channel"].decode(errors="replace"), ()):
                with suppress(asyncio.QueueFull):
                    queue.put_nowait(text)
