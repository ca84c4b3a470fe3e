"""A place of the fleet that one process after another fills, and signals to all of a process."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import psutil

from longshift.testing.fleet import Process


@dataclass
class Slot:
    """A place for one worker or API replica, refilled whenever its process ends."""

    READY: ClassVar[Mapping[str, str]] = {"worker": "worker ready", "api": "the api listens"}
    """What a process says in its log when it serves."""

    kind: str  # "worker" or "api"
    number: int
    process: Process | None = None
    incarnation: int = 0
    killed: bool = False
    child_killed: bool = False  # below its supervisor
    drained_at: float | None = None
    paused: bool = False
    restart_at: float = 0.0
    was_ready: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number}.{self.incarnation}"

    @property
    def supervised(self) -> bool:
        """Some workers are started again by their own supervisor, others by us."""
        return self.kind == "worker" and self.number % 2 == 0

    @property
    def up(self) -> bool:
        return self.process is not None and self.process.alive

    def child(self) -> psutil.Process | None:
        """The worker below a supervisor."""
        for process in tree(self.process.pid) if self.process is not None else []:
            with suppress(psutil.NoSuchProcess):
                if "--supervised" in process.cmdline():
                    return process
        return None

    @property
    def ready(self) -> bool:
        if self.process is not None and not self.was_ready:
            self.was_ready = self.READY[self.kind] in self.process.log()
        return self.up and self.was_ready


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it, parents first."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def signal_all(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    """To those that still are what they were: psutil does not take a later process of the same pid for them."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
