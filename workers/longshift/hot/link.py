"""The connections to Redis, and whether it answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Link:
    """One process's connections to Redis. ``up`` says whether it answered when it was last asked."""

    def __init__(self, redis: Redis, *, limit: float) -> None:
        """``limit``: seconds of a whole call; redis-py's own limits hold for each of its attempts."""
        self.redis = redis
        self._limit = limit
        self.up = True

    async def ask(self, asking: Awaitable[T], *, otherwise: T) -> T:
        """The answer; ``otherwise`` if there is none in time, which is logged once per outage."""
        try:
            async with asyncio.timeout(self._limit):
                answer = await asking
        except (RedisError, OSError) as error:
            self.failed(error)
            return otherwise
        self.answered()
        return answer

    async def send(self, sending: Awaitable[object]) -> bool:
        """Whether Redis took it."""

        async def sent() -> bool:
            await sending
            return True

        return await self.ask(sent(), otherwise=False)

    def answered(self) -> None:
        if not self.up:
            self.up = True
            logger.info("redis answers again")

    def failed(self, error: BaseException) -> None:
        if self.up:
            self.up = False
            logger.warning("redis does not answer", extra={"reason": reason(error)})


def reason(error: BaseException) -> str:
    """What happened, without addresses that might carry a password."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}"
