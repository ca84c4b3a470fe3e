"""The hand-made wake-up against Celery itself: same envelope as ``send_task``, accepted by an ordinary worker."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import redis
from celery import Celery

from longshift import wakeup
from longshift.model import new_id
from longshift.testing.waiting import wait_until_sync

KEY = wakeup.queue_key("default")

# What legitimately differs between two messages, or tells where they come from.
OF_THE_MESSAGE = {"id", "root_id", "correlation_id", "delivery_tag", "reply_to", "origin", "argsrepr", "kwargsrepr"}

ORDINARY_WORKER = """
import sys
from celery import Celery
url, key, journal = sys.argv[1:]
app = Celery("ordinary", broker=url)
app.conf.task_default_queue = key

@app.task(name="longshift.wake")
def wake(sessions):
    with open(journal, "a") as out:
        out.write(" ".join(sessions) + "\\n")

app.worker_main(["worker", "--pool=solo", "--loglevel=WARNING", "--without-gossip", "--without-mingle"])
"""


def sent_by_celery(redis_url: str, **kwargs: Any) -> dict[str, Any]:
    app = Celery("ordinary", broker=redis_url, set_as_current=False)
    with app, redis.Redis.from_url(redis_url) as client:
        app.send_task(wakeup.TASK, kwargs=kwargs, queue=KEY, ignore_result=True)
        app.pool.force_close_all()
        return cast("dict[str, Any]", json.loads(cast("bytes", client.rpop(KEY))))


def without_identity(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in OF_THE_MESSAGE}


def body(envelope: dict[str, Any]) -> Any:
    return json.loads(base64.b64decode(envelope["body"]))


def test_a_wake_up_equals_what_celery_sends(redis_url: str) -> None:
    sessions = [new_id(), new_id()]

    ours = json.loads(wakeup.encode(sessions, queue="default"))
    theirs = sent_by_celery(redis_url, sessions=[session.hex for session in sessions])

    assert ours.keys() == theirs.keys()
    assert body(ours) == body(theirs)
    for part in ("headers", "properties"):
        assert ours[part].keys() == theirs[part].keys()
        assert without_identity(ours[part]) == without_identity(theirs[part])
    assert without_identity({**ours, "body": 0, "headers": 0, "properties": 0}) == {
        **theirs,
        "body": 0,
        "headers": 0,
        "properties": 0,
    }


@pytest.mark.slow
def test_an_ordinary_celery_worker_accepts_a_wake_up(redis_url: str, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    sessions = [new_id(), new_id()]
    with redis.Redis.from_url(redis_url) as client:
        client.lpush(KEY, wakeup.encode(sessions, queue="default"))

    worker = subprocess.Popen(
        [sys.executable, "-c", ORDINARY_WORKER, redis_url, KEY, str(journal)], stderr=subprocess.DEVNULL
    )
    try:
        wait_until_sync(lambda: journal.exists() and journal.read_text().endswith("\n"), description="it was consumed")
    finally:
        worker.kill()
        worker.wait()

    assert journal.read_text().split() == [session.hex for session in sessions]
