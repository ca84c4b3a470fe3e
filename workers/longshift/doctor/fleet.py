"""Checks of the fleet: who works, what waits for whom, and what is left lying about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Final

from longshift.db import doctor, workers
from longshift.db.revision import newest
from longshift.db.workers import WorkerRecord
from longshift.doctor.findings import Check, Seen, fine, problem, warning
from longshift.doctor.ground import Ground
from longshift.model import Condition

NEEDS = ("postgres", "schema")
LATE = timedelta(minutes=1)
DRAINS_LONG = timedelta(minutes=2)
"""Beyond the grace: a worker that drains waits only for calls of irreversible tools."""
SHOWN = 5


async def _workers(ground: Ground) -> Seen:
    alive = [worker for worker in await ground.workers() if worker.alive and not worker.isolated]
    if alive:
        slots = sum(worker.capacity for worker in alive)
        return fine(
            f"{len(alive)} are alive, with {slots:,} slots, and run {sum(each.running for each in alive):,} turns"
        )
    waiting = sum(each.turns for each in await workers.versions(ground.db))
    return problem(f"none is alive, and {waiting:,} turns are open") if waiting else warning("none is alive")


async def _conditions(ground: Ground) -> Seen:
    ill = [
        worker
        for worker in await ground.workers()
        if worker.alive and worker.condition in (Condition.STUCK, Condition.UNREADY)
    ]
    if ill:
        said = [
            f"{_place(worker)} is {worker.condition}: {worker.complaint or 'it does not say why'}" for worker in ill
        ]
        return problem(_some(said))
    return fine("nobody is stuck or unready")


async def _silent(ground: Ground) -> Seen:
    silent = [worker for worker in await ground.workers() if not worker.alive]
    if silent:
        return warning("nobody has heard of these for 15 s: " + _some(map(_place, silent)))
    return fine("every worker beats")


async def _leader(ground: Ground) -> Seen:
    alive = [worker for worker in await ground.workers() if worker.alive]
    able = [worker for worker in alive if not worker.isolated and worker.draining_since is None]
    if able and not any(worker.leads for worker in alive):
        return problem("no worker leads: nothing is rescued, rung again, expired or collected")
    return fine("one worker leads" if able else "there is nobody to lead")


async def _versions(ground: Ground) -> Seen:
    alive = [worker for worker in await ground.workers() if worker.alive]
    old = [worker for worker in alive if worker.revision is None or worker.revision < newest()]
    if old:
        return warning("of an older version: " + _some(map(_place, old)))
    found = sorted({worker.version or "unknown" for worker in alive})
    return fine("all workers are " + " or ".join(found) if found else "there are no workers")


async def _drains(ground: Ground) -> Seen:
    patience = ground.config.drain_grace + DRAINS_LONG
    long = [
        worker
        for worker in await ground.workers()
        if (since := worker.draining_since or worker.drain_asked_at) and worker.heartbeat_at - since > patience
    ]
    return (
        warning("these have drained for long: " + _some(map(_place, long))) if long else fine("nobody drains for long")
    )


async def _queues(ground: Ground) -> Seen:
    found = await doctor.backlog(ground.db)
    unserved = [each for each in found if each.runnable and not each.workers]
    if unserved:
        return problem("nobody serves " + _some(f"{each.queue!r}, where {each.runnable:,} wait" for each in unserved))
    late = [each for each in found if each.oldest_seconds > LATE.total_seconds()]
    if late:
        said = (
            f"{each.runnable:,} sessions in {each.queue!r}, the oldest for {each.oldest_seconds / 60:.0f} minutes, with "
            f"{each.running:,} of {each.slots:,} slots in use"
            for each in late
        )
        return warning("work waits: " + _some(said))
    return fine(f"{sum(each.runnable for each in found):,} sessions are ready to run")


async def _unserved(ground: Ground) -> Seen:
    if any(worker.revision is None for worker in await ground.workers() if worker.alive):
        return fine("not known: workers of an older version do not say which agents they have")
    found = await workers.versions(ground.db)
    served = {each.agent for each in found if each.workers}
    missing = [each for each in found if each.turns and not each.workers and (each.version or each.agent not in served)]
    if missing:
        said = (f"{each.turns:,} turns need {each.agent!r} in version {each.version or 'any'}" for each in missing)
        return problem("no worker has what open turns need: " + _some(said))
    return fine("every open turn has a worker with its agent")


async def _leases(ground: Ground) -> Seen:
    left = await ground.leftovers()
    lost = left.held_by_dead + left.held_by_nobody
    return problem(f"dead workers hold {lost:,} sessions") if lost else fine("no dead worker holds a session")


async def _deadlines(ground: Ground) -> Seen:
    late = (await ground.leftovers()).past_deadline
    return (
        problem(f"{late:,} turns are past their deadline and open")
        if late
        else fine("no open turn is past its deadline")
    )


async def _suspects(ground: Ground) -> Seen:
    count = (await ground.leftovers()).suspects
    return warning(f"{count:,} turns may have crashed their process") if count else fine("no turn is a suspect")


async def _in_doubt(ground: Ground) -> Seen:
    count = (await ground.leftovers()).in_doubt
    return warning(f"of {count:,} tool calls nobody knows whether they happened") if count else fine("none is in doubt")


async def _unanswered(ground: Ground) -> Seen:
    count = (await ground.leftovers()).unanswered
    return (
        warning(f"{count:,} have waited for more than a day") if count else fine("none has waited for more than a day")
    )


async def _garbage(ground: Ground) -> Seen:
    left = await ground.leftovers()
    found = [
        f"{count:,} {what}"
        for count, what in ((left.unpurged, "deleted sessions"), (left.garbage, "objects that nothing refers to"))
        if count
    ]
    return warning("not removed for a day: " + " and ".join(found)) if found else fine("what was deleted is gone")


async def _keys(ground: Ground) -> Seen:
    count = (await ground.leftovers()).keys
    return fine(f"{count:,} are valid") if count else warning("none is valid: the API refuses everybody")


def _place(worker: WorkerRecord) -> str:
    return f"{worker.host}:{worker.pid}"


def _some(said: Iterable[str]) -> str:
    every: Sequence[str] = list(said)
    more = f", and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


CHECKS: Final = (
    Check("workers", _workers, "Start some: `longshift worker`. What was accepted waits for them.", NEEDS),
    Check(
        "conditions",
        _conditions,
        "Unready: see to what they name. Stuck: `longshift fleet show WORKER` says what each turn has recorded last; "
        "`longshift fleet drain WORKER` has others go on.",
        NEEDS,
    ),
    Check(
        "silence",
        _silent,
        "See whether their processes run and reach Postgres. Another worker declares them dead and takes over; if there is "
        "none, the next one that starts does.",
        NEEDS,
    ),
    Check(
        "leader",
        _leader,
        "If this lasts for a minute, restart the workers and look at their logs for `heartbeat`.",
        NEEDS,
    ),
    Check(
        "versions",
        _versions,
        "If you are deploying, go on. Else replace them: `longshift migrate --contract` waits for it.",
        NEEDS,
    ),
    Check(
        "drains",
        _drains,
        "They wait for calls of irreversible tools: `longshift fleet show WORKER` names them. A second SIGTERM ends them now.",
        NEEDS,
    ),
    Check(
        "queues",
        _queues,
        "Start workers for these queues (LONGSHIFT_QUEUES), or more of them; with free slots, look for stuck ones.",
        NEEDS,
    ),
    Check(
        "agents",
        _unserved,
        "Start workers that have these versions, or cancel the turns: `longshift fleet versions` lists them.",
        NEEDS,
    ),
    Check("leases", _leases, "A living worker frees them within seconds: start one, and see that one leads.", NEEDS),
    Check(
        "deadlines", _deadlines, "A living worker ends them within seconds: start one, and see that one leads.", NEEDS
    ),
    Check(
        "suspects",
        _suspects,
        "They run apart from all others until it is known which of them crashes; look at the workers' logs for why.",
        NEEDS,
    ),
    Check(
        "tool calls", _in_doubt, "`longshift tools --open` lists them, `longshift settle` says what happened.", NEEDS
    ),
    Check("approvals", _unanswered, "`longshift approvals` lists them, `longshift approve` answers.", NEEDS),
    Check(
        "garbage",
        _garbage,
        "The artifact store refuses deletions, or no worker leads: look at the workers' logs for `collection`.",
        NEEDS,
    ),
    Check("keys", _keys, "`longshift keys create NAME` makes one.", NEEDS),
)
