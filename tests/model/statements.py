"""What Postgres does: each function is one statement, at the instant at which it has its row lock and commits.

Under READ COMMITTED a statement takes its snapshot first and may then wait for a row; when it gets the lock it goes on with
the newest version of *that row*, and with its old snapshot of everything else. So what is read from the locked session row is
current, and atomic with the commit; whatever else a statement reads is as old as its ``begin``. Only CLAIM reads anything
else that could matter (the worker's tombstone): it alone has two stages in the protocol, and so have the variants that
trust a snapshot.
"""

from __future__ import annotations

from tests.model.state import OPEN, Claim, Db, Event, Rules, Turn, Won, Write

MISSING = "missing"


def fenced(db: Db, write: Write, rules: Rules) -> bool:
    """The holder check: ``s.lease_epoch = h.epoch AND s.lease_worker = h.worker``."""
    epoch = db.epoch == write.epoch or not rules.epoch_compared
    return epoch and (db.holder == write.holder or not rules.worker_compared)


def execute(db: Db, write: Write, rules: Rules, *, fence: bool | None = None) -> tuple[Db, str]:
    """Run a holder's statement; ``fence`` is what a variant has found out before."""
    if write.kind == "RELEASE" and not rules.release_checks:
        return release(db), "done"
    if write.kind == "APPEND" and not rules.append_fenced:
        fence = True
    if fence is None:
        fence = fenced(db, write, rules)
    if not fence:
        return db, MISSING
    if write.kind == "RELEASE":
        return release(db), "done"
    if write.kind == "APPEND":
        return append(db, write)
    if write.kind == "START" and rules.start_checks and not _startable(db, write):
        return db, "refused"
    if db.at(write.events[0].seq) is not None:
        return db, MISSING  # a unique conflict undoes the whole statement; the journal settles it like a missing row
    if write.kind == "LEAVE":
        return leave(db, write, compare=rules.mail_compared)
    return start(db, write) if write.kind == "START" else finish(db, write)


def _startable(db: Db, write: Write) -> bool:
    return write.turn is not None and db.turns[write.turn].status in OPEN


def append(db: Db, write: Write) -> tuple[Db, str]:
    """``ON CONFLICT DO NOTHING RETURNING``: the answer names the lease if any of its rows is new. A signal is consumed by the
    row that records it, if that is new."""
    new = tuple(event for event in write.events if db.at(event.seq) is None)
    if not new:
        return db, MISSING
    if any(event.kind == "signal" for event in new):
        db = db._replace(mail=tuple(kind for kind in db.mail if kind != "signal"))
    return insert(db, new), "done"


def start(db: Db, write: Write) -> tuple[Db, str]:
    return insert(_turn(db, write, "running", attempted=True), write.events), "done"


def finish(db: Db, write: Write) -> tuple[Db, str]:
    more = db.open_turns > 1
    keep = write.keep and more
    db = _turn(db, write, write.status)._replace(
        open_turns=db.open_turns - 1,
        holder=db.holder if keep else None,
        ready=more,
        mail=() if write.turn == 0 else db.mail,  # all mail of this model is for the first turn
    )
    return insert(db, write.events), "kept" if keep else "done"


def leave(db: Db, write: Write, *, compare: bool) -> tuple[Db, str]:
    """``seen`` was read before the look for mail: unequal, and the session is ready at once."""
    waiting = write.status == "waiting"
    mailed = compare and db.mail_seq != write.seen
    db = _turn(db, write, write.status)._replace(holder=None, head_waiting=waiting, ready=mailed or not waiting)
    return insert(db, write.events), "done"


def release(db: Db) -> Db:
    return db._replace(holder=None, ready=db.open_turns > 0)


def insert(db: Db, events: tuple[Event, ...]) -> Db:
    return db._replace(log=tuple(sorted((*db.log, *events))))


def _turn(db: Db, write: Write, status: str, *, attempted: bool | None = None) -> Db:
    assert write.turn is not None
    turns = list(db.turns)
    old = turns[write.turn]
    turns[write.turn] = Turn(status, old.attempted if attempted is None else attempted)
    return db._replace(turns=tuple(turns))


# -- claims


def claim_sees(db: Db, claim: Claim) -> bool:
    """CLAIM, in its snapshot: the session is runnable, and the worker has no tombstone."""
    return db.claimable and claim.worker not in db.dead


def claim(db: Db, claim: Claim, rules: Rules, *, snapshot: Event | bool | None = None) -> tuple[Db, Won | None]:
    """CLAIM has its row and checks it again; ENDS then reads in a fresh snapshot, while the row is locked."""
    if not db.claimable:
        return db, None
    epoch = db.epoch + 1 if rules.epoch_bumped else db.epoch
    db = db._replace(holder=claim.worker, epoch=epoch, head_waiting=False, claims=db.claims + 1, claimant=claim.worker)
    end = db.last
    if not rules.ends_fresh:
        end = snapshot if isinstance(snapshot, Event) else None
    return db, Won(epoch, db.claims, db.mail_seq, end, db.head())


# -- what others do to the session's row


def take_away(db: Db, rules: Rules, *, requeue: bool) -> Db:
    """RESCUE and RECONCILE: no holder, a new epoch, ready if turns remain; RESCUE queues a running turn again."""
    turns = db.turns
    if requeue:
        turns = tuple(turn._replace(status="queued") if turn.status == "running" else turn for turn in turns)
    epoch = db.epoch + 1 if rules.epoch_bumped else db.epoch
    return db._replace(holder=None, epoch=epoch, ready=db.open_turns > 0, turns=turns)


def submit(db: Db) -> Db:
    """ADMIT and ADD_TURNS: a turn at the end of the order."""
    return db._replace(
        turns=(*db.turns, Turn("queued")), open_turns=db.open_turns + 1, ready=db.ready or not db.head_waiting
    )


def mail(db: Db, kind: str, rules: Rules) -> Db:
    """ADD_SIGNAL, ADD_MAIL: the mail, and the session is ready."""
    rung = rules.mail_rings and db.open_turns > 0
    return db._replace(mail=(*db.mail, kind), mail_seq=db.mail_seq + 1, ready=db.ready or rung)


def cancel(db: Db, rules: Rules) -> Db:
    """END_UNSTARTED, and ADD_MAIL for what has started, of the first turn."""
    first = db.turns[0]
    if first.status not in OPEN:
        return db
    if first.attempted or first.status != "queued":
        return mail(db, "cancel", rules)
    more = db.open_turns > 1
    turns = (Turn("cancelled"), *db.turns[1:])
    return db._replace(turns=turns, open_turns=db.open_turns - 1, ready=db.ready and more)


def standing(db: Db, write: Write, rules: Rules) -> tuple[bool, Event | None, int]:
    """STANDING: is the lease still ours, which event is at the place we write to, and how long is the log."""
    at = db.at(write.events[0].seq) if write.events else None
    return fenced(db, write, rules), at, db.last.seq if db.last else 0
