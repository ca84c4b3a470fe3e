"""A stock Celery app with a task that does nothing: the peer of a no-op turn. As a script it is the worker.

``python -m tests.benchmarks.celery_peer REDIS_URL POOL CONCURRENCY``
"""

from __future__ import annotations

import subprocess
import sys
import time
from types import TracebackType
from typing import Literal, Self

from celery import Celery, Task
from celery.result import ResultSet

from longshift.testing.waiting import wait_until_sync
from tests.benchmarks.stack import GRACE, ROOT, Stack, environment

Pool = Literal["solo", "prefork"]
NAME = "tests.benchmarks.nothing"
CONCURRENCY: dict[Pool, int] = {"solo": 1, "prefork": 2}


def create_app(redis_url: str) -> tuple[Celery, Task]:
    """Celery as it comes: acknowledged early, Redis as broker and for results."""
    app = Celery("peer", broker=redis_url, backend=redis_url, set_as_current=False)

    @app.task(name=NAME)  # type: ignore[untyped-decorator]
    def nothing(number: int, tally: str) -> int:
        with open(tally, "ab", buffering=0) as file:  # noqa: PTH123  # a byte says: done
            file.write(b".")
        return number

    return app, nothing


class Peer:
    """Celery workers, one with each pool, on queues named like their pools."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._url = stack.fresh_redis()
        self._app, self._task = create_app(self._url)
        self._workers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        for pool in CONCURRENCY:
            log = self._stack.folder / f"celery-{pool}.log"
            with log.open("wb") as output:
                worker = subprocess.Popen(
                    [sys.executable, "-m", "tests.benchmarks.celery_peer", self._url, pool],
                    cwd=ROOT,
                    env=environment(),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._stack.guardian.watch(worker.pid, grace=GRACE)
            self._workers.append(worker)
        for pool in CONCURRENCY:
            self.run(pool, 50, results=True)  # now it is up, and warm
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.wait(60)
            self._stack.guardian.forget(worker.pid)
        self._app.close()

    def run(self, pool: Pool, total: int, *, results: bool) -> float:
        """Tasks per second, from the first submission until all are done or, with ``results``, all results are here."""
        tally = self._stack.folder / f"tally-{pool}-{time.monotonic_ns()}"
        tally.touch()
        begun = time.perf_counter()
        sent = [
            self._task.apply_async((number, str(tally)), queue=pool, ignore_result=not results)
            for number in range(total)
        ]
        if results:
            ResultSet(sent, app=self._app).join_native(timeout=300)
        else:
            wait_until_sync(lambda: tally.stat().st_size >= total, description="all tasks are done", limit=300)
        return total / (time.perf_counter() - begun)


def main(redis_url: str, pool: Pool) -> None:
    app, _ = create_app(redis_url)
    app.worker_main(
        ["worker", f"--pool={pool}", f"--concurrency={CONCURRENCY[pool]}", "--loglevel=warning", f"--queues={pool}"]
    )


if __name__ == "__main__":
    url, which, *_ = sys.argv[1:]
    main(url, "solo" if which == "solo" else "prefork")
