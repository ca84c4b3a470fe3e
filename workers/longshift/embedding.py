"""The embedder that a worker was given, kept at arm's length: it may be slow, wrong, or away, and no turn fails by it."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import cast

from longshift.aside import aside
from longshift.clock import SYSTEM, Clock
from longshift.errors import ConfigError

logger = logging.getLogger(__name__)

Plain = Callable[[list[str]], Sequence[Sequence[float]]]
Embedder = Callable[[list[str]], Awaitable[Sequence[Sequence[float]]] | Sequence[Sequence[float]]]
"""Texts to vectors, all of one length; async or plain."""

BATCH = 64
"""Texts of one call."""
TIMEOUT = timedelta(seconds=10)
"""Of one call."""
LEFT_ALONE = timedelta(seconds=30)
"""An embedder that has failed is not asked for so long: one that is away would hold up every recall."""
AT_ONCE = 2
"""Calls at a time; of a plain function that hangs, so many threads hang with it, and no more."""
LONGEST = 16_000
"""Numbers of a vector that pgvector takes."""


class EmbeddingFailed(Exception):
    """There are no vectors for these texts now."""


class Embedding:
    """An embedder with time limits."""

    def __init__(self, name: str, function: Embedder, *, clock: Clock = SYSTEM, timeout: timedelta = TIMEOUT) -> None:
        self._name, self._function, self._clock, self._timeout = name, function, clock, timeout
        self._length: int | None = None
        self._failing = False
        self._closed_until = 0.0
        self._slots = AT_ONCE

    @property
    def name(self) -> str | None:
        """Vectors of the same name can be compared; None: it is not known yet how long they are."""
        return f"{self._name}/{self._length}" if self._length is not None else None

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Vectors of up to ``BATCH`` texts.

        Raises:
            EmbeddingFailed: there is no usable answer in time, or there was none a short while ago.
        """
        if self._clock.monotonic() < self._closed_until or self._slots == 0:
            raise EmbeddingFailed
        try:
            vectors = self._checked(await self._ask(list(texts)), len(texts))
        except Exception as error:
            self._closed_until = self._clock.monotonic() + LEFT_ALONE.total_seconds()
            if not self._failing:  # once, not for each call while it lasts
                logger.warning(
                    "the embedder fails: recall uses full text until it answers again",
                    extra={"embedder": self._name, "reason": f"{type(error).__name__}: {error}"},
                )
            self._failing = True
            raise EmbeddingFailed from error
        if self._failing:
            logger.info("the embedder answers again", extra={"embedder": self._name})
        self._failing = False
        return vectors

    async def _ask(self, texts: list[str]) -> Sequence[Sequence[float]]:
        self._slots -= 1
        if inspect.iscoroutinefunction(self._function):
            asked: asyncio.Future[Sequence[Sequence[float]]] = asyncio.ensure_future(self._function(texts))
        else:
            asked = aside(cast(Plain, self._function), texts, name="embedder")
        # its slot is free when its thread has ended, however long nobody has waited for it
        asked.add_done_callback(self._freed)
        waited = asked if isinstance(asked, asyncio.Task) else asyncio.shield(asked)
        async with asyncio.timeout(self._timeout.total_seconds()):
            found = await waited
            return await found if inspect.isawaitable(found) else found  # of an object whose __call__ is async, say

    def _freed(self, asked: asyncio.Future[Sequence[Sequence[float]]]) -> None:
        self._slots += 1
        if not asked.cancelled():
            asked.exception()

    def _checked(self, vectors: Sequence[Sequence[float]], number: int) -> list[list[float]]:
        plain = [[float(each) for each in vector] for vector in vectors]
        if len(plain) != number:
            raise ValueError(f"it gave {len(plain)} vectors for {number} texts")
        lengths = {len(vector) for vector in plain}
        if len(lengths) != 1 or not 0 < (length := lengths.pop()) <= LONGEST:
            raise ValueError(f"its vectors must all have one length, from 1 to {LONGEST:,}")
        if not all(math.isfinite(each) for vector in plain for each in vector):
            raise ValueError("its vectors have numbers that are not finite")
        self._length = length
        return plain


def load_embedder(name: str) -> Embedding:
    """The embedder ``module:function``.

    Raises:
        ConfigError: there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"LONGSHIFT_EMBEDDER: cannot load {name!r} (module:function): {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ConfigError(f"LONGSHIFT_EMBEDDER: {name!r} is no function")
    return Embedding(name, found)
