"""The parent of a worker process: starts it again when it dies, and reports how it died.

    SIGTERM, SIGINT            the child's standard input ends, and it drains; the same once more, or SIGQUIT: it gets a
                               SIGQUIT, and ends at once. The supervisor ends when its child has, with its exit code
    the child dies             its death is reported (``longshift.deaths``), and another one is started, after a pause that
                               grows while they keep dying
    the child cannot start     (wrong settings, say) it says so itself; the supervisor ends with its exit code. But once a
                               child has served, it waits for what does not answer
    the supervisor dies        the child's standard input ends, and it drains

A first signal is not passed on as a signal, because the child may have had the same one already: systemd, for one, sends
SIGTERM to every process of a service. Two of them would cut short what the child runs.

It imports and connects to nothing until there is a death to report, so that it costs a few megabytes.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import FrameType
from uuid import UUID

from longshift.clock import SYSTEM, Clock
from longshift.model import new_id

PAUSES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before the child is started again: the first time, the second ..."""
SETTLED = 60.0
"""Seconds that a child must run before its next death counts as the first."""
NO_ANSWER = 4
CANNOT_START = frozenset({2, NO_ANSWER})
"""Exit codes with which a worker says that settings are wrong, or that something does not answer."""
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


@dataclass
class Supervisor:
    """One child after the other. Blocking; on the main thread.

    Attributes:
        command: of the child.
        environment: makes the child's environment from the identity that is given to it.
        report: told the identity and the exit code (negative: the signal) of a child that ended; returns whether the
            child had become a worker (after code 0: whether it had not signed off), None if that cannot be found out.
    """

    command: Sequence[str]
    environment: Callable[[UUID], Mapping[str, str]]
    report: Callable[[UUID, int], bool | None]
    clock: Clock = SYSTEM
    _child: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _asked: list[int] = field(default_factory=list, init=False)
    # not an Event: its lock may be held by the very thread that the signal handler interrupts
    _woken: SimpleQueue[int] = field(default_factory=SimpleQueue, init=False)

    def run(self) -> int:
        """Until a child ends in order, or cannot start; its exit code, 128 + n for a signal n."""
        before = {number: signal.signal(number, self._on_signal) for number in NUMBERS}
        try:
            return self._supervise()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _supervise(self) -> int:
        deaths, served = 0, False
        while True:
            begun = self.clock.monotonic()
            process, code = self._one()
            lived = self.clock.monotonic() - begun
            if self._asked:
                if code != 0:  # one that was told to end at once has not crashed, whatever its exit code
                    self.report(process, code if code < 0 else -signal.SIGTERM)
                return code if code >= 0 else 128 - code
            known = self.report(process, code)
            started = bool(known) if known is not None else code not in CANNOT_START and code != 0
            served = served or started
            if code >= 0 and not started and not (served and code == NO_ANSWER):
                return code
            deaths = 1 if lived > SETTLED else deaths + 1
            if self._pause(PAUSES[min(deaths, len(PAUSES)) - 1]):
                return 0

    def _one(self) -> tuple[UUID, int]:
        """Start a child and wait until it has ended: its identity and its exit code."""
        process = new_id()
        # in a session of its own: a Ctrl-C in the terminal would reach it twice, and the second one ends what runs
        self._child = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, env=dict(self.environment(process)), start_new_session=True
        )
        if self._asked:  # between two children
            self._drain()
        try:
            return process, self._child.wait()
        finally:
            self._drain()

    def _pause(self, seconds: float) -> bool:
        """Whether somebody asked for the end meanwhile."""
        try:
            self._woken.get(timeout=seconds)
        except Empty:
            return bool(self._asked)
        return True

    def _drain(self) -> None:
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        again = number == signal.SIGQUIT or number in self._asked
        quits = again and signal.SIGQUIT not in self._asked
        self._asked += [number, signal.SIGQUIT] if again else [number]
        self._woken.put(number)
        if self._child is None or self._child.returncode is not None:
            return
        if again:
            self._child.send_signal(signal.SIGQUIT if quits else number)
        else:
            self._drain()
