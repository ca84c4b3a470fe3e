"""What there is: the database, two workers and their statements under way. Values only; equal states are one state.

One session is enough: no statement decides anything about one session by looking at another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

OPEN = ("queued", "running", "waiting")


class Event(NamedTuple):
    """A row of the log. The whole tuple is its id: two tuples are equal if, and only if, one writer made one event."""

    seq: int
    epoch: int
    claim: int  # which claim its writer holds, 1, 2, ...; in the model only: epochs may be broken by a variant
    worker: int
    turn: int
    kind: str  # started, a, b, signal, waiting, drained, finished, cancelled
    tries: int = 0  # grows only where a variant makes new ids for a retry

    def __str__(self) -> str:
        return f"{self.seq}:{self.kind}(turn {self.turn}, epoch {self.epoch})"


class Turn(NamedTuple):
    status: str  # queued, running, waiting, finished, cancelled
    attempted: bool = False  # attempts > 0


class Db(NamedTuple):
    """Everything that is committed: the session's row, its turns, its mail, its log, and who has a tombstone."""

    holder: int | None  # lease_worker
    epoch: int  # lease_epoch; also where the sequence of epochs stands, for nobody else draws from it
    ready: bool  # ready_at <= clock_timestamp(); nothing is ready later: waits are for mail
    head_waiting: bool
    mail_seq: int
    open_turns: int
    turns: tuple[Turn, ...]
    mail: tuple[str, ...]  # unconsumed: "signal", "cancel"
    log: tuple[Event, ...]  # by seq
    dead: frozenset[int]  # worker ids with a tombstone
    claims: int = 0  # in the model only: how many claims have committed, and
    claimant: int | None = None  # whose the last one is

    @property
    def claimable(self) -> bool:
        return self.holder is None and self.ready

    @property
    def last(self) -> Event | None:
        return self.log[-1] if self.log else None

    def at(self, seq: int) -> Event | None:
        return next((event for event in self.log if event.seq == seq), None)

    def head(self) -> int | None:
        """The turn that runs next, or is running."""
        return next((number for number, turn in enumerate(self.turns) if turn.status in OPEN), None)

    def recorded(self, turn: int) -> frozenset[str]:
        return frozenset(event.kind for event in self.log if event.turn == turn)


class Write(NamedTuple):
    """A statement of a holder: START, APPEND, FINISH, LEAVE or RELEASE (which writes no event)."""

    kind: str
    holder: int
    epoch: int
    claim: int
    turn: int | None = None
    events: tuple[Event, ...] = ()
    status: str = ""  # FINISH, LEAVE: what becomes of the turn
    keep: bool = False  # FINISH
    seen: int = 0  # LEAVE: mail_seq as of the last look, or of the claim


class Claim(NamedTuple):
    worker: int
    kind: str = "CLAIM"


class Won(NamedTuple):
    """The reply to a claim."""

    epoch: int
    claim: int
    mail_seq: int
    end: Event | None  # of the log
    turn: int | None


class Sent(NamedTuple):
    """A statement under way, from its sending to the arrival of its answer."""

    statement: Write | Claim
    stage: str = "sent"  # sent, begun (has its snapshot, waits for the row), answered
    snapshot: Event | bool | None = None  # kept only where a variant uses it
    answer: str | Won | None = (
        None  # to a write: done, kept, refused (START of an ended turn), missing; None: won nothing
    )


class Lease(NamedTuple):
    """What a worker believes; see longshift.lease."""

    holder: int  # the worker id it was claimed under
    epoch: int
    claim: int
    seq: int  # the last one of which it knows
    last: Event | None
    seen: int  # mail_seq as of the last look, or of the claim
    turn: int | None
    phase: str = "claimed"  # claimed, checked, running, heard, quiet, draining, cancelling, between, vain
    known: frozenset[str] = frozenset()  # what it knows to be recorded of its turn
    unacked: Write | None = None
    doubt: bool = False  # Postgres did not answer: closed until compared


class Worker(NamedTuple):
    id: int
    lease: Lease | None = None
    sent: Sent | None = None


class Budget(NamedTuple):
    """How often each thing may still happen: first what clients do, then faults."""

    submits: int = 0
    signals: int = 0
    cancels: int = 0
    drains: int = 0
    unanswered: int = 0  # an answer that never arrives; the statement may have run, run late, or never run
    silences: int = 0  # a living worker is declared dead
    crashes: int = 0
    locked: int = 0  # a write meets a row that somebody else has locked, and skips it
    bells: int = 0  # wake-ups lost or doubled
    failovers: int = 0  # a replica takes over that has not got the latest commits


class State(NamedTuple):
    db: Db
    workers: tuple[Worker, ...]
    budget: Budget
    late: tuple[Sent, ...] = ()  # statements whose sender waits no more; they may still run
    sweep: frozenset[int] | None = None  # between the two statements of a rescue: whose leases
    unswept: frozenset[int] = frozenset()  # used by a variant: whom the rescue has not looked at yet
    bell: bool = False  # a wake-up is under way
    next_id: int = 2
    replica: Db | None = None  # what a failover would leave
    failed_over: bool = False
    broken: str | None = None  # the promise that the last transition broke


@dataclass(frozen=True, slots=True)
class Rules:
    """The protocol's fixes. All are on in the protocol; each variant takes one away."""

    append_fenced: bool = True  # APPEND depends on the lease, not on the primary key alone
    append_locks: bool = True  # ... as of the row lock, not as of its snapshot
    epoch_bumped: bool = True  # each claim and rescue draws a new epoch
    epoch_compared: bool = True  # the fence compares the epoch
    worker_compared: bool = True  # ... and the worker: a failover may repeat an epoch
    ends_fresh: bool = True  # a claim reads the end of the log after it has the row
    reconcile: bool = True  # workers give back what they hold in the database and not in memory
    reconcile_patient: bool = True  # ... but not while the claim's reply may be on its way
    rescue_repeats: bool = True  # each pass looks at all who have a tombstone
    rescue_by_id: bool = True  # by a list of dead workers, not by what no live worker holds
    start_checks: bool = True  # START leaves a turn alone that has ended before it began
    mail_compared: bool = True  # LEAVE compares mail_seq
    look_sees_cancel: bool = True  # a look that finds a cancel leaves the mail_seq seen as it was
    mail_rings: bool = True  # mail makes its session ready
    verbatim: bool = True  # a retry has the same event ids
    doubt: Literal["settled", "success", "failure"] = "settled"  # a write without an answer is looked for in the log
    recovery_compares: bool = True  # after an outage each lease is compared with the log
    release_checks: bool = True  # RELEASE checks the holder
    rerings: bool = True  # the sweeper rings ready sessions again


PROTOCOL = Rules()


@dataclass(frozen=True, slots=True)
class Scope:
    """What is looked at: which faults, how many, and which agent. The first turn has two steps, that go in one run."""

    name: str
    what: str
    budget: Budget
    waits: bool = False  # the first turn then waits for a signal
    bells: bool = False  # wake-ups are counted; else one may arrive at any time, as often as it likes


def initial(scope: Scope) -> State:
    """One turn is accepted and rung; two workers are idle."""
    db = Db(
        holder=None,
        epoch=0,
        ready=True,
        head_waiting=False,
        mail_seq=0,
        open_turns=1,
        turns=(Turn("queued"),),
        mail=(),
        log=(),
        dead=frozenset(),
    )
    return State(db, (Worker(0), Worker(1)), scope.budget, bell=scope.bells)
