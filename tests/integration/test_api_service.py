"""The service around the resources: health, documentation, dependencies that go away, starting and stopping."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from longshift.db import migrations
from longshift.db.database import Database
from longshift.db.keys import ensure_key, ensure_tenant, list_keys
from longshift.embedded import Guardian, LocalPostgres, LocalRedis
from longshift.errors import ConfigError
from longshift.testing.waiting import wait_until, wait_until_sync
from longshift_api.server import bind
from tests.support.api import KEY, Api, api_config, running_api

HELLO = {"agent": "echo", "input": {"text": "hello"}}
REPEATABLE = (  # with an Idempotency-Key
    "/v1/sessions",
    "/v1/turns",
    "/v1/sessions/{session_id}/turns",
    "/v1/turns/{turn_id}/retry",
    "/v1/batches",
    "/v1/artifacts",
    "/v1/sessions/{session_id}/signals",
    "/v1/tool-calls/{call_id}/settle",
    "/v1/approvals/{approval_id}",
)
ROOT = Path(__file__).parents[2]


async def test_a_ready_api_names_each_dependency(api: Api) -> None:
    async with httpx.AsyncClient(base_url=api.url, trust_env=False) as anybody:
        live, ready = await anybody.get("/livez"), await anybody.get("/readyz")

    assert (live.status_code, live.json()) == (200, {"status": "ok"})
    assert (ready.status_code, ready.json()["status"]) == (200, "ok")
    assert set(ready.json()["checks"]) == {"postgres", "redis", "artifacts"}


async def test_without_redis_work_is_accepted_and_polls_still_answer(
    database_url: str, tmp_path: Path, guardian: Guardian
) -> None:
    server = LocalRedis(tmp_path / "redis", guardian=guardian)
    server.start()
    async with running_api(api_config(database_url, server.url, tmp_path)) as api:
        await api.submit()
        server.stop()

        turn = await api.submit()
        waited = await api.client.get(f"/v1/turns/{turn['id']}?wait=1")
        ready = await api.client.get("/readyz")

    assert waited.json()["status"] == "queued"
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert ready.json()["checks"]["redis"]["status"] == "failed"


async def test_without_the_artifact_folder_the_api_is_not_ready(api: Api, tmp_path: Path) -> None:
    (tmp_path / "artifacts").rename(tmp_path / "elsewhere")

    ready = await api.client.get("/readyz")
    upload = await api.client.post("/v1/artifacts", content=b"x")

    assert (ready.status_code, ready.json()["checks"]["artifacts"]["status"]) == (503, "failed")
    assert (upload.status_code, upload.json()["retryable"]) == (503, True)


async def test_without_postgres_the_api_says_so_without_telling_where_it_was_and_recovers(
    redis_url: str, tmp_path: Path, guardian: Guardian
) -> None:
    server = LocalPostgres(tmp_path / "postgres", guardian=guardian)
    server.start()
    migrations.upgrade(server.url)
    async with running_api(api_config(server.url, redis_url, tmp_path)) as api:
        turn = await api.submit()
        server.stop()

        gone = await api.client.get(f"/v1/turns/{turn['id']}")
        ready, live = await api.client.get("/readyz"), await api.client.get("/livez")
        server.start()

        async def back() -> bool:
            return dict((await api.client.get(f"/v1/turns/{turn['id']}")).json()) == turn

        assert await wait_until(back, description="the turn can be polled again")
    server.stop()
    assert (gone.status_code, gone.json()["retryable"], gone.headers["retry-after"]) == (503, True, "2")
    assert "connection" not in gone.text
    assert (ready.status_code, ready.json()["checks"]["postgres"]["status"], live.status_code) == (503, "failed", 200)
    assert str(tmp_path) not in gone.text + ready.text


async def test_the_agents_are_listed_with_their_schemas(api: Api) -> None:
    (agent,) = (await api.client.get("/v1/agents")).json()["data"]

    assert (agent["name"], agent["version"], agent["queue"]) == ("echo", "1", "default")
    assert agent["input_schema"]["required"] == ["text"]


async def test_the_documentation_declares_every_answer_and_refers_to_nothing_outside(api: Api) -> None:
    document = (await api.client.get("/openapi.json")).json()

    operations = [operation for path in document["paths"].values() for operation in path.values()]
    schemas = document["components"]["schemas"]
    assert len(operations) >= 20
    for operation in operations:
        declared = set(operation["responses"])
        assert operation["summary"]
        if operation["tags"] != ["health"]:
            assert {"401", "403", "422", "500", "503"} <= declared
            assert operation["security"] == [{"HTTPBearer": []}]
        for reference in references(operation):
            assert reference.removeprefix("#/components/schemas/") in schemas, reference
    for path in REPEATABLE:
        parameters = [each["name"] for each in document["paths"][path]["post"]["parameters"]]
        assert parameters.count("Idempotency-Key") == 1, path
    assert (await api.client.get("/docs")).status_code == 404


async def test_every_example_of_the_documentation_fits_what_it_is_an_example_of(api: Api) -> None:
    document = (await api.client.get("/openapi.json")).json()
    seen = set()
    for name, schema in document["components"]["schemas"].items():
        validator = Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": document["components"]})
        for example in schema.get("examples", ()):
            validator.validate(example)
            seen.add(name)

    assert {"TurnBody", "SettleBody", "AnswerBody", "RetryBody", "ToolCallView", "ApprovalView"} <= seen


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [reference for value in node.values() for reference in references(value)]
    return [reference for item in node for reference in references(item)] if isinstance(node, list) else []


async def test_the_key_of_the_operator_is_set_up_once_and_short_ones_are_refused(database_url: str) -> None:
    db = Database(database_url)
    try:
        tenants = {await ensure_key(db, KEY) for _ in range(3)}
        assert tenants == {await ensure_tenant(db)}
        assert len(await list_keys(db, tenant_id=tenants.pop())) == 1
        with pytest.raises(ConfigError, match="at least 16"):
            await ensure_key(db, "short")
    finally:
        await db.close()


def started(environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "longshift_api"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def settings(database_url: str, redis_url: str, folder: Path, port: int) -> dict[str, str]:
    return {
        "LONGSHIFT_DATABASE_URL": database_url,
        "LONGSHIFT_REDIS_URL": redis_url,
        "LONGSHIFT_ARTIFACTS_URL": f"file://{folder}/artifacts",
        "LONGSHIFT_API_KEY": KEY,
        "LONGSHIFT_PORT": str(port),
    }


def free_port() -> int:
    with bind("127.0.0.1", 0) as listener:
        return int(listener.getsockname()[1])


def test_the_process_serves_and_stops_on_sigterm_although_somebody_streams(
    database_url: str, redis_url: str, tmp_path: Path, guardian: Guardian
) -> None:
    port = free_port()
    process = started(settings(database_url, redis_url, tmp_path, port))
    guardian.watch(process.pid)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False) as client:

        def ready() -> bool:
            try:
                return client.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        wait_until_sync(ready, description="the API answers")
        session = client.post("/v1/sessions").json()["id"]
        path = f"/v1/sessions/{session}/events"
        with client.stream("GET", path, headers={"Accept": "text/event-stream"}) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "retry: 1000"
            process.send_signal(signal.SIGTERM)
            assert list(lines)[-1] == ""
    output, _ = process.communicate(timeout=8)
    assert process.returncode in (0, -signal.SIGTERM), output
    assert KEY not in output


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"LONGSHIFT_DATABASE_URL": "postgresql://127.0.0.1:1/nothing"}, "check LONGSHIFT_DATABASE_URL"),
        ({"LONGSHIFT_DATABASE_URL": ""}, "LONGSHIFT_DATABASE_URL is not set"),
        ({"LONGSHIFT_API_KEY": "short"}, "LONGSHIFT_API_KEY must be at least 16"),
        ({"LONGSHIFT_PORT": "taken"}, "choose another port"),
        ({"LONGSHIFT_HOST": "192.0.2.1"}, "cannot listen on 192.0.2.1"),
    ],
)
def test_a_start_that_cannot_succeed_says_why_in_one_sentence(
    database_url: str, redis_url: str, tmp_path: Path, change: dict[str, str], sentence: str
) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        given = {name: str(port) if value == "taken" else value for name, value in change.items()}
        process = started(settings(database_url, redis_url, tmp_path, free_port()) | given)
        output, _ = process.communicate(timeout=20)

    assert process.returncode == (4 if "does not answer" in output else 2), output
    assert sentence in output
    assert "Traceback" not in output


async def test_an_empty_database_is_refused_with_the_command_that_helps(
    postgres_server: Any, redis_url: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="run `longshift migrate`"):
        async with running_api(api_config(postgres_server.url, redis_url, tmp_path)):
            pass


async def test_redis_that_comes_back_is_listened_to_again(
    database_url: str, tmp_path: Path, guardian: Guardian
) -> None:
    server = LocalRedis(tmp_path / "redis", guardian=guardian)
    server.start()
    config = api_config(database_url, server.url, tmp_path)
    async with running_api(config) as api, api.edge.hot.listen("before"):
        server.stop()
        async with api.edge.hot.listen("during") as during:
            server.start()

            async def heard() -> bool:
                await api.edge.hot.announce([("during", "hello")])
                return not during.empty()

            assert await wait_until(heard, description="a message comes through")
    server.stop()
