"""``torture``: one turn, put through every fault at every point, and compared with an undisturbed run.

    crash      the worker dies before and after each record, and another one goes on
    pause      the worker is stopped there, another one takes over and ends the turn, then the first one goes on
    doubled    the wake-up comes again at each record and after the end

All runs have the same turn id and a clock that stands still but for sleeps and pauses, so that an agent which keeps the
one rule (code between steps runs again) gives the same output in each of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from uuid import UUID

from longshift.clock import SYSTEM, Clock
from longshift.errors import UsageError
from longshift.model import Json, TurnStatus
from longshift.testing.bench import as_sent, new_record, rehearse
from longshift.testing.points import names_of
from longshift.testing.scenario import Scenario
from longshift.testing.verdict import Breach, Ran, Row, Violation, judge
from longshift.testing.world import Fault, Faults, Post, Time, World

TURN = UUID("01900000-0000-7000-8000-000000000001")
LIMIT = timedelta(seconds=60)
DEADLINE = timedelta(days=7)
SHOWN = 3
"""Places of one violation that the summary names."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it: a row for each run."""

    agent: str
    rows: tuple[Row, ...]

    @property
    def violations(self) -> list[tuple[Row, Violation]]:
        return [(row, violation) for row in self.rows for violation in row.violations]

    @property
    def counts(self) -> dict[str, int]:
        """Crash points, pauses and doubled wake-ups that it was put through."""
        by_fault = {fault: [row for row in self.rows if row.fault is fault] for fault in Fault}
        doubled = sum(refused.startswith("wake-up") for row in by_fault[Fault.DOUBLE] for refused in row.refused)
        return {"crash_points": len(by_fault[Fault.CRASH]), "pauses": len(by_fault[Fault.PAUSE]), "doubled": doubled}

    @property
    def summary(self) -> str:
        """One line."""
        crashes, pauses, doubled = self.counts.values()
        places: dict[str, list[str]] = {}
        for row, violation in self.violations:
            places.setdefault(str(violation), []).append(row.place)
        said = "; ".join(f"{_times(where)} {what}, at {_some(where)}" for what, where in places.items())
        return f"{crashes} crash points, {pauses} pauses, {doubled} doubled wake-ups: {said or 'no violation'}"


def torture(
    scenario: Callable[[], Scenario],
    *,
    once: Sequence[str] = (),
    limit: timedelta = LIMIT,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Put the turn of ``scenario`` through every fault at every point.

    Args:
        scenario: called anew for each run.
        once: steps whose functions may not run again, whatever happens; for effects that nothing makes idempotent.
        limit: of one run.
        progress: is told what comes, how many runs are done, and of how many.

    Raises:
        UsageError: undisturbed, the turn does not succeed, or not twice in the same way; the message says why.
        InvalidInput: the input does not fit the agent.
    """
    return asyncio.run(_torture(scenario, once=once, limit=limit, progress=progress))


async def _torture(
    scenario: Callable[[], Scenario], *, once: Sequence[str], limit: timedelta, progress: Progress
) -> Report:
    start = SYSTEM.now()
    clock = Clock(now=lambda: start)

    async def attempt(faults: Faults) -> Ran:
        async with asyncio.timeout(limit.total_seconds()):
            return await _run(scenario(), clock=clock, faults=faults)

    undisturbed, again = await _undisturbed(attempt, limit), await _undisturbed(attempt, limit)
    _check_same(undisturbed, again)
    _check_once(undisturbed, once)
    points = undisturbed.result.points
    plan = [(Fault.CRASH, point, Faults(crash_at=point)) for point in points]
    plan += [(Fault.PAUSE, point, Faults(pause_at=point)) for point in points]
    plan += [(Fault.DOUBLE, "", Faults(deliver_twice=True))]
    rows = []
    for done, (fault, point, faults) in enumerate(plan):
        progress(f"{fault} {point}".strip(), done, len(plan))
        try:
            rows.append(judge(fault, point, await attempt(faults), undisturbed, once=once))
        except TimeoutError:
            rows.append(Row(fault, point, "went on for ever", (Violation(Breach.ENDLESS, ""),), {}))
    progress("done", len(plan), len(plan))
    return Report(scenario().agent.name, tuple(rows))


async def _run(scenario: Scenario, *, clock: Clock, faults: Faults) -> Ran:
    agent = scenario.agent
    sent: Json = as_sent(agent, scenario.input)
    agent.read_input(sent)
    now = clock.now()
    record = new_record(agent, sent, session_id=TURN, metadata={}, now=now, until=now + DEADLINE)
    record = replace(record, id=TURN, root_turn_id=TURN, tenant_id=TURN)
    post = Post(scenario.signals, scenario.approve, scenario.settle)
    world = World(record, [], dict(scenario.artifacts), Time(clock), faults, post=post)
    result = await rehearse(agent, world, fake=scenario.fake)
    return Ran(result, scenario.effects.counts)


async def _undisturbed(attempt: Callable[[Faults], Awaitable[Ran]], limit: timedelta) -> Ran:
    try:
        ran = await attempt(Faults())
    except TimeoutError:
        raise UsageError(
            f"undisturbed, the turn does not end within {limit.total_seconds():g} s: give its slow steps fakes"
        ) from None
    if ran.result.status is not TurnStatus.SUCCEEDED:
        message = (ran.result.error or {}).get("message", "")
        raise UsageError(
            f"undisturbed, the turn has {ran.result.status}: {message}. Give it another input, or its steps fakes: see "
            "longshift.testing.Scenario"
        )
    return ran


def _check_same(one: Ran, two: Ran) -> None:
    """Raises UsageError: two undisturbed runs differ, so that there is nothing to compare with."""
    advice = "make it the same in every run: give the step a fake, or take time, ids and chance from the turn"
    for a, b in zip(names_of(one.result.events), names_of(two.result.events), strict=False):
        if a != b:
            raise UsageError(f"two undisturbed runs differ: one records {a!r} where the other records {b!r}; {advice}")
    if one.effects != two.effects:
        raise UsageError(f"two undisturbed runs have different effects: {one.effects}, then {two.effects}; {advice}")
    if one.output == two.output:
        return
    for a, first, second in zip(names_of(one.result.events), one.result.events, two.result.events, strict=False):
        for part, what in (("digest", "is called with other arguments"), ("result", "returns something else")):
            if first.kind.startswith("step.") and first.payload.get(part) != second.payload.get(part):
                step = a.partition(" ")[2]
                raise UsageError(
                    f"two undisturbed runs end differently: step {step!r} {what} the second time; {advice}"
                )
    raise UsageError(f"two undisturbed runs end differently, though their steps return the same; {advice}")


def _check_once(undisturbed: Ran, once: Sequence[str]) -> None:
    for name in once:
        if name not in undisturbed.result.calls:
            known = ", ".join(sorted(undisturbed.result.calls)) or "none"
            raise UsageError(f"the turn has no step {name!r}: it has {known}")


def _times(places: Sequence[str]) -> str:
    return "1" if len(places) == 1 else f"{len(places)}x"


def _some(places: Sequence[str]) -> str:
    more = len(places) - SHOWN
    return ", ".join(places[:SHOWN]) + (f" and {more} more" if more > 0 else "")
