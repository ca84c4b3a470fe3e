"""Large values: their JSON text is in the cold tier, and a pointer is where they would be.

    event      {..., artifact: {id, size, sha256, preview}}     instead of result, output, input or content: below 1 KB
    row        input_artifact, output_artifact, artifact_id     instead of input, output, result
    context    {"$artifact": "art_...", "size", "preview"}      what later turns see in the place of the value

A value of more than ``LONGSHIFT_INLINE`` bytes is laid out before anything points to it. Its id follows from the turn, its
place there and its hash: a repetition with the same result makes no second artifact, one with another result another one.
While the store is away, a value that fits into an event is recorded there instead; a larger one waits for the store.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Protocol, TypeVar
from uuid import UUID

from longshift.errors import ArtifactCorrupt, InvalidInput, NotFound, Unavailable, ValueLost
from longshift.events import encode, storable
from longshift.model import Json, Prefix, parse_id, show_id
from longshift.replay import derived_id
from longshift.steps import Retry

if TYPE_CHECKING:
    from longshift.execution import Execution

logger = logging.getLogger(__name__)
T = TypeVar("T")

CONTENT_TYPE = "application/json"
PREVIEW = 200
"""Characters of a value that its pointer shows."""
PREVIEW_BYTES = 400
"""Of these as JSON, so that an event with a pointer stays below 1 KB in any script."""
SOON = timedelta(seconds=5)
"""Time that the store gets for what could be recorded without it."""
AWAY = Retry(longest=timedelta(seconds=10))
"""Pauses while a store is away."""
LONG_HASH = 1024 * 1024
"""Bytes from which on a hash is computed in a thread."""

_BEGINNING = re.compile(  # of a JSON string: so many characters, none of them cut in two
    r'"((?:\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[^u]|[^"\\])'
    f"{{0,{PREVIEW}}})"
)


class Limits(Protocol):
    """Bytes of values, as ``Config`` has them."""

    @property
    def inline(self) -> int: ...

    @property
    def max_event(self) -> int: ...

    @property
    def max_value(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Pointer:
    """Where a large value is: the artifact, its bytes, their hash, and how the value begins."""

    id: UUID
    size: int
    sha256: str
    preview: str = ""

    @classmethod
    def of(cls, recorded: Json) -> Pointer:
        """As an event has it; of waits that the second format recorded, there is only the id."""
        if isinstance(recorded, str):
            return cls(parse_id(Prefix.ARTIFACT, recorded), 0, "")
        identity = parse_id(Prefix.ARTIFACT, recorded["id"])
        return cls(identity, recorded["size"], recorded["sha256"], recorded.get("preview", ""))

    @property
    def facts(self) -> dict[str, Json]:
        """What an event says of it."""
        return {"id": self.id.hex, "size": self.size, "sha256": self.sha256, "preview": self.preview}


@dataclass(frozen=True, slots=True)
class Laid:
    """A value as it is to be recorded: its JSON text, or (``pointer``) where that is."""

    text: str
    pointer: Pointer | None = None

    def within(self, facts: Mapping[str, Json], name: str) -> str:
        """A payload, as JSON text: ``facts``, and the value under ``name``."""
        if self.pointer is not None:
            return encode({**facts, "artifact": self.pointer.facts})
        rest = encode(dict(facts))[1:-1]  # as it is: inside of a payload it would be one level deeper than was checked
        return f'{{{rest}{"," if rest else ""}"{name}":{self.text}}}'


def size_of(text: str) -> int:
    """Bytes of ``text``."""
    return len(text) if text.isascii() else len(text.encode())


def preview_of(text: str) -> str:
    """How a value begins whose JSON is ``text``: of a string its own characters, of anything else its JSON."""
    string = _BEGINNING.match(text)
    begin = storable(json.loads(f'"{string[1]}"', strict=False)) if string is not None else text[:PREVIEW]
    left = PREVIEW_BYTES
    for end, character in enumerate(begin):
        left -= len(json.dumps(character, ensure_ascii=False).encode()) - 2
        if left < 0:
            return begin[:end]
    return begin


async def point_to(data: bytes, text: str, *, root: UUID, place: tuple[str, ...]) -> Pointer:
    """The pointer to ``data``, the bytes of ``text``; ``place``: what it is, within the turns of ``root``."""
    sha256 = await hash_of(data)
    return Pointer(derived_id(root, *place, sha256), len(data), sha256, preview_of(text))


async def hash_of(data: bytes) -> str:
    if len(data) < LONG_HASH:
        return hashlib.sha256(data).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())


async def lay_out(
    text: str,
    *,
    root: UUID,
    place: tuple[str, ...],
    limits: Limits,
    put: Callable[[UUID, bytes], Awaitable[object]],
    beside: int = 0,
    what: str = "this value",
    insist: Callable[[Callable[[], Awaitable[object]]], Awaitable[object]] | None = None,
) -> Laid:
    """Bring the value with this JSON text to where it belongs.

    Args:
        text: the JSON.
        root, place: what its id follows from.
        limits: how large it may be.
        put: stores an artifact under an id.
        beside: bytes that stand in the same event.
        what: for the message, if it is too large.
        insist: how to go on calling ``put`` if the store is away and there is no room for the value elsewhere.

    Raises:
        InvalidInput: it is larger than any value may be.
        Unavailable: the store is away, and nobody insists.
    """
    size = size_of(text)
    fits = size + beside <= limits.max_event
    if size <= limits.inline and fits:
        return Laid(text)
    check_size(size, limits=limits, what=what)
    data = text.encode()
    pointer = await point_to(data, text, root=root, place=place)
    if fits:
        return Laid(text, pointer if await stored_soon(lambda: put(pointer.id, data)) else None)
    await (put(pointer.id, data) if insist is None else insist(lambda: put(pointer.id, data)))
    return Laid(text, pointer)


def check_size(size: int, *, limits: Limits, what: str) -> None:
    if size > limits.max_value:
        raise InvalidInput(
            f"{what} has {size:,} bytes of JSON, more than a value may have ({limits.max_value:,}, LONGSHIFT_MAX_VALUE): keep "
            "it as an artifact (turn.artifact, POST /v1/artifacts) and pass its id"
        )


async def stored_soon(put: Callable[[], Awaitable[object]]) -> bool:
    """Whether the store has taken what could be recorded without it."""
    try:
        async with asyncio.timeout(SOON.total_seconds()):
            await put()
    except (Unavailable, TimeoutError) as error:
        logger.info("a large value is recorded as it is, for the store is away", extra={"reason": str(error)})
        return False
    return True


class Large:
    """The large values of one execution."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution

    async def lay_out(self, text: str, *, place: tuple[str, ...], name: str, what: str, beside: int = 0) -> Laid:
        """Bring a value to where it belongs; see ``lay_out``. Waits while the store is away and there is no other room.

        Raises:
            InvalidInput: it is larger than any value may be.
        """
        port = self._execution.port

        async def put(identity: UUID, data: bytes) -> object:
            return await port.put_artifact(identity, name=f"{name}.json", data=data, content_type=CONTENT_TYPE)

        return await lay_out(
            text,
            root=self._execution.record.root_turn_id,
            place=place,
            limits=port,
            put=put,
            beside=beside,
            what=what,
            insist=lambda ask: patiently(self._execution, ask),
        )

    async def payload(self, payload: Mapping[str, Json], name: str, *, place: tuple[str, ...], what: str) -> str:
        """JSON text of a payload whose member ``name`` may be large."""
        text = encode(payload)
        if size_of(text) <= min(self._execution.port.inline, self._execution.port.max_event):
            return text
        facts = {key: value for key, value in payload.items() if key != name}
        beside = size_of(encode(facts)) + len(name) + 4
        value = encode(payload[name])
        return (await self.lay_out(value, place=place, name=name, what=what, beside=beside)).within(facts, name)

    async def text(self, recorded: Mapping[str, Json], name: str) -> str:
        """JSON text of what is recorded under ``name``, fetched and verified if it is in the cold tier. Waits while the
        store is away.

        Raises:
            ValueLost: it is not there any more.
        """
        found = recorded.get("artifact")
        return json.dumps(recorded[name]) if found is None else await self.fetch(Pointer.of(found))

    async def fetch(self, pointer: Pointer) -> str:
        """The JSON text that a pointer points to.

        Raises:
            ValueLost: it is not there any more; the turn fails, whatever the agent makes of this.
        """
        port = self._execution.port
        try:
            data = await patiently(self._execution, lambda: port.get_artifact(pointer.id))
            if pointer.sha256 and pointer.sha256 != await hash_of(data):
                raise ArtifactCorrupt(f"its {len(data):,} bytes do not have the hash that the log has of it")
        except (NotFound, ArtifactCorrupt) as error:
            raise self._execution.give_up(lost(pointer.id, error)) from None
        return data.decode()


def lost(artifact_id: UUID, error: Exception) -> ValueLost:
    return ValueLost(show_id(Prefix.ARTIFACT, artifact_id), reason=str(error))


async def patiently(execution: Execution, ask: Callable[[], Awaitable[T]]) -> T:
    """Ask a store until it answers. That it is away is nobody's failure: the turn waits, until somebody ends it."""
    pause = patience(execution)
    while True:
        try:
            return await ask()
        except Unavailable as error:
            await pause(error)


def patience(execution: Execution) -> Callable[[Unavailable], Awaitable[None]]:
    """Lets time pass each time that a store is away, longer and longer."""
    attempts = count(1)

    async def pause(error: Unavailable) -> None:
        attempt = next(attempts)
        if attempt == 1:
            logger.warning(
                "a turn waits for the artifact store",
                extra={"turn_id": execution.record.id.hex, "reason": str(error)},
            )
        # not the turn's random numbers: those would differ on a replay, which waits for nothing
        await execution.pause(AWAY.pause(min(attempt, 20), random=Random()))

    return pause
