"""What a worker does: claims, the journal with one unacknowledged write per lease, and what it makes of answers and doubt.

A paused worker is one that takes no step while others take theirs; as any order of steps is explored, it may be paused at
any point and for any time. Each function gives the transitions of one action, none where it is not possible.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model import promises
from tests.model.explore import Step
from tests.model.state import Claim, Db, Event, Lease, Rules, Scope, Sent, State, Won, Worker, Write
from tests.model.statements import MISSING, standing

Steps = Iterator[Step[State]]
RUN = ("a", "b")
"""The steps of the first turn. They run side by side and are recorded by one append, a run of two rows."""


def steps(state: State, number: int, scope: Scope, rules: Rules) -> Steps:
    """All that this worker can do next."""
    worker = state.workers[number]
    yield from wake(state, number, scope)
    yield from hear(state, number, rules)
    lease = worker.lease
    if lease is not None and worker.sent is None:
        if lease.doubt:
            yield from recover(state, number, rules)
        else:
            yield from send(state, number, scope)
            yield from look(state, number, scope, rules)
            yield from stop(state, number)
    if worker.id in state.db.dead:
        yield Step(f"worker {worker.id} finds its tombstone, goes on as {state.next_id}", reborn(state, number))
    yield from reconcile(state, number, rules)


def put(state: State, number: int, worker: Worker) -> State:
    workers = (worker, state.workers[1]) if number == 0 else (state.workers[0], worker)
    return state._replace(workers=workers)


# -- claims


def wake(state: State, number: int, scope: Scope) -> Steps:
    """A wake-up makes an idle worker claim. While it has a claim or a lease, the model's worker takes no other."""
    worker = state.workers[number]
    if worker.lease is not None or worker.sent is not None:
        return
    if number == 1 and state.workers[0] == Worker(0):
        return  # the workers are alike: the one that is woken first is called 0
    if not scope.bells:  # a wake-up is always there; in vain it changes nothing
        if state.db.claimable:
            yield Step(
                f"worker {worker.id} sends CLAIM", put(state, number, worker._replace(sent=Sent(Claim(worker.id))))
            )
    elif state.bell:
        woken = put(state, number, worker._replace(sent=Sent(Claim(worker.id))))
        yield Step(f"a wake-up reaches worker {worker.id}, which sends CLAIM", woken._replace(bell=False))
        if state.budget.bells:
            budget = state.budget._replace(bells=state.budget.bells - 1)
            yield Step(
                f"a wake-up reaches worker {worker.id}, and will come again", woken._replace(budget=budget), fault=True
            )


def taken(claim: Claim, won: Won) -> Lease:
    return Lease(
        holder=claim.worker,
        epoch=won.epoch,
        claim=won.claim,
        seq=won.end.seq if won.end else 0,
        last=won.end,
        seen=won.mail_seq,
        turn=won.turn,
        phase="claimed" if won.turn is not None else "vain",
    )


def reconcile(state: State, number: int, rules: Rules) -> Steps:
    """Give back a lease that the database has and memory has not.

    Read, then wait for the claim in flight, then released by epoch: so no claim's reply is still on its way, and the
    lease is one that was read.
    """
    worker = state.workers[number]
    if not rules.reconcile or worker.lease is not None or state.db.holder != worker.id:
        return
    db = state.db._replace(holder=None, ready=state.db.open_turns > 0)
    if rules.epoch_bumped:
        db = db._replace(epoch=db.epoch + 1)
    label = f"worker {worker.id} runs RECONCILE: it holds nothing in memory"
    if worker.sent is None or worker.sent.stage != "answered":
        yield Step(label, state._replace(db=db))
    elif not rules.reconcile_patient and state.budget.unanswered:
        budget = state.budget._replace(unanswered=state.budget.unanswered - 1)
        yield Step(f"{label}, while the reply is on its way", state._replace(db=db, budget=budget), fault=True)


# -- the journal: what goes out


def send(state: State, number: int, scope: Scope) -> Steps:
    """Send the lease's next write, or again the one that is not acknowledged."""
    worker = state.workers[number]
    lease = worker.lease
    assert lease is not None
    if lease.unacked is not None:
        label = f"worker {worker.id} sends its {lease.unacked.kind} again"
        yield Step(label, put(state, number, worker._replace(sent=Sent(lease.unacked))))
        return
    for write in compose(lease, scope):
        sent = put(state, number, worker._replace(lease=lease._replace(unacked=write), sent=Sent(write)))
        if set(RUN) & {event.kind for event in write.events} and starts_recorded(state.db, lease, write):
            sent = sent._replace(broken=promises.AGAIN)
        yield Step(f"worker {worker.id} sends {describe(write)}", sent)


def compose(lease: Lease, scope: Scope) -> list[Write]:
    """What is to be written next; two where the worker is free to choose."""
    base = Write("", lease.holder, lease.epoch, lease.claim, lease.turn)
    missing = [kind for kind in RUN if kind not in lease.known] if lease.turn == 0 else []
    waits = scope.waits and lease.turn == 0 and "signal" not in lease.known

    def write(kind: str, *events: str) -> Write:
        return base._replace(kind=kind, events=tuple(_event(lease, n, name) for n, name in enumerate(events)))

    match lease.phase:
        case "vain":
            return [base._replace(kind="RELEASE")]
        case "checked":
            return [write("START", "started")]
        case "claimed" if not scope.budget.cancels:  # there is nothing to look for
            return [write("START", "started")]
        case "cancelling":
            return _finishes(write("FINISH", "cancelled"), scope)
        case "draining":
            return [write("LEAVE", "drained")._replace(status="queued", seen=lease.seen)]
        case "running" if missing:
            return [write("APPEND", *missing)]
        case "heard":
            return [write("APPEND", "signal")]
        case "quiet":
            return [write("LEAVE", "waiting")._replace(status="waiting", seen=lease.seen)]
        case "running" if not waits:
            return _finishes(write("FINISH", "finished"), scope)
    return []


def _event(lease: Lease, offset: int, kind: str) -> Event:
    assert lease.turn is not None
    return Event(lease.seq + 1 + offset, lease.epoch, lease.claim, lease.holder, lease.turn, kind)


def _finishes(write: Write, scope: Scope) -> list[Write]:
    """Whether the lease is kept for a next turn is a matter of time; it makes a difference only if there may be one."""
    finish = write._replace(status=write.events[0].kind)
    return [finish, finish._replace(keep=True)] if scope.budget.submits and write.turn == 0 else [finish]


def starts_recorded(db: Db, lease: Lease, write: Write) -> bool:
    """The steps of this write are starting: is one recorded, and the lease the current one?"""
    current = (db.holder, db.claims, db.claimant) == (lease.holder, lease.claim, lease.holder)
    return current and lease.turn is not None and bool(db.recorded(lease.turn) & {e.kind for e in write.events})


def describe(write: Write) -> str:
    events = ", ".join(f"{event.seq}:{event.kind}" for event in write.events)
    keep = ", keeping the lease for a next turn" if write.keep else ""
    return f"{write.kind}({events}) of turn {write.turn} under epoch {write.epoch}{keep}"


# -- the journal: what comes back


def hear(state: State, number: int, rules: Rules) -> Steps:
    """An answer arrives."""
    worker = state.workers[number]
    sent = worker.sent
    if sent is None or sent.stage != "answered":
        return
    free = worker._replace(sent=None)
    if isinstance(sent.statement, Claim):
        assert isinstance(sent.answer, Won)
        lease = taken(sent.statement, sent.answer)
        label = f"worker {worker.id} learns that it holds epoch {lease.epoch}, log ends at {lease.seq}"
        yield Step(label, put(state, number, free._replace(lease=lease)))
        return
    write, lease_ = sent.statement, worker.lease
    assert lease_ is not None
    assert isinstance(sent.answer, str)
    if sent.answer == MISSING:
        yield settle(put(state, number, free), number, write, rules)
    else:
        label = f"worker {worker.id} learns: {write.kind} is {sent.answer}"
        yield Step(label, acknowledge(put(state, number, free), number, write, sent.answer))


def settle(state: State, number: int, write: Write, rules: Rules) -> Step[State]:
    """Missing from an answer, or in doubt: STANDING tells what became of a write (``Journal._judge``)."""
    worker = state.workers[number]
    lease = worker.lease
    assert lease is not None
    held, at, last_seq = standing(state.db, write, rules)
    who = f"worker {worker.id} runs STANDING:"
    clear = put(state, number, worker._replace(lease=lease._replace(doubt=False)))
    if write.kind == "RELEASE":
        again = put(state, number, worker._replace(lease=lease._replace(doubt=False) if held else None))
        return Step(f"{who} {'not released yet' if held else 'released'}", again)
    if at == write.events[0]:
        answer = "kept" if write.kind == "FINISH" and held else "done"
        return Step(f"{who} its {write.kind} had happened", acknowledge(clear, number, write, answer))
    if held and at is None and (last_seq == lease.seq or not rules.recovery_compares):
        return Step(f"{who} its {write.kind} has not happened, the lease stands", clear)
    return Step(f"{who} the lease is lost", lose(state, number))


def acknowledge(state: State, number: int, write: Write, answer: str) -> State:
    """The caller is told that its events are durable."""
    worker = state.workers[number]
    lease = worker.lease
    assert lease is not None
    if answer != "refused":
        if not set(write.events) <= set(state.db.log):
            return state._replace(broken=promises.UNTRUE)
        if write.events:
            lease = lease._replace(seq=write.events[-1].seq, last=write.events[-1])
    lease = lease._replace(unacked=None)
    match write.kind, answer:
        case ("START", "refused") | ("FINISH", "kept"):
            after: Lease | None = lease._replace(phase="between", known=frozenset())
        case ("START", _):
            assert write.turn is not None
            after = lease._replace(phase="running", known=_replayed(state.db, write.turn))
        case ("APPEND", _):
            after = lease._replace(phase="running", known=lease.known | {event.kind for event in write.events})
        case _:
            after = None
    return put(state, number, worker._replace(lease=after))


def _replayed(db: Db, turn: int) -> frozenset[str]:
    """READ_TURNS: what is recorded of the turn and will not run again."""
    return db.recorded(turn) & {*RUN, "signal"}


def lose(state: State, number: int) -> State:
    """The turn is told LeaseLost and dropped. Unless its worker was declared dead (or a failover took the claim), nobody
    may have taken the lease from it."""
    worker = state.workers[number]
    lease = worker.lease
    assert lease is not None
    rightful = lease.holder not in state.db.dead and not state.failed_over
    lost = put(state, number, worker._replace(lease=None))
    return lost._replace(broken=promises.FOOLED) if rightful else lost


def recover(state: State, number: int, rules: Rules) -> Steps:
    """Postgres answers again: every lease is compared with it before the journal opens (``Journal._recover``)."""
    worker = state.workers[number]
    lease = worker.lease
    assert lease is not None
    write = lease.unacked
    opened = put(state, number, worker._replace(lease=lease._replace(doubt=False)))
    if not rules.recovery_compares:
        yield Step(f"worker {worker.id} goes on without a look", opened)
    elif write is not None and rules.doubt == "failure":
        last = state.db.last
        anew = lease._replace(unacked=None, doubt=False, seq=last.seq if last else 0, last=last)
        label = f"worker {worker.id} reads the end of the log and will do its {write.kind} anew"
        yield Step(label, put(state, number, worker._replace(lease=anew)))
    elif write is not None and not rules.verbatim:
        events = tuple(event._replace(tries=event.tries + 1) for event in write.events)
        changed = write._replace(events=events)
        lease = lease._replace(unacked=changed)
        yield settle(put(state, number, worker._replace(lease=lease)), number, changed, rules)
    elif write is not None:
        yield settle(state, number, write, rules)
    else:
        db = state.db
        held = (db.holder, db.epoch) == (lease.holder, lease.epoch)
        stands = held and db.last == lease.last
        label = f"worker {worker.id} runs STANDING: the lease {'stands' if stands else 'is lost'}"
        yield Step(label, opened if stands else lose(state, number))


def reborn(state: State, number: int) -> State:
    """HEARTBEAT wrote no row: a new id, every lease dropped. Statements under way go on without it, but the reply to a claim
    still finds somebody who runs the session, under the old id."""
    worker = state.workers[number]
    sent, late = worker.sent, state.late
    if sent is not None and isinstance(sent.statement, Write):
        late, sent = (late if sent.stage == "answered" else tuple(sorted((*late, sent), key=repr))), None
    new = Worker(state.next_id, None, sent)
    return put(state, number, new)._replace(late=late, next_id=state.next_id + 1)


# -- the turn


def look(state: State, number: int, scope: Scope, rules: Rules) -> Steps:
    """Between two writes: is there mail, which turn is next. What is found and ``mail_seq`` are of one moment."""
    worker = state.workers[number]
    lease = worker.lease
    assert lease is not None
    if lease.unacked is not None:
        return
    if lease.phase == "between":
        head = state.db.head()
        phase = "vain" if head is None else "claimed"
        label = f"worker {worker.id} runs HEAD: {'no turn' if head is None else f'turn {head}'} is next"
        yield Step(label, put(state, number, worker._replace(lease=lease._replace(turn=head, phase=phase))))
    if lease.phase == "claimed" and scope.budget.cancels:  # ``Runner._mail``
        found = lease.turn == 0 and "cancel" in state.db.mail
        label = f"worker {worker.id} looks for mail before it starts: {'a cancel' if found else 'none'}"
        looked = lease._replace(phase="cancelling" if found else "checked")
        yield Step(label, put(state, number, worker._replace(lease=looked)))
    waits = scope.waits and lease.turn == 0 and lease.known >= set(RUN) and "signal" not in lease.known
    if lease.phase in {"running", "quiet"} and waits:
        phase = "heard" if "signal" in state.db.mail else "quiet"
        cancelled = "cancel" in state.db.mail and rules.look_sees_cancel
        seen = lease.seen if cancelled else state.db.mail_seq
        label = f"worker {worker.id} looks for the signal: {'here' if phase == 'heard' else 'none'}"
        looked = lease._replace(phase=phase, seen=seen)
        if looked != lease:
            yield Step(label, put(state, number, worker._replace(lease=looked)))


def stop(state: State, number: int) -> Steps:
    """Between two writes: a cancel is heard, or the worker is drained."""
    worker = state.workers[number]
    lease = worker.lease
    assert lease is not None
    if lease.unacked is not None or lease.turn is None:
        return
    running = lease.phase in {"running", "heard", "quiet"}
    if "cancel" in state.db.mail and lease.turn == 0 and running:
        cancelling = worker._replace(lease=lease._replace(phase="cancelling"))
        yield Step(f"worker {worker.id} finds the cancel", put(state, number, cancelling))
    if running and state.budget.drains:
        draining = put(state, number, worker._replace(lease=lease._replace(phase="draining")))
        budget = state.budget._replace(drains=state.budget.drains - 1)
        yield Step(f"worker {worker.id} is told to drain", draining._replace(budget=budget))
