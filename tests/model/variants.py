"""The scopes in which the protocol must hold, and its variants with one fix taken away, each of which must break."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.model import promises
from tests.model.explore import Result, explore
from tests.model.state import PROTOCOL, Budget, Rules, Scope, State
from tests.model.world import model

SCOPES = {
    scope.name: scope
    for scope in (
        Scope("pause", "two turns; a worker is paused past its TTL", Budget(submits=1, silences=1)),
        Scope("doubt", "a worker is paused; any one answer is lost", Budget(unanswered=1, silences=1)),
        Scope("claims", "a worker crashes; any one answer is lost", Budget(unanswered=1, crashes=1)),
        Scope("locked", "two turns; a row is locked; an answer is lost", Budget(submits=1, unanswered=1, locked=1)),
        Scope("mail", "a wait races its signal; an answer is lost", Budget(signals=1, unanswered=1), waits=True),
        Scope("mail-pause", "a wait races its signal; a worker is paused", Budget(signals=1, silences=1), waits=True),
        Scope("wait-cancel", "a cancel ends a wait; an answer is lost", Budget(cancels=1, unanswered=1), waits=True),
        Scope("cancel", "two turns, one cancelled; an answer is lost", Budget(submits=1, cancels=1, unanswered=1)),
        Scope("drain", "a worker drains; a worker crashes", Budget(drains=1, crashes=1)),
        Scope("bells", "two turns; wake-ups are lost or doubled", Budget(submits=1, bells=2, unanswered=1), bells=True),
        Scope("failover", "a replica takes over that lacks commits", Budget(failovers=1, unanswered=1)),
    )
}
"""Small budgets, every schedule: a protocol error needs an odd order of few events, rarely many of them."""

DEEP = {
    scope.name: scope
    for scope in (
        Scope("deep-pause", "pause and doubt with two turns", Budget(submits=1, unanswered=1, silences=1)),
        Scope("deep-claims", "a crash and two lost answers", Budget(unanswered=2, crashes=1)),
        Scope("deep-pauses", "both workers are paused", Budget(silences=2)),
        Scope("deep-mail", "mail under pause and doubt", Budget(signals=1, unanswered=1, silences=1), waits=True),
        Scope("deep-cancel", "cancel under pause", Budget(submits=1, cancels=1, silences=1)),
        Scope("deep-drain", "drain with two turns and a crash", Budget(submits=1, drains=1, crashes=1)),
        Scope("deep-failover", "failover after a pause", Budget(silences=1, failovers=1)),
    )
}
"""Larger budgets: a million states and more in all."""


@dataclass(frozen=True, slots=True)
class Variant:
    """The protocol without one of its fixes, the promise that then breaks first, and where."""

    what: str
    rules: Rules
    breaks: str
    scope: str

    def run(self, *, without: str | None = None) -> Result[State]:
        """``without``: go on past violations of this promise, to see whether any other breaks."""
        made = model(SCOPES[self.scope], self.rules)
        if without is None:
            return explore(made)

        def violated(state: State) -> str | None:
            return promises.violated(state._replace(broken=None) if state.broken == without else state)

        waived = replace(made, violated=violated)
        return explore(waived)


VARIANTS = {
    "append-unfenced": Variant(
        "APPEND relies on the primary key alone", Rules(append_fenced=False), promises.OLDER, "pause"
    ),
    "append-unlocked": Variant(
        "APPEND trusts its snapshot for the lease", Rules(append_locks=False), promises.OLDER, "pause"
    ),
    "epoch-kept": Variant(
        "nobody draws a new epoch", Rules(epoch_bumped=False, worker_compared=False), promises.OLDER, "pause"
    ),
    "epoch-not-compared": Variant("the worker alone is compared", Rules(epoch_compared=False), promises.OLDER, "doubt"),
    "worker-not-compared": Variant(
        "the epoch alone is compared, and a failover repeats one",
        Rules(worker_compared=False),
        promises.OLDER,
        "failover",
    ),
    "ends-in-snapshot": Variant(
        "a claim reads the end of the log in its own snapshot", Rules(ends_fresh=False), promises.FOOLED, "pause"
    ),
    "start-unchecked": Variant(
        "START does not look whether its turn has ended", Rules(start_checks=False), promises.ROWS, "cancel"
    ),
    "no-reconcile": Variant("claims whose reply was lost stay", Rules(reconcile=False), promises.ENDS, "claims"),
    "impatient-reconcile": Variant(
        "RECONCILE does not wait for the replies to claims",
        Rules(reconcile_patient=False),
        promises.FOOLED,
        "claims",
    ),
    "one-shot-rescue": Variant("the dead are looked at once", Rules(rescue_repeats=False), promises.ENDS, "claims"),
    "rescue-by-anti-join": Variant(
        "RESCUE takes what joins to no live worker", Rules(rescue_by_id=False), promises.FOOLED, "pause"
    ),
    "mail-not-compared": Variant("LEAVE does not compare mail_seq", Rules(mail_compared=False), promises.ENDS, "mail"),
    "cancel-not-seen": Variant(
        "a look takes note of mail_seq though it has found a cancel",
        Rules(look_sees_cancel=False),
        promises.ENDS,
        "wait-cancel",
    ),
    "mail-not-ready": Variant("mail does not make its session ready", Rules(mail_rings=False), promises.ENDS, "mail"),
    "new-ids": Variant("a retry makes new event ids", Rules(verbatim=False), promises.FOOLED, "doubt"),
    "doubt-is-success": Variant(
        "a write without an answer is acknowledged", Rules(doubt="success"), promises.UNTRUE, "doubt"
    ),
    "doubt-is-failure": Variant(
        "a write without an answer is done anew at the end of the log",
        Rules(doubt="failure"),
        promises.AGAIN,
        "doubt",
    ),
    "no-comparison": Variant(
        "leases are not compared with the log after an outage",
        Rules(recovery_compares=False),
        promises.GAP,
        "failover",
    ),
    "release-unchecked": Variant(
        "RELEASE does not check the holder", Rules(release_checks=False), promises.FOOLED, "cancel"
    ),
    "no-rering": Variant("nobody rings again", Rules(rerings=False), promises.ENDS, "bells"),
}


def check(scope: Scope) -> Result[State]:
    """The protocol as it is, under every schedule that the scope allows."""
    return explore(model(scope, PROTOCOL))
