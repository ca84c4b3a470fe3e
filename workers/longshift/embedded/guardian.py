"""The guardian: a small process that stops what its owner started, when the owner dies.

It runs as a script on the bare standard library (``python -I -S guardian.py``): it is up in milliseconds, holds a few
megabytes and cannot be broken by what the package imports. The owner holds the other end of its standard input and
writes one JSON object a line::

    {"watch": 4711, "born": "...", "signal": 15, "grace": 10.0, "last": false}
    {"forget": 4711}

End of input means that the owner is gone, however it went. Then every child still watched gets its signal, and SIGKILL
when its grace (seconds) is over: first those that are not ``last``, then the ``last`` ones, which are the servers that
the others use. A child that leads a process group takes its group with it.

Two gaps remain: a child whose owner dies in the moment between starting and announcing it, and the guardian itself
being killed together with its owner. For the servers the next start on the same folder stops the left-over.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POLL = 0.02  # seconds


@dataclass(frozen=True)
class Watched:
    pid: int
    born: str
    stop_signal: int
    grace: float  # seconds between the signal and SIGKILL
    last: bool
    leads_group: bool

    def alive(self) -> bool:
        return born(self.pid) == self.born

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            if self.alive():
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        if self.leads_group:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


def born(pid: int) -> str | None:
    """What tells this process from a later one of the same pid; None if it has ended, reaped or not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self/stat").exists() else _born_by_ps(pid)
    state, *fields = stat.rpartition(")")[2].split()
    if state in ("Z", "X"):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}:{fields[18]}"  # the 22nd field of proc(5): start time in ticks since boot


def _born_by_ps(pid: int) -> str | None:
    command = ["ps", "-o", "state=,lstart=", "-p", str(pid)]
    state, _, start = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else start.strip()


def command_line(pid: int) -> str:
    """The arguments of a process, joined by spaces; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return ""
        command = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() + " "


def stop_all(children: Iterable[Watched]) -> None:
    """Signal all of them at once, wait until each is gone or its grace is over, and kill the rest."""
    children = list(children)
    for child in children:
        child.send(child.stop_signal)
    begin = time.monotonic()
    waiting = children
    while waiting:
        waiting = [c for c in waiting if c.alive() and time.monotonic() - begin < c.grace]
        time.sleep(POLL)
    for child in children:
        child.kill()


def _watched(order: dict[str, object]) -> Watched | None:
    pid = int(str(order["watch"]))
    try:
        leads_group = os.getpgid(pid) == pid
    except ProcessLookupError:
        return None
    number, grace = int(str(order["signal"])), float(str(order["grace"]))
    return Watched(pid, str(order["born"]), number, grace, bool(order["last"]), leads_group)


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # the owner decides when it is over, not a signal to all of a terminal
    children: dict[int, Watched] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "forget" in order:
            children.pop(order["forget"], None)
        elif child := _watched(order):
            children[child.pid] = child
    stop_all(c for c in children.values() if not c.last)
    stop_all(c for c in children.values() if c.last)


if __name__ == "__main__":
    main()
