"""What the edge refuses, and how: a clear problem, nothing half-accepted, never a 500, nothing of the inside."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from dataclasses import replace
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from longshift.db import keys, leases
from longshift.db.keys import Scope
from longshift.testing.waiting import wait_until
from longshift_api.auth import REMEMBERED
from longshift_api.schemas import Problem
from tests.support.api import ECHO, KEY, Api, Hand

HELLO = {"agent": "echo", "input": {"text": "hello"}}
JSON = {"Content-Type": "application/json"}
NOBODY = "0" * 32
PREFIXES = {
    "session_id": "ses",
    "turn_id": "turn",
    "batch_id": "bat",
    "artifact_id": "art",
    "call_id": "call",
    "approval_id": "apr",
}


def checked(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    problem: dict[str, Any] = answer.json()
    Problem.model_validate(problem, extra="forbid")
    assert (problem["status"], problem["code"]) == (status, code)
    assert answer.headers["request-id"]
    return problem


@pytest.mark.parametrize(
    ("body", "path", "message"),
    [
        ({"input": {"text": "x"}}, "agent", "Field required"),
        ({"agent": "echo"}, "input", "Field required"),
        ({"agent": "nobody", "input": {}}, "agent", "start a worker that has it (known are echo)"),
        (HELLO | {"agent_version": "9"}, "agent", "no worker has registered version '9'"),
        (HELLO | {"input": {"text": 1}}, "input.text", "is not of type 'string'"),
        (HELLO | {"input": {"text": "x", "times": 0}}, "input.times", "less than the minimum"),
        (HELLO | {"input": "x" * 10_000}, "input", "is not of type 'object'"),
        (HELLO | {"priority": 1}, "priority", "Extra inputs are not permitted"),
        (HELLO | {"on_busy": "shrug"}, "on_busy", "'enqueue', 'reject' or 'replace'"),
        (HELLO | {"deadline": "2001-01-01T00:00:00Z"}, "deadline", "is in the past"),
        (HELLO | {"deadline": "soon"}, "deadline", "valid datetime"),
        (HELLO | {"run_after": "2030-01-01T00:00:00"}, "run_after", "timezone"),
        (
            HELLO | {"run_after": "2130-01-01T00:00:00Z", "deadline": "2129-01-01T00:00:00Z"},
            "deadline",
            "not after run_after",
        ),
        (HELLO | {"run_after": "9999-12-31T23:59:59Z"}, "run_after", "years away"),
        (HELLO | {"run_after": "0001-01-01T00:00:00+14:00"}, "run_after", "years away"),
        (HELLO | {"deadline": "9999-12-31T23:59:59-12:00"}, "deadline", "years away"),
        (HELLO | {"metadata": {str(n): "" for n in range(17)}}, "metadata", "at most 16"),
        (HELLO | {"metadata": {"a": "x" * 513}}, "metadata.a", "at most 512"),
        (HELLO | {"metadata": {"a": 1}}, "metadata.a", "valid string"),
        ([HELLO], "", "must be a JSON object"),
    ],
)
async def test_a_turn_that_does_not_fit_is_refused_with_the_place_and_the_reason(
    api: Api, body: object, path: str, message: str
) -> None:
    answer = await api.client.post("/v1/turns", json=body)

    problem = checked(answer, 422, "unknown_agent" if path == "agent" and "agent" in body else "invalid_input")  # type: ignore[operator]
    assert problem["errors"][0]["path"] == path
    assert message in problem["errors"][0]["message"]
    assert len(problem["errors"][0]["message"]) < 400
    assert (await api.db.fetch(text("SELECT count(*) AS n FROM sessions")))[0].n == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        (b'{"agent": "echo", "input": NaN}', "NaN is not JSON"),
        (b'{"agent": "echo", "input": -Infinity}', "-Infinity is not JSON"),
        (b'{"agent": "echo", "input": 1e999}', "out of range"),
        (b'{"agent": "echo", "input": ' + b"9" * 5000 + b"}", "not usable JSON"),
        (b'{"agent": "echo", "input": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
        (b'{"agent": "echo", "input": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
        (b'\xff{"agent": "echo"}', "not UTF-8"),
    ],
)
async def test_what_is_not_json_is_refused_in_words(api: Api, body: bytes, message: str) -> None:
    answer = await api.client.post("/v1/turns", content=body, headers=JSON)

    assert message in checked(answer, 422, "invalid_input")["detail"]


async def test_text_that_postgres_cannot_store_is_replaced_everywhere(api: Api) -> None:
    body = json.dumps(HELLO | {"input": {"text": "a\0b\ud800c"}, "metadata": {"k\0": "v\udfff"}})

    answer = await api.client.post("/v1/turns", content=body, headers=JSON)

    assert answer.status_code == 202, answer.text
    assert answer.json()["input"] == {"text": "a\u2400b\ufffdc"}
    assert answer.json()["metadata"] == {"k\u2400": "v\ufffd"}


async def test_a_body_that_is_too_large_is_refused_before_it_is_read(small_api: Api) -> None:
    body = json.dumps(HELLO | {"input": {"text": "x" * 10_000}}).encode()

    async def chunks() -> Any:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    checked(await small_api.client.post("/v1/turns", content=body, headers=JSON), 413, "too_large")
    checked(await small_api.client.post("/v1/turns", content=chunks(), headers=JSON), 413, "too_large")


async def test_another_content_type_than_json_is_415(api: Api) -> None:
    form = await api.client.post("/v1/turns", data={"agent": "echo"})

    assert "application/json" in checked(form, 415, "unsupported_media_type")["detail"]


@pytest.mark.parametrize("path", ["/v1/turns", "/v1/batches", "/v1/artifacts"])
async def test_a_compressed_body_is_415(api: Api, path: str) -> None:
    answer = await api.client.post(path, content=gzip.compress(b"{}"), headers=JSON | {"Content-Encoding": "gzip"})

    assert "without Content-Encoding" in checked(answer, 415, "unsupported_media_type")["detail"]


async def test_an_unknown_path_and_a_wrong_method_are_problems_too(api: Api) -> None:
    checked(await api.client.get("/v1/nothing"), 404, "not_found")
    wrong = await api.client.delete("/v1/turns")

    checked(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "GET, POST"


@pytest.mark.parametrize(
    "path",
    ["/v1/turns/turn_1", "/v1/turns/ses_" + NOBODY, "/v1/turns/%00", "/v1/turns/" + "x" * 500, "/v1/sessions/é/events"],
)
async def test_a_malformed_id_in_a_path_is_404(api: Api, path: str) -> None:
    checked(await api.client.get(path), 404, "not_found")


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=many",
        "cursor=%00",
        "cursor=abc",
        "status=busy",
        "statsu=queued",
        "session_id=1",
        "created_at[gte]=yesterday",
        "metadata[" + "k" * 65 + "]=v",
    ],
)
async def test_a_filter_that_does_not_fit_is_refused_rather_than_ignored(api: Api, query: str) -> None:
    checked(await api.client.get(f"/v1/turns?{query}"), 422, "invalid_input")


@pytest.mark.parametrize("path", ["/v1/batches", "/v1/sessions"])
async def test_a_list_that_knows_no_metadata_filter_refuses_one(api: Api, path: str) -> None:
    checked(await api.client.get(f"{path}?metadata[a]=b"), 422, "invalid_input")


@pytest.mark.parametrize("query", ["agent=%00", "metadata[a]=%00", "agent=%ED%A0%80", "metadata[%00]=x"])
async def test_odd_characters_in_a_filter_are_no_fault_of_ours(api: Api, query: str) -> None:
    assert (await api.client.get(f"/v1/turns?{query}")).status_code in (200, 422)


@pytest.mark.parametrize("headers", [{"Idempotency-Key": ""}, {"Idempotency-Key": "x" * 256}])
async def test_an_idempotency_key_that_does_not_fit_is_refused(api: Api, headers: dict[str, str]) -> None:
    checked(await api.client.post("/v1/turns", json=HELLO, headers=headers), 422, "invalid_input")


@pytest.mark.parametrize("path", ["/v1/turns/{turn}?wait=soon", "/v1/turns/{turn}/events?after=-1"])
async def test_numbers_that_are_none_are_refused(api: Api, path: str) -> None:
    turn = await api.submit()

    checked(await api.client.get(path.format(turn=turn["id"])), 422, "invalid_input")


async def test_on_busy_and_run_after_contradict_each_other(api: Api) -> None:
    answer = await api.client.post(
        "/v1/turns", json=HELLO | {"on_busy": "replace", "run_after": "2130-01-01T00:00:00Z"}
    )

    checked(answer, 422, "invalid_input")


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer"}, {"Authorization": f"Basic {KEY}"}, {"Authorization": "Bearer wrong"}]
)
async def test_without_a_valid_key_nothing_is_read_and_the_answer_says_what_to_do(
    api: Api, headers: dict[str, str]
) -> None:
    async with httpx.AsyncClient(base_url=api.url, headers=headers, trust_env=False) as stranger:
        answers = [
            await stranger.get("/v1/turns"),
            await stranger.post("/v1/turns", content=b"not even json"),
            await stranger.post("/v1/batches", content=b"x" * 10),
            await stranger.post("/v1/artifacts", content=b"x" * 10),
        ]

    for answer in answers:
        assert "longshift keys create" in checked(answer, 401, "unauthorized")["detail"]
        assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_a_key_does_only_what_its_scopes_say(api: Api) -> None:
    reader = await api.key(scopes=frozenset({Scope.READ}))
    submitter = await api.key(scopes=frozenset({Scope.SUBMIT}))
    admin = await api.key(scopes=frozenset({Scope.ADMIN}))

    checked(await api.client.post("/v1/turns", json=HELLO, headers=reader), 403, "forbidden")
    checked(await api.client.get("/v1/turns", headers=submitter), 403, "forbidden")
    assert (await api.client.post("/v1/turns", json=HELLO, headers=submitter)).status_code == 202
    assert (await api.client.get("/v1/turns", headers=reader)).status_code == 200
    assert (await api.client.get("/v1/turns", headers=admin)).status_code == 200


async def test_a_revoked_key_is_refused_within_seconds_and_an_expired_one_at_once(api: Api) -> None:
    tenant = await keys.ensure_tenant(api.db)
    record, secret = await keys.create_key(api.db, tenant_id=tenant, name="short-lived")
    headers = {"Authorization": f"Bearer {secret}"}
    assert (await api.client.get("/v1/agents", headers=headers)).status_code == 200

    await keys.revoke(api.db, record.id, tenant_id=tenant)

    async def refused() -> bool:
        return (await api.client.get("/v1/agents", headers=headers)).status_code == 401

    assert await wait_until(refused, description="the key is refused", limit=REMEMBERED + 2)
    (used,) = [key for key in await keys.list_keys(api.db, tenant_id=tenant) if key.id == record.id]
    assert used.last_used_at is not None
    assert used.last_used_at.second == 0
    assert used.revoked_at is not None


async def test_nothing_of_another_tenant_can_be_seen_or_touched(api: Api) -> None:
    turn = await api.submit()
    session, batch = turn["session_id"], (await api.client.post("/v1/batches", json=[HELLO])).json()["id"]
    artifact = (await api.client.post("/v1/artifacts", content=b"secret")).json()["id"]
    stranger = await api.key()
    hidden = [f"/v1/sessions/{session}", f"/v1/turns/{turn['id']}", f"/v1/batches/{batch}", f"/v1/artifacts/{artifact}"]
    hidden += [f"{hidden[0]}/events", f"{hidden[1]}/events", f"{hidden[2]}/results", f"{hidden[3]}/content"]

    for path in hidden:
        checked(await api.client.get(path, headers=stranger), 404, "not_found")
    for path in (f"/v1/turns/{turn['id']}/cancel", f"/v1/batches/{batch}/cancel"):
        checked(await api.client.post(path, headers=stranger), 404, "not_found")
    for path, body in ((f"/v1/sessions/{session}/turns", HELLO), (f"/v1/sessions/{session}/signals", {"name": "go"})):
        checked(await api.client.post(path, json=body, headers=stranger), 404, "not_found")
    checked(await api.client.post("/v1/sessions", json={"id": session}, headers=stranger), 404, "not_found")
    mine = [HELLO | {"session_id": session}]
    checked(await api.client.post("/v1/batches", json=mine, headers=stranger), 404, "not_found")
    for path in ("/v1/turns", "/v1/sessions", "/v1/batches", f"/v1/turns?session_id={session}"):
        assert (await api.client.get(path, headers=stranger)).json()["data"] == []
    assert (await api.client.get(f"/v1/turns/{turn['id']}")).json() == turn


async def test_a_session_or_turn_that_does_not_exist_is_404(api: Api) -> None:
    checked(await api.client.post(f"/v1/sessions/ses_{NOBODY}/turns", json=HELLO), 404, "not_found")
    checked(await api.client.post(f"/v1/sessions/ses_{NOBODY}/signals", json={"name": "go"}), 404, "not_found")
    checked(await api.client.post(f"/v1/turns/turn_{NOBODY}/cancel"), 404, "not_found")
    checked(await api.client.post(f"/v1/batches/bat_{NOBODY}/cancel"), 404, "not_found")


async def test_every_route_declares_how_it_refuses_strangers_missing_scopes_and_unknown_ids(api: Api) -> None:
    document = (await api.client.get("/openapi.json")).json()
    reader, submitter = await api.key(scopes=frozenset({Scope.READ})), await api.key(scopes=frozenset({Scope.SUBMIT}))
    nobody = {"Authorization": "Bearer lsk_of_nobody"}
    await leases.serve(api.db, [replace(ECHO, name="research", input_schema={})])  # that of the examples
    routes = [(path, method) for path, methods in document["paths"].items() for method in methods if path[:4] == "/v1/"]
    assert len(routes) >= 28
    for path, method in routes:
        operation = document["paths"][path][method]
        names = [each["name"] for each in operation.get("parameters", ()) if each["in"] == "path"]
        unknown = path.format(**{name: f"{PREFIXES[name]}_{NOBODY}" for name in names})
        malformed = path.format(**dict.fromkeys(names, "1"))
        wrong_scope = submitter if method == "get" else reader
        refusals = [(unknown, nobody, 401), (unknown, wrong_scope, 403)]
        if names:
            refusals += [(unknown, {}, 404), (malformed, {}, 404)]
        for where, headers, status in refusals:
            answer = await api.client.request(method, where, headers=headers, json=_example(document, operation))
            assert answer.status_code == status, (method, where, answer.text)
            declared = operation["responses"][str(status)]["content"]["application/problem+json"]["example"]
            assert (answer.json()["code"], status) == (declared["code"], declared["status"])


def _example(document: dict[str, Any], operation: dict[str, Any]) -> Any:
    """A body that fits, from the documentation; None if there is none."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schemas = [content.get("schema", {}), *content.get("schema", {}).get("anyOf", [])]
    names = [schema["$ref"].rpartition("/")[2] for schema in schemas if "$ref" in schema]
    return next((document["components"]["schemas"][name].get("examples", [{}])[0] for name in names), None)


async def test_a_fault_inside_is_logged_once_and_not_shown(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    await api.db.execute(text("ALTER TABLE agents RENAME COLUMN queue TO lane"))
    with caplog.at_level(logging.ERROR):
        answer = await api.client.get("/v1/agents", headers={"X-Request-Id": "mine-42"})

    problem = checked(answer, 500, "internal_error")
    assert "queue" not in answer.text
    assert answer.headers["request-id"] == "mine-42"
    assert "mine-42" in problem["detail"]
    assert len(caplog.records) == 1


async def test_a_broken_schema_of_an_agent_is_named_and_fetches_nothing(api: Api) -> None:
    await leases.serve(api.db, [replace(ECHO, name="odd", input_schema={"$ref": f"{api.url}/livez"})])

    answer = await api.client.post("/v1/turns", json=HELLO | {"agent": "odd"})

    assert "input schema" in checked(answer, 422, "invalid_input")["detail"]


async def test_concurrent_turns_and_cancels_never_answer_with_a_fault(api: Api) -> None:
    turn = await api.submit()
    await Hand(api, turn["session_id"]).take()
    path = f"/v1/sessions/{turn['session_id']}/turns"

    answers = await asyncio.gather(
        *(api.client.post(path, json=HELLO | {"on_busy": kind}) for kind in ("enqueue", "replace", "reject") * 10),
        *(api.client.post(f"/v1/turns/{turn['id']}/cancel") for _ in range(10)),
    )

    assert {answer.status_code for answer in answers} <= {200, 202, 423}
