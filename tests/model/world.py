"""Everything around the workers: Postgres running their statements, clients, the sweeper, and the faults."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model import promises, worker
from tests.model import statements as sql
from tests.model.explore import Model, Step
from tests.model.state import PROTOCOL, Claim, Rules, Scope, Sent, State, Worker, Write, initial
from tests.model.worker import put

Steps = Iterator[Step[State]]


def model(scope: Scope, rules: Rules = PROTOCOL) -> Model[State]:
    def steps(state: State) -> Steps:
        for number in range(len(state.workers)):
            yield from worker.steps(state, number, scope, rules)
            yield from serve(state, number, rules)
            yield from lose_answer(state, number, rules)
            yield from crash(state, number)
        yield from serve_late(state, rules)
        yield from clients(state, scope, rules)
        yield from sweeper(state, scope, rules)
        yield from bells(state)
        yield from failover(state)

    return Model(initial(scope), steps, promises.violated, promises.done, dead_end=promises.ENDS)


# -- Postgres


def serve(state: State, number: int, rules: Rules) -> Steps:
    """The statement that a worker waits for goes on: takes its snapshot, or gets its row and commits."""
    who = state.workers[number]
    sent = who.sent
    if sent is None or sent.stage == "answered":
        return
    for label, after, then in run(state, sent, rules):
        yield Step(label, put(after, number, who._replace(sent=then)))
    if state.budget.locked and isinstance(sent.statement, Write) and sent.statement.kind != "RELEASE":
        budget = state.budget._replace(locked=state.budget.locked - 1)
        skipped = put(state, number, who._replace(sent=sent._replace(stage="answered", answer=sql.MISSING)))
        yield Step(f"{name(sent)} skips the row, which another has locked", skipped._replace(budget=budget), fault=True)


def serve_late(state: State, rules: Rules) -> Steps:
    """A statement whose sender has given up waiting runs after all."""
    for place, sent in enumerate(state.late):
        rest = (*state.late[:place], *state.late[place + 1 :])
        for label, after, then in run(state._replace(late=rest), sent, rules):
            if then is not None and then.stage == "begun":
                after = after._replace(late=_sorted((*rest, then)))
            yield Step(f"late: {label}", after)


def run(state: State, sent: Sent, rules: Rules) -> list[tuple[str, State, Sent | None]]:
    """One stage of a statement: (label, state, the statement after it; None: its answer is empty)."""
    statement = sent.statement
    if isinstance(statement, Claim):
        return _run_claim(state, sent, statement, rules)
    if sent.stage == "sent" and statement.kind == "APPEND" and not rules.append_locks:
        looked = sent._replace(stage="begun", snapshot=sql.fenced(state.db, statement, rules))
        return [(f"{name(sent)} sees in its snapshot that the lease stands", state, looked)]
    fence = bool(sent.snapshot) if sent.stage == "begun" else None
    db, answer = sql.execute(state.db, statement, rules, fence=fence)
    after = state._replace(db=db)
    if db.log != state.db.log and (db.claims, db.claimant) != (statement.claim, statement.holder):
        after = after._replace(broken=promises.OLDER)
    said = "writes nothing" if answer == sql.MISSING else "commits" if answer != "refused" else "finds its turn ended"
    return [(f"{name(sent)} {said}", after, sent._replace(stage="answered", snapshot=None, answer=answer))]


def _run_claim(state: State, sent: Sent, claim: Claim, rules: Rules) -> list[tuple[str, State, Sent | None]]:
    if sent.stage == "sent":
        if not sql.claim_sees(state.db, claim):
            return [(f"{name(sent)} finds nothing to claim", state, None)]
        early = None if rules.ends_fresh else state.db.last
        return [(f"{name(sent)} takes its snapshot", state, sent._replace(stage="begun", snapshot=early))]
    db, won = sql.claim(state.db, claim, rules, snapshot=sent.snapshot)
    if won is None:
        return [(f"{name(sent)} finds the row taken", state, None)]
    label = f"{name(sent)} commits: epoch {won.epoch}, log ends at {won.end.seq if won.end else 0}"
    return [(label, state._replace(db=db), sent._replace(stage="answered", snapshot=None, answer=won))]


def name(sent: Sent) -> str:
    if isinstance(sent.statement, Claim):
        return f"worker {sent.statement.worker}'s CLAIM"
    return f"worker {sent.statement.holder}'s {sent.statement.kind} under epoch {sent.statement.epoch}"


def _sorted(late: tuple[Sent, ...]) -> tuple[Sent, ...]:
    return tuple(sorted(late, key=repr))


# -- faults


def lose_answer(state: State, number: int, rules: Rules) -> Steps:
    """The connection breaks: the statement may have committed, may run late, or may never run."""
    who = state.workers[number]
    sent = who.sent
    if sent is None or not state.budget.unanswered:
        return
    budget = state.budget._replace(unanswered=state.budget.unanswered - 1)
    late = state.late if sent.stage == "answered" else _sorted((*state.late, sent))
    after = put(state, number, who._replace(sent=None))._replace(budget=budget, late=late)
    if isinstance(sent.statement, Write):
        lease = who.lease
        assert lease is not None
        if rules.doubt == "success":
            after = worker.acknowledge(after, number, sent.statement, "done")
        else:
            after = put(after, number, Worker(who.id, lease._replace(doubt=True)))
    how = "the answer to" if sent.stage == "answered" else "the connection of"
    yield Step(f"{how} {name(sent)} is lost", after, fault=True)


def crash(state: State, number: int) -> Steps:
    """The process dies and another takes its place; its statements may still run."""
    if not state.budget.crashes:
        return
    who = state.workers[number]
    if who.lease is None and who.sent is None:
        return  # nothing is lost with it
    late = state.late
    if who.sent is not None and who.sent.stage != "answered":
        late = _sorted((*late, who.sent))
    budget = state.budget._replace(crashes=state.budget.crashes - 1)
    after = put(state, number, Worker(state.next_id))
    after = after._replace(late=late, budget=budget, next_id=state.next_id + 1)
    yield Step(f"worker {who.id} crashes, {state.next_id} starts in its place", after, fault=True)


def bells(state: State) -> Steps:
    if state.bell and state.budget.bells:
        budget = state.budget._replace(bells=state.budget.bells - 1)
        yield Step("the wake-up is lost", state._replace(bell=False, budget=budget), fault=True)


def failover(state: State) -> Steps:
    """The replica stops following; later it takes over, and every commit in between is gone."""
    if not state.budget.failovers:
        return
    if state.replica is None:
        yield Step("the replica falls behind", state._replace(replica=state.db), fault=True)
        return
    budget = state.budget._replace(failovers=state.budget.failovers - 1)
    workers = tuple(
        Worker(who.id, who.lease._replace(doubt=True) if who.lease is not None else None) for who in state.workers
    )
    after = state._replace(
        db=state.replica, workers=workers, budget=budget, late=(), sweep=None, replica=None, failed_over=True
    )
    yield Step("failover: the replica takes over without the latest commits", after, fault=True)


# -- clients


def clients(state: State, scope: Scope, rules: Rules) -> Steps:
    """What clients do once more at most; a turn that needs a signal gets it, some time."""
    db, budget = state.db, state.budget
    if budget.submits:
        after = state._replace(db=sql.submit(db), budget=budget._replace(submits=budget.submits - 1))
        yield Step("a client submits another turn", _rung(after, scope))
    if budget.signals:
        after = state._replace(db=sql.mail(db, "signal", rules), budget=budget._replace(signals=budget.signals - 1))
        yield Step("a client sends the signal", _rung(after, scope))
    if budget.cancels:
        after = state._replace(db=sql.cancel(db, rules), budget=budget._replace(cancels=budget.cancels - 1))
        yield Step("a client cancels the first turn", _rung(after, scope))


def _rung(state: State, scope: Scope) -> State:
    """After the commit the wake-up is sent."""
    return state._replace(bell=True) if scope.bells and state.db.claimable else state


# -- the sweeper


def sweeper(state: State, scope: Scope, rules: Rules) -> Steps:
    yield from tombstone(state, rules)
    yield from rescue(state, scope, rules)
    if scope.bells and rules.rerings and state.db.claimable and not state.bell:
        yield Step("the sweeper runs RING and rings", state._replace(bell=True))


def tombstone(state: State, rules: Rules) -> Steps:
    """TOMBSTONE: a worker was silent past its TTL. If it lives (it was paused), that is the fault to be survived."""
    living = {who.id for who in state.workers}
    claiming = {sent.statement.worker for sent in state.late if isinstance(sent.statement, Claim)}
    holder = {state.db.holder} if state.db.holder is not None else set()
    for silent in sorted((living | claiming | holder) - state.db.dead):
        alive = silent in living
        if alive and not state.budget.silences:
            continue
        after = state._replace(db=state.db._replace(dead=state.db.dead | {silent}))
        if alive:
            after = after._replace(budget=state.budget._replace(silences=state.budget.silences - 1))
        if not rules.rescue_repeats:
            after = after._replace(unswept=state.unswept | {silent})
        yield Step(f"TOMBSTONE: {'the paused ' if alive else ''}worker {silent} is declared dead", after, fault=alive)


def rescue(state: State, scope: Scope, rules: Rules) -> Steps:
    """HOLDING_DEAD, then RESCUE: two statements, with anything in between. A sweeper that dies there starts over."""
    db = state.db
    if state.sweep is None:
        if not rules.rescue_by_id:
            if db.holder in db.dead:
                yield Step(
                    "RESCUE joins the lease to no live worker, in its snapshot", state._replace(sweep=frozenset())
                )
        elif not rules.rescue_repeats:
            if state.unswept:
                after = state._replace(sweep=state.unswept, unswept=frozenset())
                yield Step(f"the sweeper looks once at {sorted(state.unswept)}", after)
        elif db.holder in db.dead:
            yield Step(
                f"HOLDING_DEAD finds that {db.holder} holds a lease", state._replace(sweep=frozenset({db.holder}))
            )
        return
    over = state._replace(sweep=None)
    if db.holder in state.sweep or (not rules.rescue_by_id and db.holder is not None):
        after = over._replace(db=sql.take_away(db, rules, requeue=True))
        yield Step(f"RESCUE takes the lease from worker {db.holder}", _rung(after, scope))
    else:
        yield Step("RESCUE finds the lease gone", over)
