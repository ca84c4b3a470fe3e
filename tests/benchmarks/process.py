"""A process of a benchmark, with whatever it has started: how it is watched, signalled and killed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(eq=False)
class Process:
    """One worker, or the API; its log is ``log``. It leads a process group, in which its children are, if it has any."""

    process: subprocess.Popen[bytes]
    log: Path
    settings: Mapping[str, object]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def members(self) -> set[int]:
        """The pids of the process and of all that descend from it or share its group."""
        return set() if self.has_ended else {pid for pid, _ in self._family()}

    def owns(self, pid: int) -> bool:
        """Whether ``pid`` is one of ``members``: cheaper to ask of one than to list all."""
        while not self.has_ended and pid > 1 and (stat := _stat(pid)) is not None:
            if self.pid in (pid, int(stat[2])):
                return True
            pid = int(stat[1])
        return False

    def kill(self, member: int) -> None:
        """SIGKILL of one process alone; a parent that watches it learns of it at once."""
        if self.owns(member):
            os.kill(member, signal.SIGKILL)
        if member == self.pid:
            self.process.wait()

    def kill_group(self) -> None:
        """SIGKILL of all at once: nobody is left to report it, as when a machine is lost."""
        self.pause()  # so that none starts another one, or sees the others die
        self._send(signal.SIGKILL)
        self.process.wait()

    def pause(self) -> None:
        """SIGSTOP of all, as when a machine is frozen."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        for pid in self.members():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def cpu(self) -> float:
        """Seconds of processor time so far, all threads: unlike a clock it counts little of what else the machine does."""
        ticks = sum(int(stat[11]) + int(stat[12]) for _, stat in self._family())
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Resident bytes, of /proc."""
        pages = 0
        for pid in self.members():
            with suppress(FileNotFoundError, ProcessLookupError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    def _family(self) -> list[tuple[int, list[str]]]:
        """Each member's pid and the fields of its /proc/PID/stat from the third on."""
        every = dict(_processes())
        found = {pid for pid, stat in every.items() if int(stat[2]) == self.pid}
        while more := {pid for pid, stat in every.items() if int(stat[1]) in found} - found:
            found |= more
        return [(pid, every[pid]) for pid in found]


def _processes() -> Iterator[tuple[int, list[str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None:
            yield int(entry.name), stat


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on: state, parent, group; None if it has ended, reaped or not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if stat[0] in ("Z", "X") else stat
