"""What a worker brings to the turns that run on it: cancels and expiries, and what they wait for without leaving."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta

from longshift.claiming import Holder
from longshift.db import leases
from longshift.db.database import Database
from longshift.errors import Unavailable
from longshift.journal import Journal

LOOK_EVERY = timedelta(milliseconds=500)
"""Between two looks for what turns wait for that cannot leave: within a second they go on."""


async def deliver_mail(holder: Holder, db: Database, journal: Journal, *, every: timedelta) -> None:
    """Deliver cancels and expiries, for ever."""
    while True:
        await asyncio.sleep(every.total_seconds())
        if not holder.runs or not journal.is_open:
            continue
        with suppress(Unavailable):
            running = {run.record.id: run for run in holder.runs if run.record is not None}
            for mail in await leases.urgent_mail(db, worker_id=holder.worker_id):
                if mail.turn_id in running:
                    running[mail.turn_id].deliver(mail)


async def look_for_waits(holder: Holder, journal: Journal) -> None:
    """For turns that wait in one branch and work in another, so that they do not leave; for ever."""
    while True:
        await asyncio.sleep(LOOK_EVERY.total_seconds())
        if not journal.is_open:
            continue
        waiting = [
            run.execution.awaiting
            for run in holder.runs
            if run.execution is not None and run.execution.is_live and run.execution.awaiting.missing
        ]
        # together, so that the mailroom asks once for all of them; what stands against one of them, its turn will hear
        await asyncio.gather(*(awaiting.look() for awaiting in waiting), return_exceptions=True)
