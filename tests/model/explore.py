"""An explicit-state model checker: breadth first, so that the first violation found is a shortest one.

It knows nothing of leases. A model gives an initial state, the transitions from a state, what must hold in each state, and
what counts as the end. States must be hashable. Each is visited once; nothing is sampled, nothing is bounded here.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Step(Generic[S]):
    """One transition. ``fault``: it need not happen; no promise may depend on it."""

    label: str
    state: S
    fault: bool = False


@dataclass(frozen=True, slots=True)
class Model(Generic[S]):
    initial: S
    steps: Callable[[S], Iterable[Step[S]]]
    violated: Callable[[S], str | None]  # the name of what does not hold in a state
    done: Callable[[S], bool]
    dead_end: str  # the name of what is violated where no way leads to a state that is done


@dataclass(frozen=True, slots=True)
class Trace(Generic[S]):
    """How to get from the initial state to a violation."""

    violation: str
    steps: tuple[tuple[str, S], ...]  # (label, the state after it); the first label is empty


@dataclass(frozen=True, slots=True)
class Result(Generic[S]):
    states: int
    transitions: int
    depth: int  # of the deepest state
    seconds: float
    trace: Trace[S] | None  # None: everything holds in every reachable state


class TooManyStates(Exception):
    """The model has grown past what its test can bear."""


def explore(model: Model[S], *, limit: int = 2_000_000) -> Result[S]:
    """Visit every reachable state, or stop at the first in which something is violated.

    Then, backwards from the states that are done and along transitions that are no faults, find whether each state has a
    way to the end. One that has none is a dead end, be it a deadlock or a circle.

    Raises:
        TooManyStates: more than ``limit``.
    """
    with _no_collection():  # it would look through every state again and again, and find nothing
        return _explore(model, limit)


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _explore(model: Model[S], limit: int) -> Result[S]:
    began = time.perf_counter()
    index: dict[S, int] = {model.initial: 0}
    states = [model.initial]
    parents: list[tuple[int, str]] = [(0, "")]
    depths = array("l", [0])
    ways: tuple[array[int], array[int]] = (array("l"), array("l"))  # transitions that are no faults: from, to
    transitions = at = 0
    wrong = model.violated(model.initial)
    while wrong is None and at < len(states):
        for step in model.steps(states[at]):
            transitions += 1
            to = index.setdefault(step.state, len(states))
            if not step.fault:
                ways[0].append(at)
                ways[1].append(to)
            if to == len(states):
                states.append(step.state)
                parents.append((at, step.label))
                depths.append(depths[at] + 1)
                wrong = model.violated(step.state)
                if wrong is not None:
                    at = to
                    break
        else:
            at += 1
        if len(states) > limit:
            raise TooManyStates(f"more than {limit:,} states: give the scope a smaller budget")
    if wrong is None and (stuck := _first_dead_end(states, ways, model.done)) is not None:
        at, wrong = stuck, model.dead_end
    trace = None
    if wrong is not None:
        onward = _onward(model, states[at]) if wrong == model.dead_end else ()
        trace = Trace(wrong, (*_path(at, states, parents), *onward))
    return Result(len(states), transitions, max(depths), time.perf_counter() - began, trace)


def _first_dead_end(states: list[S], ways: tuple[array[int], array[int]], done: Callable[[S], bool]) -> int | None:
    """The state nearest to the initial one from which no way leads to a done one."""
    back: list[list[int]] = [[] for _ in states]
    for source, target in zip(*ways, strict=True):
        back[target].append(source)
    hopeful = bytearray(len(states))
    todo = [number for number, state in enumerate(states) if done(state)]
    for number in todo:
        hopeful[number] = True
    while todo:
        for source in back[todo.pop()]:
            if not hopeful[source]:
                hopeful[source] = True
                todo.append(source)
    stuck = hopeful.find(0)
    return None if stuck < 0 else stuck


def _path(at: int, states: list[S], parents: list[tuple[int, str]]) -> tuple[tuple[str, S], ...]:
    steps = []
    while at:
        parent, label = parents[at]
        steps.append((label, states[at]))
        at = parent
    steps.append(("", states[0]))
    return tuple(reversed(steps))


def _onward(model: Model[S], state: S) -> list[tuple[str, S]]:
    """Where a dead end leads without further faults, for the reader: until nothing new can happen."""
    seen = {state}
    path: list[tuple[str, S]] = []
    while True:
        new = next((step for step in model.steps(state) if not step.fault and step.state not in seen), None)
        if new is None:
            return path
        state = new.state
        seen.add(state)
        path.append((f"then {new.label}", state))
