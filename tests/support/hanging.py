"""Servers that hang: they accept and never answer, for as long as a block lasts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def hanging(pid: int | None) -> Iterator[None]:
    """Stop a server and all its children (SIGSTOP); they go on at the end of the block, as after a frozen disk."""
    assert pid is not None, "the server does not run"
    stopped = stop(pid)
    try:
        yield
    finally:
        resume(stopped)


def stop(pid: int) -> list[psutil.Process]:
    """The parent first, so that it makes no more children."""
    parent = psutil.Process(pid)
    parent.send_signal(signal.SIGSTOP)
    stopped = [parent, *parent.children(recursive=True)]
    for process in stopped[1:]:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)
    return stopped


def resume(stopped: list[psutil.Process]) -> None:
    for process in reversed(stopped):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)
