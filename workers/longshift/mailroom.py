"""The mailroom of a worker: looks for what its turns wait for, and tells parents that their children have ended.

Both go together for all turns of the worker, one statement per round trip; what is asked meanwhile goes with the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from longshift.contract import Cause, Found, Look
from longshift.db import children, mail
from longshift.db.database import Database
from longshift.db.mail import Wanted
from longshift.errors import LongshiftError, Unavailable
from longshift.notices import Notices

logger = logging.getLogger(__name__)

AT_ONCE = 1000
"""Causes of one statement, about: those of one turn stay together."""


@dataclass(slots=True, eq=False)
class _Asked:
    session_id: UUID
    causes: Mapping[Cause, int]
    answer: asyncio.Future[Look]


class Mailroom:
    """One for all turns of a worker process."""

    def __init__(self, db: Database, notices: Notices) -> None:
        self._db = db
        self._notices = notices
        self._asked: list[_Asked] = []
        self._ended: list[UUID] = []
        self._something = asyncio.Event()

    async def look(self, session_id: UUID, causes: Mapping[Cause, int]) -> Look:
        """What has come for a session, of each cause at most so many.

        Raises:
            Unavailable: Postgres does not answer.
        """
        asked = _Asked(session_id, causes, asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        self._something.set()
        return await asked.answer

    def child_ended(self, turn_id: UUID) -> None:
        """Wake its parent; if this worker dies before, the sweeper does it."""
        self._ended.append(turn_id)
        self._something.set()

    async def run(self) -> None:
        while True:
            await self._something.wait()
            self._something.clear()
            while self._asked:
                await self._look(self._take())
            await self._tell()

    def _take(self) -> list[_Asked]:
        taken: list[_Asked] = []
        size = 0
        while self._asked and size < AT_ONCE:
            taken.append(self._asked.pop(0))
            size += len(taken[-1].causes)
        return [asked for asked in taken if not asked.answer.done()]  # whoever asked may be gone

    async def _look(self, batch: list[_Asked]) -> None:
        wanted = [
            Wanted(asked.session_id, cause.kind.value, cause.name, cause.id, most)
            for asked in batch
            for cause, most in asked.causes.items()
        ]
        try:
            seen = await mail.look(self._db, wanted) if wanted else {}
        except Exception as error:  # noqa: BLE001 - a bug must not end the room, in which every turn of the worker asks
            for asked in batch:
                if not asked.answer.done():
                    asked.answer.set_exception(error)
            return
        place = 0
        for asked in batch:
            look = _looked([(cause, seen.get(place + n)) for n, cause in enumerate(asked.causes)])
            place += len(asked.causes)
            if not asked.answer.done():
                asked.answer.set_result(look)

    async def _tell(self) -> None:
        ended, self._ended = self._ended, []
        if not ended:
            return
        try:
            rung = await children.tell(self._db, ended)
        except (Unavailable, LongshiftError) as error:  # the sweeper tells them
            logger.info("parents not told yet", extra={"reason": str(error)})
            return
        for session_id, queue in rung:
            self._notices.ring(session_id, queue)


def _looked(seen: list[tuple[Cause, mail.Seen | None]]) -> Look:
    """Of the causes of one session. One that is gone has nothing, and an old ``mail_seq``: its holder will be refused."""
    known = [(cause, one) for cause, one in seen if one is not None]
    return Look(
        mail_seq=min((one.mail_seq for _, one in known), default=-1),
        urgent=any(one.urgent for _, one in known),
        found=[Found(cause, identity, value) for cause, one in known for identity, value in one.found],
    )
