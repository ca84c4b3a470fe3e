"""The wake-up: the message "these sessions may have work", as bytes on a Redis list.

A wake-up carries session ids and never state; it may be lost, late or doubled without harm. Workers consume it with
Celery, so it is written as Celery does (task message protocol 2 in kombu's Redis envelope), but by hand: publishing
through Celery costs 0.4 ms of CPU and blocks the event loop, these bytes cost 20 us and leave with any asyncio client.

    longshift.wake.<queue>    list, one per queue; publishers LPUSH, workers BRPOP

    {"body": base64 of [[], {"sessions": ["<32 hex digits>", ...]}, embed],
     "content-type": "application/json", "content-encoding": "utf-8",
     "headers": {"task": "longshift.wake", "id": ..., ...}, "properties": {"delivery_tag": ..., ...}}

The envelope is frozen; a conformance test compares it with what Celery itself would have sent.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from uuid import UUID

from longshift.errors import InvalidInput
from longshift.model import new_id

TASK = "longshift.wake"
"""The name of the Celery task: part of the wire format."""

MAX_SESSIONS = 16
"""Sessions in one message: enough to claim in one statement, few enough that other workers get a share of a burst."""

_KEY_PREFIX = "longshift.wake."
_QUEUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")
_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def queue_key(queue: str) -> str:
    """The Redis list that carries the wake-ups of ``queue``.

    Raises:
        InvalidInput: the name is not 1 to 63 letters, digits, ``_``, ``.`` or ``-``.
    """
    if not _QUEUE.match(queue):
        raise InvalidInput(
            f"{queue!r} is not the name of a queue: use 1 to 63 letters, digits, '_', '.' or '-', "
            "beginning with a letter or a digit"
        )
    return _KEY_PREFIX + queue


def encode(session_ids: Sequence[UUID], *, queue: str) -> bytes:
    """One message for 1 to ``MAX_SESSIONS`` sessions: LPUSH it to ``queue_key(queue)``.

    Raises:
        ValueError: no session, or too many.
        InvalidInput: the queue's name does not fit.
    """
    if not 0 < len(session_ids) <= MAX_SESSIONS:
        raise ValueError(f"a wake-up carries 1 to {MAX_SESSIONS} sessions, not {len(session_ids)}: use encode_all()")
    body = json.dumps([[], {"sessions": [session.hex for session in session_ids]}, _EMBED])
    task_id = str(new_id())
    envelope = {
        "body": base64.b64encode(body.encode()).decode("ascii"),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": _headers(task_id),
        "properties": _properties(task_id, key=queue_key(queue)),
    }
    return json.dumps(envelope).encode()


def encode_all(session_ids: Sequence[UUID], *, queue: str) -> Iterator[bytes]:
    """As many messages as it takes for any number of sessions, for one LPUSH together."""
    for start in range(0, len(session_ids), MAX_SESSIONS):
        yield encode(session_ids[start : start + MAX_SESSIONS], queue=queue)


def decode(kwargs: object) -> list[UUID]:
    """The sessions of a message, from the keyword arguments in its body.

    Raises:
        ValueError: the arguments are not those of a wake-up.
    """
    texts = kwargs.get("sessions") if isinstance(kwargs, Mapping) and len(kwargs) == 1 else None
    if not isinstance(texts, list) or not 0 < len(texts) <= MAX_SESSIONS:
        raise ValueError(f"not the arguments of a wake-up: one list 'sessions' of 1 to {MAX_SESSIONS} ids is expected")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a session id in a wake-up is not text")
    return [UUID(hex=text) for text in texts]


def _headers(task_id: str) -> dict[str, Any]:
    return {
        "lang": "py",
        "task": TASK,
        "id": task_id,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": task_id,
        "parent_id": None,
        "argsrepr": "()",
        "kwargsrepr": "{}",
        "origin": "longshift",
        "ignore_result": True,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    }


def _properties(task_id: str, *, key: str) -> dict[str, Any]:
    return {
        "correlation_id": task_id,
        "reply_to": "",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": key},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": task_id,
    }
