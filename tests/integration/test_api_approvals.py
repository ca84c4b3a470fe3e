"""Approvals over HTTP: looking at what turns ask, answering, and answering by a signal."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from longshift.db.keys import Scope
from longshift_api.schemas_tools import ApprovalPage, ApprovalView
from tests.support.api import Api, Hand

NOBODY = "apr_" + "0" * 32


async def running(api: Api) -> tuple[Hand, dict[str, Any]]:
    """A turn that runs, and the hand that holds its session."""
    turn = await api.submit()
    hand = Hand(api, turn["session_id"])
    await hand.take()
    await hand.start(turn["id"])
    return hand, turn


async def asked(api: Api, name: str = "publish", **more: Any) -> str:
    """The id of an open approval."""
    hand, turn = await running(api)
    return await hand.ask(turn["id"], name, **more)


async def answer(
    api: Api, approval: str, granted: bool = True, *, key: str | None = None, **more: Any
) -> httpx.Response:
    headers = {"Idempotency-Key": key} if key is not None else {}
    return await api.client.post(f"/v1/approvals/{approval}", json={"granted": granted, **more}, headers=headers)


async def test_an_open_approval_shows_what_is_to_be_decided(api: Api) -> None:
    hand, turn = await running(api)
    approval = await hand.ask(turn["id"], "publish", show={"title": "Leases"})

    page = (await api.client.get("/v1/approvals")).json()

    ApprovalPage.model_validate(page, extra="forbid")
    (shown,) = page["data"]
    assert (shown["id"], shown["name"], shown["status"], shown["show"]) == (
        approval,
        "publish",
        "open",
        {"title": "Leases"},
    )
    assert (shown["turn_id"], shown["session_id"]) == (turn["id"], turn["session_id"])
    assert (shown["granted"], shown["answered_by"]) == (None, None)
    assert (await api.client.get(shown["links"]["self"])).json() == shown


async def test_an_answer_is_kept_with_its_comment_and_the_session_is_woken(api: Api) -> None:
    hand, turn = await running(api)
    approval = await hand.ask(turn["id"])
    await hand.wait(turn["id"])

    answered = await answer(api, approval, False, comment="not yet")

    shown = answered.json()
    ApprovalView.model_validate(shown, extra="forbid")
    assert (answered.status_code, shown["status"]) == (200, "answered")
    assert (shown["granted"], shown["comment"], shown["answered_by"][:4]) == (False, "not yet", "key_")
    assert (await api.client.get("/v1/approvals")).json()["data"] == []
    assert (await api.client.get("/v1/approvals?status=all")).json()["data"] == [shown]
    await hand.take()  # it is ready


async def test_of_two_answers_at_once_one_counts_and_the_other_learns_what_was_decided(api: Api) -> None:
    for _ in range(5):
        approval = await asked(api)

        answers = await asyncio.gather(answer(api, approval, True), answer(api, approval, False))

        won, lost = sorted(answers, key=lambda given: given.status_code)
        assert (won.status_code, lost.status_code, lost.json()["code"]) == (200, 409, "already_answered")
        now = (await api.client.get(f"/v1/approvals/{approval}")).json()
        assert now == won.json()
        assert ("granted" if now["granted"] else "denied") in lost.json()["detail"]
        assert now["answered_by"] in lost.json()["detail"]


async def test_the_same_answer_again_with_its_key_is_answered_alike(api: Api) -> None:
    approval = await asked(api)

    first = await answer(api, approval, key="mine")
    again = await answer(api, approval, key="mine")
    late = [await answer(api, approval, False, key="late") for _ in range(2)]

    assert (first.status_code, again.status_code, again.json()) == (200, 200, first.json())
    assert [given.status_code for given in late] == [409, 409]


async def test_what_nobody_waits_for_any_more_cannot_be_answered(api: Api) -> None:
    approval = await asked(api, closed=True)

    late = await answer(api, approval)

    assert (late.status_code, late.json()["code"]) == (409, "already_answered")
    assert "was closed" in late.json()["detail"]
    assert (await api.client.get(f"/v1/approvals/{approval}")).json()["status"] == "closed"


async def test_a_signal_of_its_name_answers_an_open_approval_and_says_so(api: Api) -> None:
    hand, turn = await running(api)
    approval = await hand.ask(turn["id"], "publish")
    path = f"/v1/sessions/{turn['session_id']}/signals"
    body = {"name": "publish", "payload": {"granted": True, "comment": "fine"}}

    other = await api.client.post(path, json=body | {"name": "reviewed"})
    vague = await api.client.post(path, json={"name": "publish", "payload": "yes"})
    sent = await api.client.post(path, json=body, headers={"Idempotency-Key": "mine"})
    again = await api.client.post(path, json=body, headers={"Idempotency-Key": "mine"})
    later = await api.client.post(path, json=body)

    assert (other.status_code, other.json()["approval_id"]) == (202, None)
    assert (vague.status_code, vague.json()["code"]) == (422, "invalid_input")
    assert (sent.status_code, sent.json()["approval_id"]) == (202, approval)
    assert again.json() == sent.json()
    assert later.json()["approval_id"] is None
    shown = (await api.client.get(f"/v1/approvals/{approval}")).json()
    assert (shown["granted"], shown["comment"], shown["answered_by"][:4]) == (True, "fine", "key_")


async def test_the_list_is_narrowed_by_session_and_turn_and_goes_back_page_by_page(api: Api) -> None:
    elsewhere = await asked(api)
    hand, turn = await running(api)
    mine = [await hand.ask(turn["id"], f"n{n}") for n in range(4)]
    await answer(api, mine[0])

    async def ids(**params: Any) -> list[str]:
        found = await api.client.get("/v1/approvals", params=params)
        assert found.status_code == 200, found.text
        return [approval["id"] for approval in found.json()["data"]]

    assert await ids(session_id=turn["session_id"]) == mine[:0:-1]
    assert await ids(turn_id=turn["id"], status="all") == mine[::-1]
    assert await ids() == [*mine[:0:-1], elsewhere]
    first = (await api.client.get("/v1/approvals?limit=3")).json()
    assert await ids(cursor=first["next"]) == [elsewhere]


async def test_an_answer_that_does_not_fit_is_refused_with_the_place(api: Api) -> None:
    approval = await asked(api)
    misfits: list[tuple[object, str]] = [
        ({}, "granted"),
        ({"granted": "yes"}, "granted"),
        ({"granted": 1}, "granted"),
        ({"granted": True, "comment": "x" * 2001}, "comment"),
        ({"granted": True, "by": "me"}, "by"),
        (True, ""),
    ]
    for body, path in misfits:
        refused = await api.client.post(f"/v1/approvals/{approval}", json=body)

        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_input"), refused.text
        assert refused.json()["errors"][0]["path"] == path
    for query in ("status=closed", "turn_id=1", "session_id=turn_1", "name=publish"):
        assert (await api.client.get(f"/v1/approvals?{query}")).status_code == 422, query
    assert (await api.client.get(f"/v1/approvals/{approval}")).json()["status"] == "open"


async def test_a_reader_may_look_and_only_a_submitter_may_answer(api: Api) -> None:
    approval = await asked(api)
    reader = await api.key(tenant="default", scopes=frozenset({Scope.READ}))
    submitter = await api.key(tenant="default", scopes=frozenset({Scope.SUBMIT}))
    path = f"/v1/approvals/{approval}"

    seen = await api.client.get(path, headers=reader)
    refused = await api.client.post(path, json={"granted": True}, headers=reader)
    answered = await api.client.post(path, json={"granted": True}, headers=submitter)

    assert (seen.status_code, refused.status_code, answered.status_code) == (200, 403, 200)


async def test_an_approval_of_another_tenant_or_of_none_is_404(api: Api) -> None:
    approval = await asked(api)
    stranger = await api.key()

    answers = [
        await api.client.get(f"/v1/approvals/{approval}", headers=stranger),
        await api.client.post(f"/v1/approvals/{approval}", json={"granted": True}, headers=stranger),
        await api.client.get(f"/v1/approvals/{NOBODY}"),
        await api.client.get("/v1/approvals/call_" + "0" * 32),
        await answer(api, NOBODY),
        *[await answer(api, NOBODY, key="k") for _ in range(2)],
    ]

    assert {given.status_code for given in answers} == {404}
    assert (await api.client.get("/v1/approvals?status=all", headers=stranger)).json()["data"] == []
    assert (await api.client.get(f"/v1/approvals/{approval}")).json()["status"] == "open"
