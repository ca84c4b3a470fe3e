"""The model is of the statements as they are: what it takes from them must still be in them.

If one of these fails, the protocol has changed: change the model accordingly (its table is in the package's docstring), see
that it still holds, and only then what is looked for here.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module

import pytest
from sqlalchemy import TextClause

import tests.model
from longshift.awaiting import Awaiting
from longshift.journal import Journal
from longshift.runner import Runner
from longshift.worker import Worker
from tests.model import statements, worker, world

FENCE = (
    "ON s.id = h.session_id AND s.lease_epoch = h.epoch AND s.lease_worker = h.worker",
    "FOR NO KEY UPDATE OF s SKIP LOCKED",
)
RELIES = {
    "leases.CLAIM": (
        "lease_worker IS NULL AND ready_at <= clock_timestamp()",
        "w.dead_at IS NULL",
        "FOR NO KEY UPDATE SKIP LOCKED",
        "lease_epoch = nextval('epochs')",
        "head_waiting = false",
        "s.mail_seq",
    ),
    "leases.ENDS": (
        "coalesce(last.seq, s.archived_through)",
        "ORDER BY seq DESC LIMIT 1",
        "ORDER BY t.position LIMIT 1",
    ),
    "leases.HEAD": ("t.status IN ('queued', 'running', 'waiting')", "ORDER BY t.position LIMIT 1"),
    "leases.RELEASE": (
        "WHERE id = :session AND lease_epoch = :epoch AND lease_worker = :worker",
        "ready_at = CASE WHEN open_turns > 0",
    ),
    "leases.RECONCILE": (
        "ON s.id = r.id AND s.lease_epoch = r.epoch",
        "WHERE s.lease_worker = :worker",
        "FOR NO KEY UPDATE OF s SKIP LOCKED",
        "lease_worker = NULL, lease_epoch = nextval('epochs')",
        "ready_at = CASE WHEN s.open_turns > 0 THEN clock_timestamp() END",
    ),
    "log.APPEND": (*FENCE, "FROM r JOIN l o ON", "ON CONFLICT DO NOTHING RETURNING session_id, epoch"),
    "log.APPEND_CONSUMING": (
        *FENCE,
        "FROM r JOIN l o ON",
        "ON CONFLICT DO NOTHING RETURNING session_id, epoch, id",
        "FROM i JOIN r ON r.id = i.id",
    ),
    "log.START": (*FENCE, "turns.status IN ('queued', 'waiting', 'running')", "FROM r JOIN t o ON"),
    "log.FINISH": (
        *FENCE,
        "open_turns = s.open_turns - 1",
        "CASE WHEN r.keep AND s.open_turns > 1 THEN s.lease_worker END",
        "ready_at = CASE WHEN s.open_turns > 1 THEN clock_timestamp() END",
        "FROM r JOIN t o ON",
    ),
    "log.LEAVE": (
        *FENCE,
        "lease_worker = NULL, head_waiting = (r.status = 'waiting')",
        "s.mail_seq <> r.seen OR (r.status = 'queued' AND r.until IS NULL)",
        "FROM r JOIN t o ON",
    ),
    "log.STANDING": (
        "s.lease_epoch = r.epoch AND s.lease_worker = r.worker",
        "e.seq = r.seq",
        "ORDER BY seq DESC LIMIT 1",
    ),
    "upkeep.TOMBSTONE": ("SET dead_at = clock_timestamp()", "w.dead_at IS NULL"),
    "upkeep.HOLDING_DEAD": ("w.dead_at IS NOT NULL AND EXISTS (SELECT 1 FROM sessions s WHERE s.lease_worker = w.id)",),
    "upkeep.RESCUE": (
        "lease_worker = ANY(CAST(:workers AS uuid[]))",
        "FOR NO KEY UPDATE SKIP LOCKED",
        "lease_worker = NULL, lease_epoch = nextval('epochs')",
        "ready_at = CASE WHEN s.open_turns > 0 THEN clock_timestamp() END",
        "turns.status = 'running'",
    ),
    "upkeep.RING": ("lease_worker IS NULL AND ready_at <= (SELECT clock_timestamp())", "dispatched_at <"),
    "intake.ADMIT": (
        "excluded.open_turns = 0 OR sessions.head_waiting THEN sessions.ready_at",
        "ELSE coalesce(sessions.ready_at, clock_timestamp())",
    ),
    "mail.LOOK": (
        "s.mail_seq, EXISTS (SELECT 1 FROM mail m",
        "m.kind IN ('cancel', 'expire', 'condemn')) AS urgent",
        "m.consumed_at IS NULL",
    ),
    "mail.ADD_SIGNAL": ("mail_seq = mail_seq + 1", "CASE WHEN open_turns > 0 THEN clock_timestamp() ELSE ready_at END"),
    "mail.ADD_MAIL": (
        "t.status IN ('queued', 'running', 'waiting')",
        "mail_seq = s.mail_seq + 1, ready_at = clock_timestamp()",
    ),
    "mail.END_UNSTARTED": (
        "attempts = 0 AND status IN ('scheduled', 'queued')",
        "ready_at = CASE WHEN s.open_turns > n.n THEN s.ready_at END",
    ),
    "liveness.HEARTBEAT": ("WHERE id = :id AND dead_at IS NULL", "RETURNING"),
}
NEVER = {  # what would make another protocol of it
    "leases.CLAIM": ("FROM events", "max(seq)"),
    "leases.RECONCILE": ("JOIN workers",),
    "upkeep.RESCUE": ("LEFT JOIN workers", "NOT EXISTS", "dead_at"),  # whose it is decides, not who lives
}
CODE = {
    Journal._judge: (
        "standing.event_id == write.events[0].id",
        "standing.last_seq == lease.seq",
        "self.lose(lease, fenced=True)",
    ),
    Journal._compare: ("(standing.last_seq, standing.last_event_id) != (lease.seq, lease.event_id)",),
    Journal._take: ("if lease.unacked is None:",),
    Journal._doubt: ("self.suspect(",),
    Runner._leave: ("seen = lease.claim.mail_seq if idle.seen is None else idle.seen",),
    Runner._drive: ("run.idle = Idle(waits.until, execution.awaiting.seen",),
    Awaiting._look: ("if not look.urgent:", "self.seen = look.mail_seq"),
    Worker._reconcile: ("async with self.claiming:", "standing - {lease.key for lease in self._journal.held}"),
    Worker._reborn: ("self._journal.lose(lease)",),
}
TABLE = re.findall(r"^    (\w+\.\w+) +(\w+\.[A-Z_]+) ", tests.model.__doc__ or "", flags=re.MULTILINE)


def sql(name: str) -> str:
    module, _, attribute = name.partition(".")
    statement = getattr(import_module(f"longshift.db.{module}"), attribute)
    assert isinstance(statement, TextClause)
    return statement.text


@pytest.mark.parametrize("name", RELIES)
def test_a_statement_has_what_the_model_takes_from_it(name: str) -> None:
    text = sql(name)

    for part in RELIES[name]:
        assert part in text, f"{part!r} is not in {name} any more: does the model still tell the truth?"
    for part in NEVER.get(name, ()):
        assert part not in text, f"{part!r} is in {name} now: does the model still tell the truth?"


def test_the_end_of_the_log_is_read_in_the_transaction_of_the_claim() -> None:
    source = inspect.getsource(import_module("longshift.db.leases")._claim)

    assert source.index("db.transaction()") < source.index("execute(statement") < source.index("execute(ENDS")


@pytest.mark.parametrize("function", CODE, ids=lambda function: function.__qualname__)
def test_the_worker_does_what_the_models_worker_does(function: object) -> None:
    source = inspect.getsource(function)  # type: ignore[arg-type]

    for part in CODE[function]:  # type: ignore[index]
        assert part in source, f"{part!r} is not there any more: does the model still tell the truth?"


def test_the_docstring_lists_every_statement_and_names_functions_that_exist() -> None:
    assert {statement for _, statement in TABLE} == RELIES.keys()
    homes = {"statements": statements, "worker": worker, "world": world}
    for function, _ in TABLE:
        module, _, attribute = function.partition(".")
        assert callable(getattr(homes[module], attribute)), function
