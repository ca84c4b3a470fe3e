"""Large inputs and outputs over HTTP: taken in, kept in the cold tier, shown whole where that is promised."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from longshift.model import Prefix, new_id, parse_id
from longshift_api.schemas import TurnView
from tests.support.api import Api, Hand

KB = 1024
TEXT = "".join(f"line {n} \U0001f600\n" for n in range(4000))  # about 60 KB
JSONL = {"Content-Type": "application/jsonl"}
COUNTS = text("""
SELECT (SELECT count(*) FROM turns) AS turns, (SELECT count(*) FROM artifacts) AS artifacts,
       (SELECT count(*) FROM artifact_refs) AS refs, (SELECT count(*) FROM sessions) AS sessions""")
ROW = text("SELECT input, input_artifact, pg_column_size(t.*) AS bytes FROM turns t WHERE id = :id")


@asynccontextmanager
async def store_away(folder: Path) -> AsyncIterator[None]:
    """As an unmounted volume is."""
    store, away = folder / "artifacts", folder / "away"
    store.rename(away)
    yield
    away.rename(store)


async def counts(api: Api) -> tuple[int, ...]:
    return tuple((await api.db.fetch(COUNTS))[0])


async def shown(api: Api, turn_id: str, **headers: str) -> dict[str, Any]:
    answer = await api.client.get(f"/v1/turns/{turn_id}", headers=headers)
    assert answer.status_code == 200, answer.text
    TurnView.model_validate(answer.json(), extra="forbid")
    return dict(answer.json())


async def ended(api: Api, output: object, **fields: Any) -> dict[str, Any]:
    """A turn that has succeeded with a large output."""
    turn = await api.submit(**fields)
    tenant = (await api.db.fetch(text("SELECT tenant_id FROM turns LIMIT 1")))[0].tenant_id
    session = parse_id(Prefix.SESSION, turn["session_id"])
    data = json.dumps(output, ensure_ascii=False).encode()
    artifact, _ = await api.edge.cold.put(
        data, tenant_id=tenant, name="output.json", content_type="application/json", session_id=session
    )
    hand = Hand(api, turn["session_id"])
    await hand.take()
    await hand.start(turn["id"])
    await hand.succeed(turn["id"], artifact=artifact.id)
    return turn


async def test_a_large_input_is_kept_outside_of_its_row_and_shown_whole(api: Api) -> None:
    artifact = f"art_{new_id().hex}"
    accepted = await api.submit(input={"text": TEXT + artifact})

    assert accepted["input"] is None
    pointer = accepted["input_artifact"]
    [row] = await api.db.fetch(ROW, {"id": parse_id(Prefix.TURN, accepted["id"])})
    assert (row.input, row.input_artifact) == (None, parse_id(Prefix.ARTIFACT, pointer["id"]))
    assert row.bytes < KB
    turn = await shown(api, accepted["id"])
    assert turn["input"] == {"text": TEXT + artifact}
    assert turn["input_artifact"] == pointer
    content = await api.client.get(pointer["links"]["content"])
    assert json.loads(content.content) == {"text": TEXT + artifact}
    assert (len(content.content), content.headers["content-type"]) == (pointer["size"], "application/json")
    listed = (await api.client.get("/v1/turns")).json()["data"]
    assert [(each["input"], each["input_artifact"]) for each in listed] == [(None, pointer)]


async def test_a_repeated_large_submission_makes_nothing_new(api: Api) -> None:
    body, key = {"agent": "echo", "input": {"text": TEXT}}, {"Idempotency-Key": "once"}
    first = await api.client.post("/v1/turns", json=body, headers=key)
    before = await counts(api)
    again = await api.client.post("/v1/turns", json=body, headers=key)
    other = await api.client.post("/v1/turns", json={**body, "input": {"text": TEXT + "."}}, headers=key)

    assert (first.json()["id"], again.status_code, other.status_code) == (again.json()["id"], 202, 422)
    assert await counts(api) == before == (1, 1, 1, 1)


async def test_a_refused_large_submission_leaves_nothing_that_refers_to_its_input(api: Api) -> None:
    session = await api.session()
    await api.submit(f"/v1/sessions/{session}/turns")
    body = {"agent": "echo", "input": {"text": TEXT}, "on_busy": "reject"}
    busy = await api.client.post(f"/v1/sessions/{session}/turns", json=body)
    nowhere = await api.client.post(f"/v1/sessions/ses_{new_id().hex}/turns", json=body)
    misfit = await api.client.post("/v1/turns", json={"agent": "echo", "input": {"text": TEXT, "times": 0}})

    assert (busy.status_code, nowhere.status_code, misfit.status_code) == (423, 404, 422)
    turns, artifacts, refs, sessions = await counts(api)
    assert (turns, refs, sessions) == (1, 0, 1)
    assert artifacts == 2  # for the collector; what did not even fit was not stored


async def test_what_an_input_names_stays_as_long_as_its_session(api: Api) -> None:
    uploaded = (await api.client.post("/v1/artifacts?name=x", content=b"bytes")).json()["id"]
    small = await api.submit(input={"text": uploaded})
    large = await api.submit(input={"text": f"{TEXT} {uploaded} and art_{'0' * 32}"})

    rows = await api.db.fetch(text("SELECT artifact_id, session_id FROM artifact_refs"))
    named, kept = (parse_id(Prefix.ARTIFACT, each) for each in (uploaded, large["input_artifact"]["id"]))
    here, there = (parse_id(Prefix.SESSION, each["session_id"]) for each in (small, large))
    assert {tuple(row) for row in rows} == {(named, here), (named, there), (kept, there)}


async def test_a_large_output_is_shown_whole_up_to_1_mib(api: Api) -> None:
    small, large = await ended(api, {"text": TEXT}), await ended(api, "x" * (1024 * KB))

    turn = await shown(api, small["id"])
    assert turn["output"] == {"text": TEXT}
    assert turn["output_artifact"]["size"] == len(json.dumps({"text": TEXT}, ensure_ascii=False).encode())
    turn = await shown(api, large["id"])
    assert (turn["output"], turn["output_artifact"]["size"]) == (None, 1024 * KB + 2)
    assert json.loads((await api.client.get(turn["output_artifact"]["links"]["content"])).content) == "x" * (1024 * KB)


async def test_without_the_store_a_turn_is_shown_with_pointers(api: Api, tmp_path: Path) -> None:
    turn = await ended(api, {"text": TEXT}, input={"text": TEXT})
    async with store_away(tmp_path):
        found = await shown(api, turn["id"])
    assert (found["status"], found["input"], found["output"]) == ("succeeded", None, None)
    assert found["output_artifact"]["size"] > 32 * KB
    await api.db.execute(text("DELETE FROM artifacts"))
    found = await shown(api, turn["id"])
    assert (found["output"], found["output_artifact"]["size"]) == (None, None)


async def test_what_was_shown_without_the_store_is_not_taken_for_the_whole_afterwards(api: Api, tmp_path: Path) -> None:
    turn = await ended(api, {"text": TEXT})
    path = f"/v1/turns/{turn['id']}"
    async with store_away(tmp_path):
        partial = await api.client.get(path)

    whole = await api.client.get(path, headers={"If-None-Match": partial.headers["etag"]})

    assert (whole.status_code, whole.json()["output"]) == (200, {"text": TEXT})
    assert (await api.client.get(path, headers={"If-None-Match": whole.headers["etag"]})).status_code == 304


async def test_without_the_store_turns_are_accepted_with_their_input_in_the_row(api: Api, tmp_path: Path) -> None:
    async with store_away(tmp_path):
        turn = await api.submit(input={"text": TEXT})
        lines = b"\n".join(json.dumps({"agent": "echo", "input": {"text": TEXT}}).encode() for _ in range(20))
        batch = await api.client.post("/v1/batches", content=lines, headers=JSONL)
    assert (turn["input"], turn["input_artifact"]) == ({"text": TEXT}, None)
    assert (batch.status_code, (await counts(api))[:3]) == (202, (21, 0, 0))


async def test_a_batch_with_large_inputs_is_accepted_and_its_large_outputs_come_with_its_results(
    api: Api, tmp_path: Path
) -> None:
    texts = [TEXT + str(n) if n % 2 else str(n) for n in range(20)]
    lines = b"\n".join(json.dumps({"agent": "echo", "input": {"text": each}}).encode() for each in texts)
    batch = (await api.client.post("/v1/batches", content=lines, headers=JSONL)).json()
    path = f"/v1/batches/{batch['id']}/results"
    everything = [json.loads(row) for row in (await api.client.get(f"{path}?all=true")).text.splitlines()]

    assert [turn["input_artifact"] is not None for turn in everything] == [bool(n % 2) for n in range(20)]
    for turn, given in zip(everything[:4], texts, strict=False):
        assert (await shown(api, turn["id"]))["input"] == {"text": given}
    tenant = (await api.db.fetch(text("SELECT tenant_id FROM turns LIMIT 1")))[0].tenant_id
    for number, turn in enumerate(everything[:10]):
        hand = Hand(api, turn["session_id"])
        await hand.take()
        await hand.start(turn["id"])
        data = json.dumps(f"{TEXT}{number}").encode()
        artifact, _ = await api.edge.cold.put(data, tenant_id=tenant, name="o", content_type="application/json")
        await hand.succeed(turn["id"], artifact=artifact.id)

    done = [json.loads(row) for row in (await api.client.get(path)).text.splitlines()]
    assert [turn["output"] for turn in done] == [f"{TEXT}{number}" for number in range(10)]
    async with store_away(tmp_path):
        done = [json.loads(row) for row in (await api.client.get(path)).text.splitlines()]
    assert [(turn["output"], turn["output_artifact"] is None) for turn in done] == [(None, False)] * 10


async def test_a_value_of_another_tenant_is_not_shown(api: Api) -> None:
    turn = await api.submit(input={"text": TEXT})
    stranger = await api.key()
    pointer = turn["input_artifact"]["links"]["content"]
    assert (await api.client.get(pointer, headers=stranger)).status_code == 404
    assert (await api.client.get(f"/v1/turns/{turn['id']}", headers=stranger)).status_code == 404

    # even if a row pointed there: values are looked up for the tenant whose turn it is
    own = (await api.client.post("/v1/turns", json={"agent": "echo", "input": {"text": TEXT}}, headers=stranger)).json()
    params = {"id": parse_id(Prefix.TURN, own["id"]), "artifact": UUID(turn["input_artifact"]["id"][4:])}
    await api.db.execute(text("UPDATE turns SET input_artifact = :artifact WHERE id = :id"), params)
    found = await shown(api, own["id"], **stranger)
    assert (found["input"], found["input_artifact"]["size"]) == (None, None)


@pytest.mark.parametrize("size", [1, 40 * KB])
async def test_a_retry_has_the_input_of_the_turn_before(api: Api, size: int) -> None:
    turn = await api.submit(input={"text": "x" * size})
    hand = Hand(api, turn["session_id"])
    await hand.take()
    await hand.start(turn["id"])
    await hand.fail(turn["id"], {"code": "agent_error", "message": "no"})
    again = (await api.client.post(f"/v1/turns/{turn['id']}/retry")).json()

    assert again["input_artifact"] == turn["input_artifact"]
    assert (await shown(api, again["id"]))["input"] == {"text": "x" * size}
    assert (await counts(api))[1:3] == ((1, 1) if size > 1 else (0, 0))
