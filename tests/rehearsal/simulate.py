"""The autoscaler's rule over demand that was recorded or made up, with a model of the fleet.

The rule is the one of ``rule.py``; its queries are those of the ScaledObject, and Postgres runs them, over a temporary table that
has the name and the columns of the view ``backlog``. What is modelled is the fleet:

* a pod needs ``start_up`` seconds until it claims; it has a number of slots and takes the oldest ready work first
* work takes its time whatever runs beside it: processors, Postgres and Redis have room. What does not fit into the slots waits
* a pod that is told to end takes nothing more. Each turn on it goes on until its running step ends, which is up to ``step``
  seconds later, and then stands at the end of the queue; the pod is gone with the last of them
* those go first that run least (pod deletion cost)
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import psycopg

from tests.rehearsal.demand import Demand
from tests.rehearsal.rule import Autoscaler, Rule, Trigger

LOOK_EVERY = 1.0
COLUMNS = "queue text, runnable bigint, running bigint, oldest_seconds float8, slots bigint, workers bigint"


@dataclass(frozen=True, slots=True)
class Model:
    """What a fleet is like; seconds."""

    slots: int = 100
    start_up: float = 20.0  # scheduled, image there, process ready
    step: float = 10.0  # the longest that a turn goes on after SIGTERM


@dataclass(eq=False, slots=True)
class Pod:
    born: float
    ready: bool = False
    told: bool = False
    held: dict[int, tuple[float, float]] = field(default_factory=dict)  # by number: (due, when it is done)


@dataclass(frozen=True, slots=True)
class Moment:
    at: float
    runnable: int
    running: int
    oldest: float
    wanted: int
    ready: int
    paid: int  # pods that exist, whatever they do


@dataclass(slots=True)
class Outcome:
    """What became of a demand."""

    demand: Demand
    model: Model
    series: list[Moment] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # of each segment, until it first held a slot
    interrupted: int = 0
    changes: list[tuple[float, int]] = field(default_factory=list)


class Views:
    """Answers to the triggers' queries, from Postgres."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        connection.execute(f"CREATE TEMPORARY TABLE backlog ({COLUMNS})".encode())  # found before any view of that name

    def answer(self, triggers: Sequence[Trigger], row: Sequence[object]) -> list[float]:
        self._connection.execute("TRUNCATE backlog")
        self._connection.execute("INSERT INTO backlog VALUES ('default', %s, %s, %s, %s, %s)", row)
        return [float(self._connection.execute(t.query.encode()).fetchall()[0][0]) for t in triggers]


@contextmanager
def views(url: str) -> Iterator[Views]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield Views(connection)


class Simulation:
    """One demand, one rule; ``run`` gives what became of it."""

    def __init__(
        self,
        demand: Demand,
        model: Model,
        views: Views,
        *,
        rule: Rule | None = None,
        script: Sequence[tuple[float, int]] = (),
    ) -> None:
        """``rule`` decides, or ``script``: (when, how many), beginning with 1."""
        self._demand, self._model, self._views, self._rule = demand, model, views, rule
        self._random = Random(demand.name)
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, str, Any]] = []
        self._queue: deque[tuple[float, float, bool]] = deque()  # (ready since, seconds left, whether it ran before)
        self._pods: list[Pod] = []
        self._wanted = rule.least if rule is not None else 1
        self._autoscaler = Autoscaler(rule) if rule is not None else None
        self.outcome = Outcome(demand, model)
        for segment in demand.segments:
            self._at(segment.due, "due", segment)
        for at, replicas in script:
            self._at(at, "script", replicas)

    def run(self) -> Outcome:
        self._pods = [Pod(0.0, ready=True) for _ in range(self._wanted)]
        self._at(0.0, "look", None)
        if self._rule is not None:
            self._at(self._random.uniform(0, self._rule.sync), "sync", None)
        while self._events:
            at, _, what, about = heapq.heappop(self._events)
            if at > self._demand.seconds:
                break
            getattr(self, f"_{what}")(at, about)
            self._dispatch(at)
        return self.outcome

    def _at(self, at: float, what: str, about: object) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), what, about))

    # -- events

    def _due(self, at: float, segment: Any) -> None:
        self._queue.append((at, segment.busy, False))

    def _done(self, at: float, about: Any) -> None:
        pod, number = about
        if number in pod.held:
            del pod.held[number]

    def _up(self, at: float, pod: Pod) -> None:
        pod.ready = not pod.told

    def _left(self, at: float, about: Any) -> None:
        """The running step of a turn on a drained pod has ended."""
        pod, number = about
        if number in pod.held:
            _, end = pod.held.pop(number)
            self._queue.append((at, end - at, True))
            self.outcome.interrupted += 1

    def _script(self, at: float, replicas: int) -> None:
        self._scale(at, replicas)

    def _sync(self, at: float, _: object) -> None:
        assert self._autoscaler is not None
        now = self._moment(at)
        row = (now.runnable, now.running, now.oldest, self._model.slots * now.ready, now.ready)
        values = self._views.answer(self._autoscaler.rule.triggers, row)
        self._scale(at, self._autoscaler.decide(at, current=self._wanted, ready=now.ready, values=values))
        self._at(at + self._autoscaler.rule.sync, "sync", None)

    def _look(self, at: float, _: object) -> None:
        self.outcome.series.append(self._moment(at))
        self._at(at + LOOK_EVERY, "look", None)

    # -- the fleet

    def _moment(self, at: float) -> Moment:
        self._pods = [pod for pod in self._pods if pod.held or not pod.told]
        current = [pod for pod in self._pods if not pod.told]
        return Moment(
            at=at,
            runnable=len(self._queue),
            running=sum(len(pod.held) for pod in self._pods),
            oldest=at - self._queue[0][0] if self._queue else 0.0,
            wanted=self._wanted,
            ready=sum(pod.ready for pod in current),
            paid=len(self._pods),
        )

    def _scale(self, at: float, replicas: int) -> None:
        if replicas != self._wanted:
            self.outcome.changes.append((round(at, 1), replicas))
        self._wanted = replicas
        current = [pod for pod in self._pods if not pod.told]
        for _ in range(replicas - len(current)):
            self._pods.append(pod := Pod(at))
            self._at(at + self._model.start_up, "up", pod)
        for pod in sorted(current, key=lambda p: (p.ready, len(p.held), -p.born))[: max(0, len(current) - replicas)]:
            pod.told, pod.ready = True, False
            for number in pod.held:
                self._at(at + self._random.uniform(0, self._model.step), "left", (pod, number))

    def _dispatch(self, at: float) -> None:
        if not self._queue:
            return
        free = [pod for pod in self._pods if pod.ready and len(pod.held) < self._model.slots]
        while self._queue and free:
            pod = self._random.choice(free)
            since, busy, again = self._queue.popleft()
            number = next(self._numbers)
            pod.held[number] = (since, at + busy)
            self._at(at + busy, "done", (pod, number))
            if not again:
                self.outcome.waits.append(at - since)
            if len(pod.held) >= self._model.slots:
                free.remove(pod)


def needed(demand: Demand, slots: int, *, most: int) -> list[int]:
    """For each second: pods that would hold all that an endless fleet would hold then; not more than ``most``."""
    changes = [0] * (int(demand.seconds) + 2)
    for segment in demand.segments:
        begin, end = (min(len(changes) - 1, int(at)) for at in (segment.due, segment.due + segment.busy + 1))
        changes[begin] += 1
        changes[end] -= 1
    return [min(most, max(1, math.ceil(busy / slots))) for busy in itertools.accumulate(changes)]
