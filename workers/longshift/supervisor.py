"""The parent of a worker process: starts it again when it dies, and reports how it died.

    SIGTERM, SIGINT, SIGQUIT   are passed on; the supervisor ends when its child has, with its exit code
    the child dies             its death is reported (``longshift.deaths``), and another one is started, after a pause that
                               grows while they keep dying
    the child cannot start     (wrong settings, say) it says so itself; the supervisor ends with its exit code, unless an
                               earlier child could: then the settings are right, and what does not answer will again
    the supervisor dies        the child's standard input ends, and it drains

It imports and connects to nothing until there is a death to report, so that it costs a few megabytes.
"""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from uuid import UUID

from longshift.clock import SYSTEM, Clock
from longshift.model import new_id

PAUSES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before the child is started again: the first time, the second ..."""
SETTLED = 60.0
"""Seconds that a child must run before its next death counts as the first."""
CANNOT_START = frozenset({2, 4})
"""Exit codes with which a worker says that settings are wrong, or that something does not answer."""
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


@dataclass
class Supervisor:
    """One child after the other. Blocking; on the main thread.

    Attributes:
        command: of the child.
        environment: makes the child's environment from the identity that is given to it.
        report: told the identity and the exit code (negative: the signal) of a child that died; returns whether the
            child had become a worker, None if that cannot be found out.
    """

    command: Sequence[str]
    environment: Callable[[UUID], Mapping[str, str]]
    report: Callable[[UUID, int], bool | None]
    clock: Clock = SYSTEM
    _child: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _asked: threading.Event = field(default_factory=threading.Event, init=False)

    def run(self) -> int:
        """Until a child ends in order, or cannot start; its exit code, 128 + n for a signal n."""
        before = {number: signal.signal(number, self._pass_on) for number in NUMBERS}
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
            started = code == 0 or self.report(process, code)
            if started is None:
                started = code not in CANNOT_START
            served = served or started
            if self._asked.is_set() and -code in NUMBERS:
                return 0  # it was told to end before it could listen: nothing had begun
            if self._asked.is_set() or code == 0 or (code > 0 and not served):
                return code if code >= 0 else 128 - code
            deaths = 1 if lived > SETTLED else deaths + 1
            if self._asked.wait(PAUSES[min(deaths, len(PAUSES)) - 1]):
                return 0

    def _one(self) -> tuple[UUID, int]:
        """Start a child and wait until it has ended: its identity and its exit code."""
        process = new_id()
        # in a session of its own: a Ctrl-C in the terminal would reach it twice, and the second one ends what runs
        self._child = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, env=dict(self.environment(process)), start_new_session=True
        )
        if self._asked.is_set():  # between two children
            self._child.send_signal(signal.SIGTERM)
        try:
            return process, self._child.wait()
        finally:
            assert self._child.stdin is not None
            self._child.stdin.close()

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self._asked.set()
        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(number)
