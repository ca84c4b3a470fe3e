"""The stand-in for the kubelet, with real processes and a clock that is turned by hand."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from longshift.embedded import Guardian
from longshift.testing.waiting import wait_until_sync
from tests.rehearsal.kubelet import Container, Kubelet, Pod, first_to_go

OBEDIENT = "import signal; print('up', flush=True); signal.pause()"
DEAF = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\nwhile True: signal.pause()"
)
BROKEN = "raise SystemExit(3)"


@dataclass
class Program:
    """A container that runs some Python."""

    popen: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def exit_code(self) -> int:
        return self.popen.wait(10)


class Node:
    """A kubelet whose pods run ``source``, at a time of our own."""

    def __init__(self, guardian: Guardian) -> None:
        self.now = 100.0
        self.source = OBEDIENT
        self.guardian = guardian
        self.kubelet = Kubelet(self.start, is_ready=lambda _: True, grace=30, clock=lambda: self.now)

    def start(self, _name: str) -> Container:
        popen = subprocess.Popen([sys.executable, "-S", "-c", self.source], stdout=subprocess.PIPE)
        self.guardian.watch(popen.pid)
        assert popen.stdout is not None
        with popen.stdout as out:
            out.readline()  # it handles signals now, or it has ended
        return Program(popen)

    def scale(self, replicas: int) -> list[Pod]:
        """Returns when the number is what it shall be."""
        self.kubelet.replicas = replicas
        self.until(lambda: self.kubelet.settled)
        return self.kubelet.current

    def until(self, holds: Callable[[], bool]) -> None:
        def look() -> bool:
            self.kubelet.look()
            return holds()

        wait_until_sync(look, description="the kubelet has done it")

    def crash(self, pod: Pod) -> None:
        """Its program ends by itself; returns when that was seen."""
        assert isinstance(pod.container, Program)
        pod.container.popen.kill()
        self.until(lambda: pod.container is None)

    def end(self) -> None:
        self.kubelet.kill_all()
        for pod in self.kubelet.pods:
            if isinstance(pod.container, Program):
                self.guardian.forget(pod.container.pid)
                pod.container.popen.wait(10)


@pytest.fixture
def node(guardian: Guardian) -> Iterator[Node]:
    node = Node(guardian)
    yield node
    node.end()


def test_pods_follow_the_replica_count_up_and_down(node: Node) -> None:
    assert len(node.scale(3)) == 3
    assert len(node.scale(1)) == 1

    ended = [pod for pod in node.kubelet.pods if pod.terminating]
    assert [pod.exit_code for pod in ended] == [-signal.SIGTERM] * 2
    assert not any(pod.killed for pod in ended)


def test_a_pod_that_ignores_sigterm_is_killed_when_its_grace_is_over_and_not_before(node: Node) -> None:
    node.source = DEAF
    (pod,) = node.scale(1)
    node.kubelet.replicas = 0
    node.kubelet.look()

    killed = []
    for seconds in (29, 2):
        node.now += seconds
        node.kubelet.look()
        killed.append(pod.killed)
    node.until(lambda: pod.ended is not None)

    assert killed == [False, True]
    assert pod.exit_code == -signal.SIGKILL


def test_the_replacement_of_a_pod_does_not_wait_for_its_end(node: Node) -> None:
    node.source = DEAF
    (first,) = node.scale(1)
    node.kubelet.replicas = 0
    node.kubelet.look()
    node.kubelet.replicas = 1
    node.kubelet.look()

    assert [pod is first for pod in node.kubelet.current] == [False]
    assert first.ended is None


def test_what_ends_by_itself_is_started_again_at_once_and_then_after_longer_and_longer_pauses(node: Node) -> None:
    node.source = BROKEN
    node.kubelet.replicas = 1
    node.kubelet.look()
    (pod,) = node.kubelet.pods
    pauses = []
    for restart in range(1, 9):
        node.until(lambda: pod.restarts == restart)  # noqa: B023 - it is over within the turn of the loop
        pauses.append(pod.start_again - node.now)
        node.now = pod.start_again
        node.kubelet.look()

    assert pauses == [0, 10, 20, 40, 80, 160, 300, 300]
    assert set(pod.crashes) == {3}


def test_one_that_was_well_for_long_is_forgiven(node: Node) -> None:
    (pod,) = node.scale(1)
    for pause in (0.0, 10.0):
        node.crash(pod)
        assert pod.start_again == node.now + pause
        node.now = pod.start_again
        node.kubelet.look()
    node.now += 601
    node.crash(pod)

    assert pod.start_again == node.now


def test_those_go_first_that_are_not_ready_then_the_cheap_ones_then_the_newest() -> None:
    old, new = Pod("old", created=1.0, ready=2.0), Pod("new", created=3.0, ready=4.0)
    busy = Pod("busy", created=5.0, ready=6.0, cost=7)
    starting = Pod("starting", created=0.0, cost=9)

    assert first_to_go([old, busy, new, starting]) == [starting, new, old, busy]
