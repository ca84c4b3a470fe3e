"""For processes that shall not outlive the one that started them: the parent holds the other end of their standard input."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path


def when_gone(function: Callable[[], object]) -> None:
    """Call ``function``, from a thread, when standard input ends: the parent asks for the end, or has died itself.

    From here on standard input is empty for everybody else: a program that a step starts inherits it, and one that reads it
    to its end would hang on the parent's hand.
    """
    hand = os.dup(sys.stdin.fileno())
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())

    def read() -> None:
        while os.read(hand, 1024):  # not sys.stdin.read(): its lock, held here, would abort the exit
            pass
        function()

    threading.Thread(target=read, name="parent", daemon=True).start()
