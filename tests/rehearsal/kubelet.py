"""A stand-in for the kubelet and the ReplicaSet above it: processes that follow a replica count.

It does to a process what Kubernetes does to the container of a pod, and nothing more:

    too few          start one
    too many         choose one (``first_to_go``), SIGTERM to its first process; after the grace SIGKILL to all of them
    ended by itself  start it again: at once, then after 10 s, 20 s, 40 s ... up to five minutes (CrashLoopBackOff); one that
                     ran for ten minutes begins anew

A pod that was told to end is not counted any more, as in Kubernetes: its replacement does not wait for it.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import psutil

BACK_OFF = 10.0
LONGEST = 300.0
FORGIVEN = 600.0
"""Seconds after which a process that ends by itself is one that had been well."""
LOOK_EVERY = 0.05
COUNT_EVERY = 1.0
"""Seconds between two looks for the processes of a pod, which reads all of /proc."""


class Container(Protocol):
    """The first process of a container."""

    @property
    def pid(self) -> int: ...
    @property
    def alive(self) -> bool: ...
    def exit_code(self) -> int:
        """Of a process that has ended."""


@dataclass(eq=False)
class Pod:
    """One pod. Times are of ``time.monotonic()``."""

    name: str
    created: float
    container: Container | None = None
    started: float = 0.0  # of the container that runs
    ready: float | None = None  # when it was first seen ready
    told: float | None = None  # SIGTERM
    killed: bool = False
    ended: float | None = None  # after it was told to
    exit_code: int | None = None
    restarts: int = 0
    start_again: float = 0.0
    cost: int = 0  # the annotation controller.kubernetes.io/pod-deletion-cost
    pids: set[int] = field(default_factory=set)  # all processes ever seen in it
    counted: float = 0.0  # when they were looked for
    crashes: list[int] = field(default_factory=list)  # exit codes of those that it did not ask to end

    @property
    def terminating(self) -> bool:
        return self.told is not None


def first_to_go(pods: Iterable[Pod]) -> list[Pod]:
    """In the order in which a ReplicaSet deletes its pods: not ready ones, cheap ones, those that became ready last.

    Kubernetes looks at more: whether a pod has a node, how many of the set share its node, restarts. Here there is one node.
    """

    def rank(pod: Pod) -> tuple[bool, int, float, float]:
        return pod.ready is not None, pod.cost, -(pod.ready or 0.0), -pod.created

    return sorted(pods, key=rank)


class Kubelet:
    """Set ``replicas`` and let ``run`` run; ``pods`` are all that ever were."""

    def __init__(
        self,
        start: Callable[[str], Container],
        *,
        is_ready: Callable[[Container], bool],
        grace: float,
        back_off: float = BACK_OFF,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``grace``: ``terminationGracePeriodSeconds``; ``back_off``: the first pause of CrashLoopBackOff."""
        self._start, self._is_ready, self._clock = start, is_ready, clock
        self._grace, self._back_off = grace, back_off
        self.replicas = 0
        self.pods: list[Pod] = []

    @property
    def current(self) -> list[Pod]:
        """Those that count as replicas."""
        return [pod for pod in self.pods if not pod.terminating]

    @property
    def ready(self) -> int:
        return sum(pod.ready is not None for pod in self.current)

    @property
    def settled(self) -> bool:
        """Whether there are as many ready pods as there shall be, and none that was told to end."""
        ending = any(pod.terminating and pod.ended is None for pod in self.pods)
        return self.ready == len(self.current) == self.replicas and not ending

    async def run(self) -> None:
        """For ever."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_EVERY)

    def look(self) -> None:
        """One pass."""
        for pod in self.pods:
            if pod.ended is None:
                self._look_after(pod)
        current = self.current
        for _ in range(self.replicas - len(current)):
            self._create()
        for pod in first_to_go(current)[: max(0, len(current) - self.replicas)]:
            self._delete(pod)

    def kill_all(self) -> None:
        """The node is switched off."""
        for pod in self.pods:
            _signal(_processes(pod), signal.SIGKILL)

    def _create(self) -> None:
        pod = Pod(f"pod-{len(self.pods) + 1}", created=self._clock())
        self.pods.append(pod)
        self._run(pod)

    def _run(self, pod: Pod) -> None:
        pod.container, pod.started, pod.ready = self._start(pod.name), self._clock(), None

    def _delete(self, pod: Pod) -> None:
        pod.told = self._clock()
        if pod.container is None:  # between two starts
            pod.ended = pod.told
        elif pod.container.alive:
            _signal(_processes(pod)[:1], signal.SIGTERM)

    def _look_after(self, pod: Pod) -> None:
        now = self._clock()
        if pod.container is None:
            if now >= pod.start_again:
                self._run(pod)
        elif not pod.container.alive:
            self._ended(pod, pod.container, now)
        else:
            if pod.ready is None and not pod.terminating and self._is_ready(pod.container):
                pod.ready, pod.counted = now, 0.0
            if now > pod.counted + COUNT_EVERY:
                pod.pids |= {process.pid for process in _processes(pod)}
                pod.counted = now
            if pod.told is not None and now > pod.told + self._grace and not pod.killed:
                pod.killed = True
                _signal(_processes(pod), signal.SIGKILL)

    def _ended(self, pod: Pod, container: Container, now: float) -> None:
        code = container.exit_code()
        if pod.terminating:
            pod.ended, pod.exit_code = now, code
            return
        pod.crashes.append(code)
        pod.container = pod.ready = None
        pod.restarts = 1 if now - pod.started > FORGIVEN else pod.restarts + 1
        pause = 0.0 if pod.restarts == 1 else self._back_off * 2 ** (pod.restarts - 2)
        pod.start_again = now + min(LONGEST, pause)


def _processes(pod: Pod) -> list[psutil.Process]:
    """Those of its container, the first one first."""
    if pod.container is None or not pod.container.alive:
        return []
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pod.container.pid)
        return [first, *first.children(recursive=True)]
    return []


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def pod_of(pods: Iterable[Pod]) -> dict[int, Pod]:
    """By the id of a process."""
    return dict(_owned(pods))


def _owned(pods: Iterable[Pod]) -> Iterator[tuple[int, Pod]]:
    for pod in pods:
        for pid in pod.pids:
            yield pid, pod
