"""One rehearsal: load and replica counts side by side, then calm, then the check."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longshift.embedded import Guardian
from longshift.testing.waiting import wait_until
from tests.chaos.checker import Checked, check
from tests.chaos.edge import Edge
from tests.chaos.evidence import Evidence
from tests.chaos.gather import gather_api, gather_files, gather_servers
from tests.rehearsal.checks import check_drains, check_moves
from tests.rehearsal.figures import Figures, figures_of
from tests.rehearsal.load import Visitor, visits
from tests.rehearsal.rule import Autoscaler, Rule
from tests.rehearsal.stage import Sample, Stage

UP = 60.0
"""Seconds in which the first worker must be ready, and the last must be gone."""
LOOK_EVERY = 0.5
COST_EVERY = 5.0


@dataclass(frozen=True, slots=True)
class Phase:
    """``pace`` visits begin in a second, for so many ``seconds``; ``replicas``: None, a rule decides.

    ``settled``: it also lasts until all replicas are ready, and those that are too many have ended.
    """

    seconds: float
    pace: float
    replicas: int | None = None
    settled: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """What decides a rehearsal."""

    phases: Sequence[Phase]
    seed: int
    slots: int
    grace: float
    rule: Rule | None = None  # where the phases have no replicas
    faster: float = 1.0  # by so much it is faster than the one that is deployed
    patience: float = 120.0  # seconds from the end of the load to the end of the last turn

    @property
    def seconds(self) -> float:
        """Of load, at least."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def limit(self) -> float:
        """Seconds after which the whole run is stuck, whatever happens."""
        return self.seconds + self.patience + (4 + sum(phase.settled for phase in self.phases)) * UP


@dataclass
class Progress:
    """Where a rehearsal is. Times are seconds since the load began."""

    begun: float = field(default_factory=time.monotonic)
    phase: Phase | None = None  # None: the load is over
    series: list[Sample] = field(default_factory=list)
    changes: list[tuple[float, int]] = field(default_factory=list)  # of the replica count

    @property
    def now(self) -> float:
        return round(time.monotonic() - self.begun, 2)


@dataclass(slots=True)
class Result:
    """What a rehearsal found."""

    options: Options
    folder: Path
    found: Evidence
    checks: list[Checked]
    figures: Figures
    progress: Progress

    @property
    def violations(self) -> int:
        return sum(len(checked.violations) for checked in self.checks)


async def run(options: Options, folder: Path, *, guardian: Guardian, say: Callable[[str], None]) -> Result:
    """Run it; everything that was started has ended when this returns.

    Raises:
        AssertionError: workers do not come up or do not end, or turns do not end.
    """
    found = Evidence()
    async with Stage(folder, guardian=guardian, slots=options.slots, grace=options.grace) as stage:
        edge = Edge([stage.url], found)
        try:
            async with _beside(stage.kubelet.run()):
                stage.kubelet.replicas = options.phases[0].replicas or 1
                await wait_until(lambda: stage.kubelet.ready > 0, description="a worker is ready", limit=UP)
                say(f"the first worker is ready; {options.seconds:g} s of load begin")
                progress = Progress(phase=options.phases[0])
                services = [_watch(stage, progress), _costs(stage), _say(options, stage, found, progress, say)]
                if options.rule is not None:
                    services.append(_autoscale(options.rule, stage, progress))
                async with _beside(*services):
                    await _load(options, stage, edge, found, progress)
                    say(f"the last turn has ended after {progress.now:.1f} s; reading everything")
                await asyncio.wait_for(gather_api(edge, found), UP)
                await _shut_down(options, stage)
            await gather_servers(stage, found)
        finally:
            await edge.close()
    stage.mourn()
    gather_files(stage, found)
    found.save(folder / "evidence.json")
    figures = figures_of(found, stage.kubelet.pods, changes=progress.changes, begun=progress.begun)
    checks = [*check(found), *check_drains(found)]
    if options.rule is None:  # else it depends on the load whether there is anything to move
        checks.append(check_moves(figures.interrupted))
    return Result(options, folder, found, checks, figures, progress)


async def _load(options: Options, stage: Stage, edge: Edge, found: Evidence, progress: Progress) -> None:
    """Visits, phase by phase, and then calm until every turn has ended."""
    visitor = Visitor(edge, found, seed=options.seed)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(
                visits(visitor, seed=options.seed, pace=lambda: progress.phase.pace if progress.phase else None)
            )
            for phase in options.phases:
                progress.phase = phase
                await _last(phase, options, stage, progress)
            progress.phase = None

        async def calm() -> bool:
            return stage.kubelet.settled and await stage.open_turns() == 0

        await wait_until(calm, description="every turn has ended", limit=options.patience)
    finally:
        await visitor.leave()


async def _last(phase: Phase, options: Options, stage: Stage, progress: Progress) -> None:
    if phase.replicas is not None:
        await _scale(stage, phase.replicas, progress)
    if phase.settled:
        stage.kubelet.look()
        await wait_until(
            lambda: stage.kubelet.settled, description="the fleet has its new size", limit=UP + options.grace
        )
    await asyncio.sleep(phase.seconds)


async def _scale(stage: Stage, replicas: int, progress: Progress) -> None:
    if replicas != stage.kubelet.replicas:
        await stage.set_costs()
        progress.changes.append((progress.now, replicas))
        stage.kubelet.replicas = replicas


async def _shut_down(options: Options, stage: Stage) -> None:
    stage.kubelet.replicas = 0
    with suppress(AssertionError):  # who is left is named by ``mourn``
        await wait_until(
            lambda: not stage.kubelet.current and stage.kubelet.settled,
            description="the last workers end",
            limit=options.grace + UP,
        )


async def _autoscale(rule: Rule, stage: Stage, progress: Progress) -> None:
    """For ever: what KEDA asks of Postgres, and what the HorizontalPodAutoscaler makes of the answers."""
    autoscaler, kubelet = Autoscaler(rule), stage.kubelet
    while True:
        values = [float(next(iter((await stage.query(t.query))[0].values()))) for t in rule.triggers]
        wanted = autoscaler.decide(progress.now, current=kubelet.replicas, ready=kubelet.ready, values=values)
        await _scale(stage, wanted, progress)
        await asyncio.sleep(rule.sync)


async def _watch(stage: Stage, progress: Progress) -> None:
    """What an autoscaler could see, for ever."""
    while True:
        progress.series.append(await stage.sample(progress.now))
        await asyncio.sleep(LOOK_EVERY)


async def _costs(stage: Stage) -> None:
    while True:
        await stage.set_costs()
        await asyncio.sleep(COST_EVERY)


async def _say(options: Options, stage: Stage, found: Evidence, progress: Progress, say: Callable[[str], None]) -> None:
    while True:
        now = await stage.sample(progress.now)
        say(
            f"{now.at:5.0f} s  {len(found.asked)} turns accepted, {now.runnable} sessions ready, {now.running} held, "
            f"oldest {now.oldest:.1f} s, {now.wanted} replicas wanted, {now.ready} ready"
        )
        await asyncio.sleep(max(2.0, options.seconds / 20))


@asynccontextmanager
async def _beside(*services: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run services while the block lasts. What they raise ends the block."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(service) for service in services]
        yield
        for task in tasks:
            task.cancel()
