"""For processes that shall not outlive the one that started them: the parent holds the other end of their standard input."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable


def when_gone(function: Callable[[], object]) -> None:
    """Call ``function``, from a thread, when standard input ends: the parent asks for the end, or has died itself."""

    def read() -> None:
        while os.read(sys.stdin.fileno(), 1024):  # not sys.stdin.read(): its lock, held here, would abort the exit
            pass
        function()

    threading.Thread(target=read, name="parent", daemon=True).start()
