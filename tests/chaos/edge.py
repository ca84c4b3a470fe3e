"""How clients ask: any replica will do, a lost connection or a 503 means "again, with the same idempotency key".

Whatever an API may not answer is written down here: a 500, an error that is no ``application/problem+json``, a refusal of
what was right.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from longshift.model import Json
from tests.chaos.evidence import Evidence
from tests.support.fleet import KEY

PAUSE = 0.3
TIMEOUT = 20.0
PROBLEM = "application/problem+json"
TOO_LATE = "deadline: is in the past"


class GaveUpError(Exception):
    """The run is over, and the request was never answered as it should."""


class RefusedError(Exception):
    """The API does not want what is right; the answer is among the bad ones."""


class TooLateError(Exception):
    """The deadline of a request passed while nobody answered: no fault of anybody's."""


@dataclass
class Edge:
    """All API replicas, as one client sees them. ``urls`` changes as they come and go."""

    urls: list[str]
    found: Evidence
    over: asyncio.Event = field(default_factory=asyncio.Event)  # nobody asks again after this
    statuses: Counter[str] = field(default_factory=Counter)  # answers by status, failures by name
    _random: Random = field(default_factory=Random)  # which replica: no part of what the seed decides

    def __post_init__(self) -> None:
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=TIMEOUT,
            limits=httpx.Limits(max_connections=200),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def ask(
        self, method: str, path: str, *, key: str | None = None, kind: str | None = None, **more: Any
    ) -> httpx.Response:
        """The answer, as soon as there is one that is not "try again".

        Raises:
            GaveUpError: the run was over before.
        """
        given = {"Idempotency-Key": key, "Content-Type": kind}
        headers = {name: value for name, value in given.items() if value}
        last = "nothing"
        while not self.over.is_set():
            url = self._random.choice(self.urls)
            try:
                answer = await self._http.request(method, url + path, headers=headers, **more)
            except httpx.TransportError as error:
                last = type(error).__name__
                self.statuses[last] += 1
            else:
                last = str(answer.status_code)
                self._look_at(answer, f"{method} {path}")
                if answer.status_code < 500:
                    return answer
            await asyncio.sleep(PAUSE * self._random.uniform(0.3, 1.0))
        raise GaveUpError(f"{method} {path}: {last}")

    async def get(self, path: str, **params: object) -> Json:
        return (await self.ask("GET", path, params=params)).json()

    async def submit(self, path: str, body: Json, *, key: str, twice: bool) -> Json:
        """POST until it is accepted; ``twice``: as an impatient client does, to whichever replica, at the same time.

        Raises:
            RefusedError: it was not accepted, and never will be.
            TooLateError: nobody took it before its deadline had passed.
        """
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/jsonl" if isinstance(body, bytes) else "application/json"

        async def send() -> httpx.Response:
            return await self.ask("POST", path, key=key, kind=kind, content=content)

        answers = await asyncio.gather(*(send() for _ in range(2 if twice else 1)))
        accepted = [answer.json() for answer in answers if answer.status_code == 202]
        self.found.by_key.setdefault(key, []).extend(each["id"] for each in accepted)
        if accepted:
            return accepted[0]
        if all(TOO_LATE in answer.text for answer in answers):
            raise TooLateError(key)
        raise RefusedError(f"POST {path} ({key}) was refused")

    @asynccontextmanager
    async def stream(self, path: str, *, after: int) -> AsyncIterator[httpx.Response]:
        """Server-sent events after ``after``. Raises ``httpx.TransportError`` like any broken connection."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        url = self._random.choice(self.urls)
        async with self._http.stream("GET", url + path, headers=headers, timeout=httpx.Timeout(TIMEOUT)) as response:
            if not response.is_success:
                await response.aread()
                self._look_at(response, f"GET {path} (stream)")
            yield response

    def _look_at(self, answer: httpx.Response, what: str) -> None:
        self.found.answers += 1
        self.statuses[str(answer.status_code)] += 1
        if answer.is_success or (answer.status_code == 422 and TOO_LATE in answer.text):
            return
        media = answer.headers.get("content-type", "").partition(";")[0]
        if answer.status_code != 503:
            self.found.bad_answers.append(f"{what}: {answer.status_code} {answer.text[:300]}")
        elif media != PROBLEM or answer.json().get("retryable") is not True:
            self.found.bad_answers.append(f"{what}: a 503 of type {media!r}: {answer.text[:300]}")
