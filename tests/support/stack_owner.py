"""A process that owns a local stack, for tests that kill it: ``python -m tests.support.stack_owner FOLDER``.

Writes one JSON line with the URLs and pids of everything it started, then waits to be killed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

from longshift.embedded import Guardian, LocalPostgres, LocalRedis

CHILD = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"


def main(folder: Path) -> None:
    guardian = Guardian()
    postgres = LocalPostgres(folder / "postgres", guardian=guardian)
    redis = LocalRedis(folder / "redis", guardian=guardian)
    urls = [postgres.start(), redis.start()]
    worker = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, start_new_session=True, text=True)
    guardian.watch(worker.pid, grace=timedelta(seconds=2))
    assert worker.stdout is not None
    grandchild = int(worker.stdout.readline())
    pids = {
        "guardian": guardian.pid,
        "postgres": postgres.pid,
        "redis": redis.pid,
        "worker": worker.pid,
        "grandchild": grandchild,
    }
    print(json.dumps({"urls": urls, "pids": pids}), flush=True)
    signal.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
