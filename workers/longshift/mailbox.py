"""The mailbox: what this process may ask of sessions. Submit, cancel, signal, settle: validated, committed, then rung.

    Draft ──Catalogue.new_turn──> NewTurn ──intake.submit (one transaction)──> accepted ──Bell──> wake-up

What comes back has been committed. Wake-ups and announcements leave afterwards and in the background: if Redis does not
answer, nothing is lost, the sweeper rings again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from uuid import UUID

from longshift.catalogue import Catalogue, Draft, Drafts, check_batch, check_times, entries
from longshift.clock import SYSTEM, Clock
from longshift.cold import Cold
from longshift.config import Config
from longshift.db import approvals, intake, mail, retries, tool_calls, views
from longshift.db import idempotency as idempotency_keys
from longshift.db.database import Database
from longshift.db.idempotency import Idempotency
from longshift.db.intake import Accepted, Entry, NewBatch
from longshift.errors import InvalidInput, NotFound, UnknownAgent
from longshift.hot import Hot, turn_channel
from longshift.inputs import Inputs
from longshift.model import (
    ApprovalRecord,
    BatchRecord,
    Json,
    MailKind,
    OnBusy,
    Prefix,
    Settlement,
    ToolCallRecord,
    TurnRecord,
    new_id,
    show_id,
)
from longshift.warming import Warmer

CATALOGUE_TTL = 2.0
"""Seconds for which the registered agents are remembered; an unknown name is looked up at once."""


class Bell:
    """Sends wake-ups and announcements in the background; what comes while one round trip lasts goes with the next."""

    def __init__(self, hot: Hot) -> None:
        self._hot = hot
        self._ring: list[tuple[UUID, str]] = []
        self._changed: list[tuple[str, str]] = []
        self._task: asyncio.Task[None] | None = None

    def ring(self, sessions: Iterable[tuple[UUID, str]], *, changed: Iterable[UUID] = ()) -> None:
        """Wake ``sessions`` (id, queue); tell those who wait for the turns ``changed``."""
        self._ring.extend(sessions)
        self._changed.extend((turn_channel(turn), "changed") for turn in changed)
        if (self._ring or self._changed) and self._task is None:
            self._task = asyncio.create_task(self._send(), name="bell")

    async def close(self) -> None:
        """Let the last round go out, for as long as Redis answers."""
        if self._task is not None:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._task, timeout=2)

    async def _send(self) -> None:
        try:
            while self._ring or self._changed:
                ring, self._ring = self._ring, []
                changed, self._changed = self._changed, []
                await self._hot.ring(ring)
                await self._hot.announce(changed)
        finally:
            self._task = None


class Mailbox:
    """Turns, batches, signals and cancels for one process. Close it before the database and Redis."""

    def __init__(
        self,
        db: Database,
        hot: Hot,
        *,
        cold: Cold,
        config: Config,
        clock: Clock = SYSTEM,
        warmer: Warmer | None = None,
    ) -> None:
        """``warmer``: what is accepted in sessions of before is prepared while it waits; None: it is not."""
        self._db = db
        self._warmer = warmer
        self._inputs = Inputs(cold, limits=config)
        self._bell = Bell(hot)
        self._config = config
        self._clock = clock
        self._catalogue = Catalogue(())
        self._catalogue_at = -CATALOGUE_TTL

    async def close(self) -> None:
        if self._warmer is not None:
            await self._warmer.close()
        await self._bell.close()

    def _accepted(self, accepted: Accepted, *, tenant_id: UUID, new: bool) -> None:
        """What follows a commit. ``new``: in a session that was not there before."""
        self._bell.ring(accepted.ring)
        if self._warmer is not None and not new:
            self._warmer.warm((tenant_id, session_id) for session_id, _ in accepted.ring)

    async def catalogue(self, *, wanted: tuple[str, str | None] | None = None) -> Catalogue:
        """The registered agents, at most ``CATALOGUE_TTL`` old; of now, if ``wanted`` (name, version) is not there."""
        fresh = self._clock.monotonic() - self._catalogue_at < CATALOGUE_TTL
        if fresh and wanted is not None:
            try:
                self._catalogue.find(*wanted)
            except UnknownAgent:
                fresh = False
        if not fresh:
            self._catalogue = Catalogue(await views.agents(self._db), before=self._catalogue)
            self._catalogue_at = self._clock.monotonic()
        return self._catalogue

    async def submit(
        self,
        draft: Draft,
        *,
        tenant_id: UUID,
        on_busy: OnBusy = OnBusy.ENQUEUE,
        idempotency: Idempotency | None = None,
    ) -> Accepted:
        """Accept one turn, on an existing session or (``session_id`` None) a new one; ``resource_id`` is the turn's.

        Raises:
            UnknownAgent, InvalidInput: it does not fit.
            NotFound: no such session.
            SessionBusy: ``on_busy`` is reject and a turn is open.
            IdempotencyMismatch: the key was used with another body.
            Unavailable: the artifact store is away, and the input too large to do without it.
        """
        accepted = await self._repeated(idempotency, tenant_id=tenant_id)
        if accepted is None:
            catalogue = await self.catalogue(wanted=(draft.agent, draft.agent_version))
            now = self._clock.now()
            turn = catalogue.new_turn(draft, now=now)
            if on_busy is not OnBusy.ENQUEUE and draft.run_after is not None:
                raise InvalidInput(f"on_busy {on_busy.value!r} decides now, run_after later: use one of them")
            turn = await self._inputs.lay_out(turn, tenant_id=tenant_id)
            accepted = await intake.submit(
                self._db,
                [Entry(turn, draft.session_id or new_id(), create=draft.session_id is None)],
                tenant_id=tenant_id,
                resource_id=turn.id,
                now=now,
                lifetime=self._config.turn_deadline,
                idempotency=idempotency,
                reject_busy=on_busy is OnBusy.REJECT,
            )
            self._accepted(accepted, tenant_id=tenant_id, new=draft.session_id is None)
        if on_busy is OnBusy.REPLACE:  # also for a repeat: the first request may have died before it came to this
            before = await mail.open_before(self._db, accepted.resource_id)
            await self._end(before, tenant_id=tenant_id, reason="replaced by a newer turn")
        return accepted

    async def retry_turn(
        self,
        turn_id: UUID,
        *,
        tenant_id: UUID,
        agent_version: str | None = None,
        deadline: datetime | None = None,
        idempotency: Idempotency | None = None,
    ) -> Accepted:
        """Accept a turn that goes on where ``turn_id`` failed, expired or was cancelled; ``resource_id`` is its id.

        Raises:
            NotFound: no such turn.
            Conflict: it has not ended, it has succeeded, or it is being retried already.
            UnknownAgent: no worker has registered that version of its agent.
            InvalidInput: the deadline has passed, or is too far away.
            IdempotencyMismatch: the key was used with another body.
        """
        accepted = await self._repeated(idempotency, tenant_id=tenant_id)
        if accepted is not None:
            return accepted
        now = self._clock.now()
        turn = await views.turn(self._db, turn_id, tenant_id=tenant_id)
        if turn is None:
            raise NotFound(f"there is no turn {show_id(Prefix.TURN, turn_id)}")
        if agent_version is not None:
            (await self.catalogue(wanted=(turn.agent, agent_version))).find(turn.agent, agent_version)
        if errors := list(check_times(None, deadline, now=now)):
            raise InvalidInput(f"the deadline {errors[0]['message']}", errors=errors)
        accepted = await retries.retry(
            self._db,
            turn_id,
            tenant_id=tenant_id,
            now=now,
            lifetime=self._config.turn_deadline,
            agent_version=agent_version,
            deadline=deadline,
            idempotency=idempotency,
        )
        self._accepted(accepted, tenant_id=tenant_id, new=False)
        return accepted

    async def submit_batch(
        self,
        drafts: Drafts,
        *,
        tenant_id: UUID,
        metadata: Mapping[str, str] | None = None,
        idempotency: Idempotency | None = None,
    ) -> Accepted:
        """Accept all turns or none; ``resource_id`` is the batch's. A session named for the first time is created.

        Raises:
            InvalidInput: lines do not fit, named in ``errors`` by their ``line``; or there is none.
            Unavailable: the artifact store is away, and an input too large to do without it.
            NotFound: a session belongs to somebody else.
            IdempotencyMismatch: the key was used with another body.
        """
        accepted = await self._repeated(idempotency, tenant_id=tenant_id)
        if accepted is not None:
            return accepted
        catalogue = await self.catalogue()
        now = self._clock.now()
        inline = self._config.inline
        checked = await asyncio.to_thread(check_batch, drafts, catalogue, now, inline=inline)
        if checked.unknown:  # a worker may have registered it just now
            self._catalogue_at = -CATALOGUE_TTL
            catalogue = await self.catalogue()
            checked = await asyncio.to_thread(check_batch, drafts, catalogue, now, inline=inline)
        checked.verify()
        laid_out = await self._inputs.lay_out_all(drafts, checked.large, tenant_id=tenant_id)
        batch = NewBatch(total=checked.total, metadata=metadata or {})
        accepted = await intake.submit(
            self._db,
            entries(drafts, catalogue, now, laid_out=laid_out),
            tenant_id=tenant_id,
            resource_id=batch.id,
            now=now,
            lifetime=self._config.turn_deadline,
            batch=batch,
            idempotency=idempotency,
            lock=checked.sessions,
        )
        self._bell.ring(accepted.ring)
        return accepted

    async def create_session(
        self,
        session_id: UUID | None = None,
        *,
        tenant_id: UUID,
        metadata: Mapping[str, str] | None = None,
        ttl: timedelta | None = None,
        idempotency: Idempotency | None = None,
    ) -> tuple[UUID, bool]:
        """The session's id and whether it is new; a client that chooses the id may repeat the request.

        ``ttl``: how long it is kept after its last activity; None: as the fleet is set up.

        Raises:
            NotFound: the id belongs to somebody else, or to a deleted session.
            IdempotencyMismatch: the key was used with another body.
        """
        return await intake.create_session(
            self._db,
            session_id or new_id(),
            tenant_id=tenant_id,
            metadata=metadata or {},
            ttl=ttl,
            default_ttl=self._config.session_ttl,
            idempotency=idempotency,
        )

    async def cancel_turn(self, turn_id: UUID, *, tenant_id: UUID, reason: str = "cancelled by a client") -> TurnRecord:
        """Ask a turn to end: at once if it never started, else as soon as a worker has heard it.

        One that has ended stays as it is.

        Raises:
            NotFound: no such turn.
        """
        turn = await views.turn(self._db, turn_id, tenant_id=tenant_id)
        if turn is not None and not turn.status.terminal:
            await self._end([turn_id], tenant_id=tenant_id, reason=reason)
            turn = await views.turn(self._db, turn_id, tenant_id=tenant_id)
        if turn is None:
            raise NotFound(f"there is no turn {show_id(Prefix.TURN, turn_id)}")
        return turn

    async def cancel_turns(self, turn_ids: Collection[UUID], *, tenant_id: UUID, reason: str) -> None:
        """Ask many turns to end; those that have ended stay as they are."""
        await self._end(turn_ids, tenant_id=tenant_id, reason=reason)

    async def cancel_batch(
        self, batch_id: UUID, *, tenant_id: UUID, reason: str = "batch cancelled by a client"
    ) -> BatchRecord:
        """Ask every open turn of a batch to end.

        Raises:
            NotFound: no such batch.
        """
        await self._end(
            await mail.open_of_batch(self._db, batch_id, tenant_id=tenant_id), tenant_id=tenant_id, reason=reason
        )
        batch = await views.batch(self._db, batch_id, tenant_id=tenant_id)
        if batch is None:
            raise NotFound(f"there is no batch {show_id(Prefix.BATCH, batch_id)}")
        return batch

    async def signal(
        self,
        session_id: UUID,
        *,
        tenant_id: UUID,
        name: str,
        payload: Json,
        idempotency: Idempotency | None = None,
        by: UUID | None = None,
    ) -> Accepted:
        """Leave a signal for whichever turn of the session waits for ``name``, now or later; ``resource_id`` is its id.

        While an approval of this name is open in the session, the signal is its answer (``approval_id`` says which);
        ``by``: the API key behind it.

        Raises:
            NotFound: no such session.
            InvalidInput: it would answer an approval, and does not say whether that is granted.
            IdempotencyMismatch: the key was used with another body.
        """
        accepted = await mail.signal(
            self._db, session_id, tenant_id=tenant_id, name=name, payload=payload, idempotency=idempotency, by=by
        )
        self._bell.ring(accepted.ring)
        return accepted

    async def settle(
        self,
        call_id: UUID,
        *,
        tenant_id: UUID,
        outcome: Settlement,
        result: Json = None,
        note: str | None = None,
        by: UUID,
        idempotency: Idempotency | None = None,
    ) -> ToolCallRecord:
        """Decide what became of a tool call that is in doubt, and wake its session; see ``tool_calls.settle``.

        Raises:
            NotFound: no such call.
            Conflict: it is not in doubt (any more).
            IdempotencyMismatch: the key was used with another body.
        """
        call, ring = await tool_calls.settle(
            self._db,
            call_id,
            tenant_id=tenant_id,
            outcome=outcome,
            result=result,
            note=note,
            by=by,
            idempotency=idempotency,
        )
        self._bell.ring(ring)
        return call

    async def answer(
        self,
        approval_id: UUID,
        *,
        tenant_id: UUID,
        answer: Json,
        by: UUID | None = None,
        idempotency: Idempotency | None = None,
    ) -> ApprovalRecord:
        """Decide an approval (``{granted, comment}``, or just whether) and wake the turn that waits for it.

        Raises:
            NotFound: there is no such approval.
            AlreadyAnswered: somebody was first, or nobody waits for it any more; the message says who decided what, and when.
            InvalidInput: ``answer`` does not say whether.
            IdempotencyMismatch: the key was used with another body.
        """
        approval, ring = await approvals.answer(
            self._db, approval_id, tenant_id=tenant_id, answer=answer, by=by, idempotency=idempotency
        )
        self._bell.ring(ring)
        return approval

    async def _end(self, turns: Collection[UUID], *, tenant_id: UUID, reason: str) -> None:
        if turns:
            ring = await mail.end_turns(self._db, turns, tenant_id=tenant_id, kind=MailKind.CANCEL, reason=reason)
            self._bell.ring(ring, changed=turns)

    async def _repeated(self, idempotency: Idempotency | None, *, tenant_id: UUID) -> Accepted | None:
        """The answer to an equal request before, without validating it again: its deadline may have passed by now."""
        if idempotency is None:
            return None
        known = await idempotency_keys.recall(self._db, idempotency, tenant_id=tenant_id)
        return Accepted(known, replayed=True) if known is not None else None
