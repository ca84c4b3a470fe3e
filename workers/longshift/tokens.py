"""How many tokens messages have: exactly, by the vocabulary of a model, or estimated by their characters."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

from longshift.aside import aside

logger = logging.getLogger(__name__)

FRAME = 4
"""Tokens that a model's format puts around each message, about: its role, where it begins and ends."""
PER_TOKEN = 4
"""Characters of a token in English, about, by which tokens are estimated."""
AT_ONCE = 16_384
"""Characters that are counted in one go: a vocabulary takes long for much text without a space."""
BREATH = 65_536
"""Characters after whose counting the event loop gets its turn."""
REMEMBERED = 100_000
"""Messages whose count is kept, 100 bytes each."""
LOADING = timedelta(seconds=20)


class TokenCounter(Protocol):
    """Counts tokens as a model does. Never more of them than the text has bytes in UTF-8, so that short texts need no count."""

    def count(self, text: str) -> int: ...


class Encoder(Protocol):
    """What is used of ``tiktoken.Encoding``."""

    def encode_ordinary(self, text: str) -> list[int]: ...


class Characters:
    """An estimate: a token for each four characters, rounded up. Too low for text that is not English, by up to four times."""

    def count(self, text: str) -> int:
        return -(-len(text) // PER_TOKEN)


class Vocabulary:
    """The count of a vocabulary of ``tiktoken``; exact up to 16,384 characters, beyond that up to one token more for each
    16,384.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def count(self, text: str) -> int:
        parts = (text[start : start + AT_ONCE] for start in range(0, len(text), AT_ONCE))
        return sum(len(self._encoder.encode_ordinary(part)) for part in parts)


class Gauge:
    """Counts the tokens of messages for one budget, those of each message once in the process."""

    def __init__(self, counter: TokenCounter | str | None) -> None:
        """``counter``: a string names a vocabulary of ``tiktoken``, which is loaded when first needed."""
        self._name = counter if isinstance(counter, str) else None
        self._counter: TokenCounter = Characters() if counter is None or isinstance(counter, str) else counter
        self._counts: dict[int, int] = {}
        self._loading: asyncio.Task[None] | None = None

    def surely_within(self, messages: Sequence[str], tokens: int) -> bool:
        """Whether the length of the messages alone proves that they have no more than so many tokens.

        What surrounds the content in a message's JSON is longer than its frame of tokens, and escapes only add to it.
        """
        if self._name is None and isinstance(self._counter, Characters):
            return sum(map(len, messages)) <= tokens * PER_TOKEN
        # a character has up to four bytes
        return sum(len(m) if m.isascii() else 4 * len(m) for m in messages) <= tokens

    async def count(self, messages: Sequence[str]) -> list[int]:
        """Tokens of each of the messages, given as JSON text."""
        await self._load()
        counts, counted = [], 0
        for message in messages:
            key = hash(message)
            known = self._counts.get(key)
            if known is None:
                known = self._counts[key] = self.of(shown(message)) + FRAME
                if len(self._counts) > REMEMBERED:
                    del self._counts[next(iter(self._counts))]
                counted += len(message)
                if counted > BREATH:
                    counted = 0
                    await asyncio.sleep(0)
            counts.append(known)
        return counts

    def of(self, text: str) -> int:
        """Tokens of plain text; after ``count`` has loaded what is needed."""
        return self._counter.count(text)

    async def _load(self) -> None:
        """Load the vocabulary, once in a process; turns that ask side by side wait for the same try.

        That may fetch it from the network, which may be away, or never answer.
        """
        if self._name is None:
            return
        loop = asyncio.get_running_loop()
        if self._loading is None or self._loading.get_loop() is not loop:
            self._loading = loop.create_task(self._loaded(self._name))
        await asyncio.shield(self._loading)

    async def _loaded(self, name: str) -> None:
        try:
            self._counter = await asyncio.wait_for(aside(_vocabulary, name, name="tokens"), LOADING.total_seconds())
        except Exception as error:  # noqa: BLE001 - the network, the disk, the package: an estimate will do
            logger.warning(
                "tokens are estimated by characters, since the vocabulary cannot be loaded",
                extra={"encoding": name, "reason": f"{type(error).__name__}: {error}"},
            )
        self._name = None


def _vocabulary(name: str) -> Vocabulary:
    import tiktoken  # an extra, and heavy

    return Vocabulary(tiktoken.get_encoding(name))


def shown(message: str) -> str:
    """What a model sees of a message besides its role: text as it is, other content as JSON."""
    content = json.loads(message)["content"]
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, separators=(",", ":"))
