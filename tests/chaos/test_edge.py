"""How clients ask: again after a lost answer, with the same key; and what they write down as no answer of the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from tests.chaos.edge import Edge, GaveUpError, RefusedError, TooLateError
from tests.chaos.evidence import Evidence

TURN = {"id": "turn_1", "status": "queued", "output": None}
BUSY = httpx.Response(
    503, json={"code": "unavailable", "retryable": True}, headers={"Content-Type": "application/problem+json"}
)
Answer = httpx.Response | Exception
Ask = Callable[..., Edge]


@pytest.fixture
async def ask() -> AsyncIterator[Ask]:
    """Makes an edge whose replicas give these answers, one after another; ``keys`` are what they were sent."""
    edges: list[Edge] = []

    def make(*answers: Answer, keys: list[str] | None = None) -> Edge:
        rest = list(answers)

        def answer(request: httpx.Request) -> httpx.Response:
            if keys is not None:
                keys.append(request.headers.get("idempotency-key", ""))
            given = rest.pop(0)
            if isinstance(given, Exception):
                raise given
            return given

        edge = Edge(["http://one", "http://two"], Evidence())
        edge._http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        edges.append(edge)
        return edge

    yield make
    for edge in edges:
        await edge.close()


async def test_a_lost_connection_and_a_503_mean_again_with_the_same_key(ask: Ask) -> None:
    keys: list[str] = []
    edge = ask(httpx.ConnectError("gone"), BUSY, httpx.Response(202, json=TURN), keys=keys)
    assert await edge.submit("/v1/turns", {}, key="k", twice=False) == TURN
    assert keys == ["k", "k", "k"]
    assert edge.found.by_key == {"k": ["turn_1"]}
    assert edge.found.bad_answers == []


async def test_a_500_and_a_503_that_is_no_problem_are_written_down_and_asked_again(ask: Ask) -> None:
    edge = ask(httpx.Response(500, json={}), httpx.Response(503, text="busy"), httpx.Response(200, json=TURN))
    assert await edge.get("/v1/turns/turn_1") == TURN
    assert len(edge.found.bad_answers) == 2


async def test_a_refusal_is_written_down_but_for_a_deadline_that_has_passed_meanwhile(ask: Ask) -> None:
    refusing = ask(httpx.Response(422, json={"detail": "agent: unknown"}))
    with pytest.raises(RefusedError):
        await refusing.submit("/v1/turns", {}, key="k", twice=False)
    assert len(refusing.found.bad_answers) == 1
    late = ask(httpx.Response(422, json={"detail": "deadline: is in the past"}))
    with pytest.raises(TooLateError):
        await late.submit("/v1/turns", {}, key="k", twice=False)
    assert late.found.bad_answers == []


async def test_both_answers_to_what_was_sent_twice_count(ask: Ask) -> None:
    edge = ask(httpx.Response(202, json=TURN), httpx.Response(202, json={**TURN, "id": "turn_2"}))
    await edge.submit("/v1/turns", {}, key="k", twice=True)
    assert edge.found.by_key == {"k": ["turn_1", "turn_2"]}


async def test_nobody_asks_after_the_end(ask: Ask) -> None:
    edge = ask()
    edge.over.set()
    with pytest.raises(GaveUpError, match=r"GET /v1/turns"):
        await edge.get("/v1/turns")
