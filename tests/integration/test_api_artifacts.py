"""Artifacts over HTTP: raw bytes in, raw bytes out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from longshift_api.schemas import ArtifactUrlView, ArtifactView
from tests.support.api import Api, api_config, running_api
from tests.support.object_store import ObjectServer

BYTES = bytes(range(256)) * 4096  # 1 MiB


async def upload(
    api: Api, data: bytes = BYTES, path: str = "/v1/artifacts?name=all.bin", **headers: str
) -> dict[str, Any]:
    answer = await api.client.post(path, content=data, headers=headers)
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/artifacts/{answer.json()['id']}"
    return dict(answer.json())


async def test_bytes_come_back_as_they_were_sent(api: Api) -> None:
    artifact = await upload(api)

    content = await api.client.get(artifact["links"]["content"])

    ArtifactView.model_validate(artifact, extra="forbid")
    assert (artifact["size"], artifact["sha256"]) == (len(BYTES), hashlib.sha256(BYTES).hexdigest())
    assert (content.content, content.headers["content-length"]) == (BYTES, str(len(BYTES)))
    assert content.headers["content-type"] == "application/octet-stream"
    assert (await api.client.get(artifact["links"]["self"])).json() == artifact


async def test_content_cannot_run_in_a_browser(api: Api) -> None:
    artifact = await upload(api, b"<script>", "/v1/artifacts?name=x.html", **{"Content-Type": "text/html"})

    content = await api.client.get(artifact["links"]["content"])

    assert content.headers["content-disposition"].startswith("attachment")
    assert content.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in content.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("asked", "status", "expected"),
    [
        ("bytes=0-9", 206, BYTES[:10]),
        ("bytes=1000-", 206, BYTES[1000:]),
        ("bytes=-5", 206, BYTES[-5:]),
        ("bytes=10-99999999", 206, BYTES[10:]),
        ("bytes=5-2", 200, BYTES),
        ("bytes=0-1,5-6", 200, BYTES),
        ("lines=0-1", 200, BYTES),
        ("bytes=99999999-", 416, None),
        ("bytes=-0", 416, None),
    ],
)
async def test_a_range_is_served_if_it_lies_inside(api: Api, asked: str, status: int, expected: bytes | None) -> None:
    artifact = await upload(api)

    answer = await api.client.get(artifact["links"]["content"], headers={"Range": asked})

    assert answer.status_code == status
    if expected is not None:
        assert answer.content == expected
    else:
        assert answer.headers["content-range"] == f"bytes */{len(BYTES)}"


async def test_content_that_is_known_is_not_sent_again(api: Api) -> None:
    artifact = await upload(api)
    tag = f'"{artifact["sha256"]}"'

    assert (await api.client.get(artifact["links"]["content"], headers={"If-None-Match": tag})).status_code == 304


@pytest.mark.parametrize(
    ("path", "headers", "name", "kind"),
    [
        ("/v1/artifacts", {"Content-Disposition": 'attachment; filename="a b.pdf"'}, "a b.pdf", "application/pdf"),
        ("/v1/artifacts", {"Content-Disposition": "attachment; filename*=UTF-8''%C3%A9.md"}, "é.md", "text/markdown"),
        ("/v1/artifacts", {"Content-Disposition": 'attachment; filename="../../etc/passwd"'}, "passwd", None),
        ("/v1/artifacts?name=n%00.txt", {"Content-Type": "text/plain; charset=utf-8"}, "n\u2400.txt", None),
        (
            "/v1/artifacts",
            {"Content-Type": "application/x-www-form-urlencoded"},
            "artifact",
            "application/octet-stream",
        ),
    ],
)
async def test_name_and_type_come_from_what_was_said(
    api: Api, path: str, headers: dict[str, str], name: str, kind: str | None
) -> None:
    artifact = await upload(api, b"x", path, **headers)

    assert artifact["name"] == name
    assert kind is None or artifact["content_type"] == kind


async def test_an_upload_that_is_empty_too_large_or_a_form_is_refused(small_api: Api) -> None:
    async def chunks() -> Any:
        for _ in range(100):
            yield b"x" * 1000

    empty = await small_api.client.post("/v1/artifacts", content=b"")
    announced = await small_api.client.post("/v1/artifacts", content=b"x" * 100_000)
    streamed = await small_api.client.post("/v1/artifacts", content=chunks())
    form = await small_api.client.post("/v1/artifacts", files={"file": b"x"})
    odd = await small_api.client.post("/v1/artifacts", content=b"x", headers={"Content-Type": "nonsense"})

    assert [a.status_code for a in (empty, announced, streamed, form, odd)] == [422, 413, 413, 415, 422]


async def test_a_folder_has_no_url_of_its_own_and_says_so(api: Api) -> None:
    artifact = await upload(api)

    answer = await api.client.get(f"{artifact['links']['self']}/url")

    ArtifactUrlView.model_validate(answer.json(), extra="forbid")
    assert answer.json() == {"url": artifact["links"]["content"], "presigned": False, "expires_at": None}
    assert (await api.client.get(f"{artifact['links']['self']}/url?expires_in=604801")).status_code == 422
    other = await api.key(tenant="other")
    assert (await api.client.get(f"{artifact['links']['self']}/url", headers=other)).status_code == 404


async def test_a_signed_url_leads_to_the_bytes_without_the_api(
    database_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    with ObjectServer() as server:
        config = api_config(database_url, redis_url, tmp_path).model_copy(
            update={"artifacts_url": server.url("some/prefix")}
        )
        async with running_api(config) as api:
            artifact = await upload(api, path="/v1/artifacts?name=a%20b.pdf")
            answer = await api.client.get(f"{artifact['links']['self']}/url?expires_in=60")
            found = answer.json()
            async with httpx.AsyncClient(trust_env=False) as anybody:
                content = await anybody.get(found["url"])

    assert (found["presigned"], answer.headers["cache-control"]) == (True, "no-store")
    assert found["expires_at"] is not None
    assert content.content == BYTES
    assert content.headers["content-disposition"] == "attachment; filename*=UTF-8''a%20b.pdf"


async def test_bytes_that_are_not_what_was_uploaded_are_not_sent_to_the_end(api: Api, tmp_path: Path) -> None:
    artifact = await upload(api)
    (stored,) = (path for path in (tmp_path / "artifacts").rglob("*@") if path.is_file())
    stored.write_bytes(BYTES[:-1] + b"?")

    with pytest.raises(httpx.RemoteProtocolError):
        await api.client.get(artifact["links"]["content"])
