"""The Celery consumer while Redis hangs: it accepts, and never answers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from longshift import wakeup
from longshift.embedded import Guardian
from longshift.model import new_id
from longshift.testing.waiting import wait_until_sync
from tests.support.fleet_worker import Behaviour, RedisServer, Worker, start_worker
from tests.support.hanging import hanging

LONGER_THAN_ITS_LIMITS = 7.0
"""Seconds; ``fleet.create_app`` has 5 for an answer of Redis."""


@pytest.fixture
def server(tmp_path: Path, guardian: Guardian) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, guardian)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def worker(server: RedisServer, tmp_path: Path, guardian: Guardian) -> Iterator[Worker]:
    worker = start_worker(server.url, tmp_path / "worker", Behaviour(), guardian=guardian)
    worker.wait_for("started")
    yield worker
    worker.process.kill()
    worker.process.wait()


def test_a_consumer_takes_wake_ups_again_after_redis_has_hung_and_after_it_died_hanging(
    server: RedisServer, worker: Worker
) -> None:
    assert server.process is not None
    _ring(server)
    worker.wait_for("wake", 1)
    with hanging(server.process.pid):
        end = time.monotonic() + LONGER_THAN_ITS_LIMITS
        wait_until_sync(lambda: time.monotonic() > end, description="the hang has lasted")
    _ring(server)
    worker.wait_for("wake", 2)

    with hanging(server.process.pid):
        server.kill()
    server.start()
    _ring(server)
    worker.wait_for("wake", 3)
    assert worker.process.poll() is None


def test_a_worker_can_be_stopped_while_redis_hangs(server: RedisServer, worker: Worker) -> None:
    assert server.process is not None
    with hanging(server.process.pid):
        os.kill(worker.process.pid, signal.SIGTERM)
        assert worker.exit_code() == 0


def _ring(server: RedisServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.lpush(wakeup.queue_key("default"), wakeup.encode([new_id()], queue="default"))
