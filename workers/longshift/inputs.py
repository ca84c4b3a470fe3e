"""Large inputs of turns that are submitted: in the cold tier before their turns are accepted.

Nothing refers to such an artifact until its turn is committed, in the same transaction: what was refused, or had been accepted
before, leaves an artifact for the collector and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from itertools import islice
from uuid import UUID

from longshift.catalogue import Drafts, Elsewhere, inputs
from longshift.cold import Cold
from longshift.db.files import named_in
from longshift.errors import Unavailable
from longshift.events import encode
from longshift.model import NewTurn, new_id
from longshift.offload import CONTENT_TYPE, Limits, lay_out, size_of

AT_ONCE = 8
"""Inputs of a batch that are stored side by side, and so held in memory."""


class Inputs:
    """The inputs of what this process accepts."""

    def __init__(self, cold: Cold, *, limits: Limits) -> None:
        self._cold, self._limits = cold, limits

    async def lay_out(self, turn: NewTurn, *, tenant_id: UUID) -> NewTurn:
        """The turn with its input in the cold tier, if that is large.

        Raises:
            InvalidInput: it is larger than any value may be.
            Unavailable: the store is away, and the input too large to do without it.
        """
        found = await self._store(encode(turn.input), root=turn.id, tenant_id=tenant_id)
        return turn if found is None else found.of(turn)

    async def lay_out_all(self, drafts: Drafts, large: Collection[int], *, tenant_id: UUID) -> dict[int, Elsewhere]:
        """The artifacts of the inputs at these places; a few at a time, for a batch need not fit into memory. When the store
        is found to be away, the others are not tried: each would wait for it.

        Raises:
            InvalidInput, Unavailable: as for one.
        """
        laid_out: dict[int, Elsewhere] = {}
        texts = inputs(drafts, frozenset(large))
        try:
            while large and (some := await asyncio.to_thread(lambda: list(islice(texts, AT_ONCE)))):
                stored = await asyncio.gather(
                    *(self._store(text, root=new_id(), tenant_id=tenant_id) for _, text in some)
                )
                laid_out |= {place: found for (place, _), found in zip(some, stored, strict=True) if found is not None}
                if None in stored:
                    await asyncio.to_thread(self._check_room, texts)
        finally:
            texts.close()
        return laid_out

    def _check_room(self, texts: Iterable[tuple[int, str]]) -> None:
        """Raises Unavailable: one of these inputs is too large for its row."""
        if any(size_of(text) > self._limits.max_event for _, text in texts):
            raise Unavailable(
                "the artifact store is away, and the batch has inputs too large to do without it: try again"
            )

    async def _store(self, text: str, *, root: UUID, tenant_id: UUID) -> Elsewhere | None:
        async def put(identity: UUID, data: bytes) -> object:
            return await self._cold.put(
                data, tenant_id=tenant_id, name="input.json", content_type=CONTENT_TYPE, artifact_id=identity
            )

        laid = await lay_out(text, root=root, place=("input",), limits=self._limits, put=put, what="the input")
        return Elsewhere(laid.pointer.id, frozenset(named_in(text))) if laid.pointer is not None else None
