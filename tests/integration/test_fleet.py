"""Wake-ups from Redis to the runtime through real worker processes, and what signals and outages do to them."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from longshift import wakeup
from longshift.embedded import Guardian
from longshift.model import new_id
from longshift.testing.waiting import wait_until_sync as wait_until
from tests.support.fleet_worker import Behaviour, RedisServer, Worker, start_worker

KEY = wakeup.queue_key("default")
SECRET = "v3ry-s3cret"

StartWorker = Callable[..., Worker]


@pytest.fixture
def server(tmp_path: Path, guardian: Guardian) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, guardian)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def start(tmp_path: Path, guardian: Guardian) -> Iterator[StartWorker]:
    workers: list[Worker] = []

    def start_one(url: str, behaviour: Behaviour | None = None) -> Worker:
        folder = tmp_path / f"worker{len(workers)}"
        worker = start_worker(url, folder, behaviour or Behaviour(), guardian=guardian)
        workers.append(worker)
        return worker

    yield start_one
    for worker in workers:
        worker.process.kill()
        worker.process.wait()


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        yield client


def ring(client: redis.Redis, count: int = 1, queue: str = "default") -> list[str]:
    sessions = [new_id() for _ in range(count)]
    client.lpush(wakeup.queue_key(queue), *(wakeup.encode([session], queue=queue) for session in sessions))
    return [session.hex for session in sessions]


def waiting(client: redis.Redis) -> int:
    return client.llen(KEY)


def fails_again(worker: Worker, failures: int) -> bool:
    return worker.output().count("cannot reach Redis") > failures


def changed(**parts: Any) -> bytes:
    """A well-formed message, but for ``parts`` of its envelope."""
    return json.dumps({**json.loads(wakeup.encode([new_id()], queue="default")), **parts}).encode()


def with_header(**headers: Any) -> bytes:
    return changed(headers={**json.loads(changed())["headers"], **headers})


def with_arguments(kwargs: Any) -> bytes:
    return changed(body=base64.b64encode(json.dumps([[], kwargs, {}]).encode()).decode())


MALFORMED = {
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "nesting without end": b"[" * 100_000,
    "no envelope": b"[]",
    "a number": b"1",
    "an empty envelope": b"{}",
    "no properties": changed(properties=None),
    "no body": changed(body=None),
    "a body that is no base64": changed(body="=!"),
    "a body that is no JSON": changed(body=base64.b64encode(b"{").decode()),
    "a body of another shape": changed(body=base64.b64encode(b"{}").decode()),
    "pickle": changed(**{"content-type": "application/x-python-serialize"}),
    "headers that are a list": changed(headers=[1]),
    "compressed by nothing": with_header(compression="zlib"),
    "another task": with_header(task="celery.chain"),
    "an unknown task": with_header(task="nobody.knows"),
    "no task id": with_header(id=None),
    "a time": with_header(eta="2999-01-01T00:00:00+00:00"),
    "no sessions": with_arguments({}),
    "an empty list of sessions": with_arguments({"sessions": []}),
    "too many sessions": with_arguments({"sessions": [new_id().hex] * (wakeup.MAX_SESSIONS + 1)}),
    "a session that is no UUID": with_arguments({"sessions": ["x"]}),
    "a session that is a number": with_arguments({"sessions": [7]}),
    "one argument too many": with_arguments({"sessions": [new_id().hex], "more": 1}),
    "arguments that are a list": with_arguments([1]),
}


def test_a_thousand_wake_ups_made_by_hand_are_each_handled_once(
    server: RedisServer, client: redis.Redis, start: StartWorker
) -> None:
    rung = ring(client, 900) + ring(client, 100, queue="other")

    worker = start(server.url)
    worker.wait_for("wake", 1000)

    assert sorted(worker.woken()) == sorted(rung)
    assert client.keys("*") == []


def test_a_runtime_without_free_slots_leaves_all_other_messages_in_redis(
    server: RedisServer, client: redis.Redis, start: StartWorker
) -> None:
    worker = start(server.url, Behaviour(wake="blocks", concurrency=5))
    ring(client, 30)
    worker.wait_for("wake", 5)

    second = start(server.url)
    second.wait_for("wake", 25)

    assert len(worker.events("wake")) == 5


def test_sigterm_drains_and_ends_an_idle_worker_within_seconds(server: RedisServer, start: StartWorker) -> None:
    worker = start(server.url)
    worker.wait_for("started")

    began = time.monotonic()
    worker.send(signal.SIGTERM)

    assert worker.exit_code() == 0
    assert time.monotonic() - began < 5
    assert [len(worker.events(kind)) for kind in ("drain", "stop")] == [1, 1]


def test_what_is_in_hand_goes_back_to_redis_when_the_drain_begins(
    server: RedisServer, client: redis.Redis, start: StartWorker
) -> None:
    worker = start(server.url, Behaviour(wake="blocks", drain="blocks"))
    rung = ring(client, 10)
    worker.wait_for("wake", 8)

    worker.send(signal.SIGTERM)
    wait_until(lambda: waiting(client) == 10, description="all messages are back while the worker still drains")

    assert worker.process.poll() is None
    second = start(server.url)
    second.wait_for("wake", 10)
    assert sorted(second.woken()) == sorted(rung)


def test_a_draining_worker_takes_no_message_away_from_the_others(
    server: RedisServer, client: redis.Redis, start: StartWorker
) -> None:
    worker = start(server.url, Behaviour(drain="blocks"))
    worker.wait_for("started")
    wait_until(lambda: client.info("clients")["blocked_clients"] == 1, description="the worker waits for messages")

    worker.send(signal.SIGTERM)
    worker.wait_for("drain")
    ring(client)

    wait_until(lambda: len(client.client_list()) == 1, description="the draining worker has left Redis")
    assert waiting(client) == 1
    assert worker.events("wake") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_same_signal_again_cuts_a_drain_short(
    server: RedisServer, start: StartWorker, number: signal.Signals
) -> None:
    worker = start(server.url, Behaviour(drain="blocks"))
    worker.wait_for("started")

    worker.send(number)
    worker.wait_for("drain")
    worker.send(number)

    assert worker.exit_code() == 1
    assert len(worker.events("stop")) == 1


def test_sigquit_ends_a_worker_without_a_drain(server: RedisServer, start: StartWorker) -> None:
    worker = start(server.url, Behaviour(wake="blocks", drain="blocks"))
    worker.wait_for("started")

    worker.send(signal.SIGQUIT)

    assert worker.exit_code() == 1
    assert [len(worker.events(kind)) for kind in ("drain", "stop")] == [0, 1]


def test_ctrl_c_followed_by_the_supervisors_sigterm_is_one_request(server: RedisServer, start: StartWorker) -> None:
    worker = start(server.url, Behaviour(drain="blocks"))
    worker.wait_for("started")

    worker.send(signal.SIGINT)
    worker.wait_for("drain")
    worker.send(signal.SIGTERM)

    with pytest.raises(subprocess.TimeoutExpired):
        worker.process.wait(1.5)
    assert worker.events("stop") == []


def test_a_worker_goes_on_after_redis_was_killed_and_came_back(
    server: RedisServer, client: redis.Redis, start: StartWorker
) -> None:
    worker = start(server.url)
    ring(client)
    worker.wait_for("wake")

    for round_ in (2, 3):
        failures = worker.output().count("cannot reach Redis")
        server.kill()
        wait_until(partial(fails_again, worker, failures), description="the loss was noticed")
        server.start()
        ring(client)
        worker.wait_for("wake", round_)

    worker.send(signal.SIGTERM)
    assert worker.exit_code() == 0


def test_wake_ups_in_hand_while_redis_dies_do_not_hurt_the_worker(
    server: RedisServer, client: redis.Redis, start: StartWorker
) -> None:
    worker = start(server.url, Behaviour(wake="waits"))
    ring(client, 8)
    worker.wait_for("wake", 8)

    server.kill()
    server.start()
    rung = ring(client, 3)
    worker.go()
    wait_until(lambda: set(rung) <= set(worker.woken()), description="the new ones are handled")
    worker.send(signal.SIGTERM)

    assert worker.exit_code() == 0
    assert "EMERGENCY" not in worker.output()


def test_wake_ups_that_cannot_go_back_because_redis_is_away_are_let_go(
    server: RedisServer, client: redis.Redis, start: StartWorker
) -> None:
    worker = start(server.url, Behaviour(wake="blocks"))
    ring(client, 5)
    worker.wait_for("wake", 5)

    server.kill()
    worker.send(signal.SIGTERM)

    assert worker.exit_code() == 0
    assert "EMERGENCY" not in worker.output()


def test_a_worker_that_finds_no_redis_waits_for_it(
    server: RedisServer, client: redis.Redis, start: StartWorker
) -> None:
    server.kill()
    worker = start(server.url)
    wait_until(lambda: worker.output().count("cannot reach Redis") >= 3, description="it tries again and again")

    server.start()
    ring(client)

    worker.wait_for("wake")


def test_a_worker_without_redis_can_be_stopped(server: RedisServer, start: StartWorker) -> None:
    server.kill()
    worker = start(server.url)
    wait_until(lambda: "cannot reach Redis" in worker.output(), description="it tries")

    worker.send(signal.SIGTERM)

    assert worker.exit_code() == 0
    assert len(worker.events("drain")) == 1


def test_a_key_of_the_wrong_type_stops_the_wake_ups_but_not_the_worker(
    server: RedisServer, client: redis.Redis, start: StartWorker
) -> None:
    client.set(KEY, "not a list")
    worker = start(server.url)
    wait_until(lambda: "WRONGTYPE" in worker.output(), description="it was noticed")

    client.delete(KEY)
    ring(client)

    worker.wait_for("wake")


def test_malformed_messages_are_dropped_and_do_no_harm(
    server: RedisServer, client: redis.Redis, start: StartWorker
) -> None:
    client.lpush(KEY, *MALFORMED.values())
    (good,) = ring(client)

    worker = start(server.url)
    worker.wait_for("wake")

    assert worker.woken() == [good]
    assert waiting(client) == 0
    assert worker.output().count("a malformed message was dropped") == len(MALFORMED)
    assert "Traceback" not in worker.output()


def test_more_malformed_messages_than_slots_leave_all_slots_free(
    server: RedisServer, client: redis.Redis, start: StartWorker
) -> None:
    client.lpush(KEY, *([with_arguments({})] * 50))
    ring(client, 20)

    worker = start(server.url, Behaviour(concurrency=3))

    worker.wait_for("wake", 20)


def test_a_wake_up_that_raises_is_logged_once_and_frees_its_slot(
    server: RedisServer, client: redis.Redis, start: StartWorker
) -> None:
    ring(client, 20)

    worker = start(server.url, Behaviour(wake="raises", concurrency=2))
    worker.wait_for("wake", 20)
    worker.send(signal.SIGTERM)

    assert worker.exit_code() == 0
    assert worker.output().count("a wake-up failed") == 20


def test_a_runtime_that_refuses_to_start_ends_the_process_with_one_line(
    server: RedisServer, start: StartWorker
) -> None:
    worker = start(server.url, Behaviour(start="refuses"))

    assert worker.exit_code() == 1
    assert "the worker cannot start: Postgres does not answer at 127.0.0.1:1" in worker.output()
    assert "Traceback" not in worker.output()
    assert len(worker.events("stop")) == 1


def test_a_bug_in_the_start_of_a_runtime_ends_the_process_with_its_traceback(
    server: RedisServer, start: StartWorker
) -> None:
    worker = start(server.url, Behaviour(start="fails"))

    assert worker.exit_code() == 1
    assert worker.output().count("Traceback") == 1


def test_sigterm_during_the_start_of_the_runtime_ends_the_process(server: RedisServer, start: StartWorker) -> None:
    worker = start(server.url, Behaviour(start="hangs"))
    worker.wait_for("start")

    worker.send(signal.SIGTERM)

    assert worker.exit_code() == 0
    assert [len(worker.events(kind)) for kind in ("drain", "stop")] == [0, 1]


@pytest.mark.parametrize(
    ("behaviour", "code", "events"),
    [
        pytest.param(Behaviour(wake="asks_to_stop"), 3, ["drain", "stop"], id="asks for it"),
        pytest.param(Behaviour(wake="exits"), 1, ["stop"], id="lets SystemExit out"),
    ],
)
def test_a_runtime_can_end_its_process(
    server: RedisServer, client: redis.Redis, start: StartWorker, behaviour: Behaviour, code: int, events: list[str]
) -> None:
    worker = start(server.url, behaviour)
    ring(client)

    assert worker.exit_code() == code
    assert all(worker.events(event) for event in events)


def test_a_drain_that_fails_ends_the_process_with_an_error(server: RedisServer, start: StartWorker) -> None:
    worker = start(server.url, Behaviour(drain="raises"))
    worker.wait_for("started")

    worker.send(signal.SIGTERM)

    assert worker.exit_code() == 1
    assert len(worker.events("stop")) == 1


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix socket"])
def test_the_password_of_redis_never_appears_in_the_output(
    tmp_path: Path, guardian: Guardian, start: StartWorker, unix: bool
) -> None:
    server = RedisServer(tmp_path, guardian, password=SECRET, unix=unix)
    server.start()
    try:
        worker = start(server.url)
        with redis.Redis.from_url(server.url) as client:
            ring(client)
        worker.wait_for("wake")
        refused = start(server.url.replace(SECRET, SECRET[::-1]))
        wait_until(lambda: refused.output().count("cannot reach Redis") >= 2, description="it was refused")
        server.kill()
        wait_until(lambda: "cannot reach Redis" in worker.output(), description="the loss was noticed")
        unreachable = start(server.url)
        wait_until(lambda: "cannot reach Redis" in unreachable.output(), description="it was noticed")
    finally:
        server.kill()

    for each in (worker, refused, unreachable):
        each.send(signal.SIGTERM)
        assert each.exit_code() == 0
        assert SECRET not in each.output()
        assert SECRET[::-1] not in each.output()
