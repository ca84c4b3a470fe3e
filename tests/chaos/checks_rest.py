"""What must be true of everything around turns: answers, processes, Redis, leases."""

from __future__ import annotations

from collections.abc import Iterator

from tests.chaos.evidence import Evidence

WAKE_UPS = "longshift.wake."


def answers_keep_the_contract(found: Evidence) -> Iterator[str]:
    """Whatever fails, clients get a problem that says whether to try again: no 500, nothing else than problem+json."""
    yield from found.bad_answers


def redis_keeps_nothing(found: Evidence) -> Iterator[str]:
    """No key without a time to live beside the wake-up lists, and these are empty when there is nothing to do."""
    for name, kind in {(key.name, key.kind) for key in [*found.redis_keys_during, *found.redis_keys] if key.ttl < 0}:
        if not name.startswith(WAKE_UPS):
            yield f"the key {name} ({kind}) has no time to live"
    for key in found.redis_keys:
        if key.name.startswith(WAKE_UPS) and key.length:
            yield f"{key.length} wake-ups are left on {key.name}"


def leases_are_given_back(found: Evidence) -> Iterator[str]:
    """When nothing is to be done nobody holds a lease, least of all a worker that was declared dead."""
    if found.leases_held:
        yield f"{found.leases_held} leases are held although every turn has ended"
    if found.leases_of_the_dead:
        yield f"{found.leases_of_the_dead} leases belong to workers that were declared dead"


def logs_have_no_traceback(found: Evidence) -> Iterator[str]:
    """What was injected is foreseen: no process is surprised by it."""
    yield from found.tracebacks


def copies_are_the_fold(found: Evidence) -> Iterator[str]:
    """P5: every context from memory or Redis is compared with the fold of its log, and none is another."""
    yield from found.drift


def processes_end_as_told(found: Evidence) -> Iterator[str]:
    """No process ends by itself, and after SIGTERM each ends in time, with code 0."""
    for death in found.deaths:
        yield f"{death.process} ended with code {death.code}: {death.log}"
