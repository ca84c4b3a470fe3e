"""A process whose standard input is its parent's hand."""

from __future__ import annotations

import subprocess
import sys

CHILD = """
import subprocess, threading
from longshift import parent
gone = threading.Event()
parent.when_gone(gone.set)
subprocess.run(["cat"], check=True)  # what a step starts; it reads its standard input to the end
print("the step is over", flush=True)
gone.wait()
"""


def test_what_a_step_starts_finds_the_end_of_its_input_and_the_parent_is_watched_all_the_same() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"the step is over\n"
            assert child.poll() is None
            child.stdin.close()
            assert child.wait(10) == 0
        finally:
            child.kill()
