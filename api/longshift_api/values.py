"""Large inputs and outputs as clients see them: whole where that is promised, with a pointer always.

While the artifact store is away, or has lost a value, an answer has the pointer and null: a turn's state must not depend
on the store.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from uuid import UUID

from longshift.errors import LongshiftError, Unavailable
from longshift.model import ArtifactRecord, Json, TurnRecord
from longshift_api.deps import Edge

logger = logging.getLogger(__name__)

Values = Mapping[UUID, ArtifactRecord]
SHOWN = 1024 * 1024
"""Bytes of a value that is shown whole."""
SOON = timedelta(seconds=5)
"""Time that the store gets for a value; and after a time-out, for which it is not asked again by the same request."""
AT_ONCE = 8
"""Outputs of a batch that are fetched side by side, and so held in memory."""


async def of_turns(edge: Edge, turns: Iterable[TurnRecord]) -> Values:
    """What is known of the large values of ``turns``, which are of one tenant: one statement, or none."""
    pairs = [
        (turn.tenant_id, found) for turn in turns for found in (turn.input_artifact, turn.output_artifact) if found
    ]
    return await edge.cold.find_all([found for _, found in pairs], tenant_id=pairs[0][0]) if pairs else {}


async def whole(edge: Edge, turn: TurnRecord, values: Values) -> TurnRecord:
    """The turn with its input and its output, as far as they can be had and shown."""
    given, made = await asyncio.gather(
        _value(edge, turn.input_artifact, values), _value(edge, turn.output_artifact, values)
    )
    return _with(turn, given=given, made=made)


def are_whole(turn: TurnRecord, values: Values) -> bool:
    """Whether a turn shows all large values that can be shown."""
    pairs = ((turn.input, turn.input_artifact), (turn.output, turn.output_artifact))
    return not any(
        value is None and place is not None and place in values and values[place].size <= SHOWN
        for value, place in pairs
    )


async def with_outputs(edge: Edge, turns: AsyncIterator[TurnRecord]) -> AsyncIterator[tuple[TurnRecord, Values]]:
    """The turns of a batch with their outputs, a few of which are fetched at a time."""
    asked_again = edge.clock.monotonic()
    async for some in _groups(turns):
        values = await of_turns(edge, some)
        made: list[Json] = [None] * len(some)
        if values and edge.clock.monotonic() >= asked_again:
            try:
                made = await asyncio.gather(
                    *(_value(edge, turn.output_artifact, values, patient=False) for turn in some)
                )
            except Unavailable:  # every line would wait for it
                asked_again = edge.clock.monotonic() + SOON.total_seconds()
        for turn, output in zip(some, made, strict=True):
            yield _with(turn, made=output), values


def _with(turn: TurnRecord, *, given: Json = None, made: Json = None) -> TurnRecord:
    """No large value is null."""
    if given is None and made is None:
        return turn
    return replace(
        turn,
        input=turn.input if given is None else given,
        output=turn.output if made is None else made,
    )


async def _value(edge: Edge, artifact_id: UUID | None, values: Values, *, patient: bool = True) -> Json:
    """The value; None: it cannot be had, or is too large to be shown.

    Raises:
        Unavailable: the store is away, and ``patient`` is False.
    """
    record = values.get(artifact_id) if artifact_id is not None else None
    if record is None or record.size > SHOWN:
        return None
    try:
        async with asyncio.timeout(SOON.total_seconds()):
            return json.loads(await edge.cold.read(record.id, tenant_id=record.tenant_id))
    except (LongshiftError, TimeoutError) as error:
        logger.warning("a large value is not shown", extra={"artifact_id": record.id.hex, "reason": str(error)})
        if not patient and isinstance(error, Unavailable | TimeoutError):
            raise Unavailable("the artifact store is away") from None
        return None


async def _groups(turns: AsyncIterator[TurnRecord]) -> AsyncIterator[list[TurnRecord]]:
    group: list[TurnRecord] = []
    async for turn in turns:
        group.append(turn)
        if len(group) == AT_ONCE:
            yield group
            group = []
    if group:
        yield group
