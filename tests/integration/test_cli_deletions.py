"""The commands that delete, against an API in this process: nothing without a yes, and no word of success for a half."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from longshift.model import Prefix, parse_id
from tests.support.api import KEY, Api
from tests.support.local_stack import Said, call_inline

Run = Callable[..., Coroutine[Any, Any, Said]]


@pytest.fixture
def run(api: Api, tmp_path: Path, database_url: str, redis_url: str) -> Run:
    """Runs a command in a thread, while the API serves it from here."""
    where = {
        "database_url": database_url,
        "redis_url": redis_url,
        "artifacts_url": f"file://{tmp_path}/artifacts",
        "url": api.url,
        "api_key": KEY,
    }

    async def running(*arguments: str, given: str = "") -> Said:
        return await asyncio.to_thread(call_inline, *arguments, folder=tmp_path, given=given, **where)

    return running


async def with_passages_that_stay(api: Api, session: str) -> None:
    """What is left of ``session`` cannot be removed, as when Postgres goes away in the middle."""
    for statement in (
        """INSERT INTO passages (tenant_id, session_id, source, ordinal, text)
           SELECT tenant_id, id, 'notes', 0, 'x' FROM sessions WHERE id = :id""",
        """CREATE OR REPLACE FUNCTION stay() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN RAISE EXCEPTION 'locked' USING ERRCODE = '55P03'; END $$""",
        "CREATE OR REPLACE TRIGGER stay BEFORE DELETE ON passages FOR EACH ROW EXECUTE FUNCTION stay()",
    ):
        await api.db.execute(text(statement), {"id": parse_id(Prefix.SESSION, session)} if ":id" in statement else {})


@pytest.mark.parametrize("answer", ["", "n\n"])
async def test_nothing_is_deleted_without_a_yes(api: Api, run: Run, answer: str) -> None:
    session = await api.session()

    for command in (("sessions", "delete", session), ("tenants", "delete", "default")):
        said = await run(*command, given=answer)
        assert (said.code, said.out.strip()) == (2, "")
        assert "nothing was deleted" in said.err

    assert (await api.client.get(f"/v1/sessions/{session}")).status_code == 200


async def test_a_deletion_of_which_something_is_left_says_so(api: Api, run: Run) -> None:
    first, second = await api.session(), await api.session()
    await with_passages_that_stay(api, first)
    await with_passages_that_stay(api, second)

    session = await run("sessions", "delete", first, given="y\n")
    tenant = await run("tenants", "delete", "default", "--yes", "--json")

    assert (session.code, tenant.code) == (4, 4)
    for said, name in ((session, first), (tenant, "'default'")):
        assert f"{name} is deleted, but a part of the service was away" in said.err
    assert (tenant.json["sessions"], tenant.json["complete"]) == (1, False)
