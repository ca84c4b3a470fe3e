"""The deletion cost of a worker's pod, kept at an API server that a test plays: TLS, a token that changes, and refusals."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from longshift.podcost import ANNOTATION, EVERY, LONGEST, PodCost
from longshift.testing.waiting import wait_until
from tests.support.http_servers import Running, running

SOON = timedelta(milliseconds=2)


@dataclass
class ApiServer:
    """What a Kubernetes API server does with a PATCH of a pod, as far as it matters here."""

    token: str = "first"
    refuses: int = 0  # with this status
    asked: list[tuple[str, str, Any]] = field(default_factory=list)  # path, content type, body
    tokens: list[str] = field(default_factory=list)

    async def patch(self, request: Request) -> Response:
        self.tokens.append(request.headers["authorization"])
        self.asked.append((request.url.path, request.headers["content-type"], await request.json()))
        if request.headers["authorization"] != f"Bearer {self.token}":
            return JSONResponse({"message": "Unauthorized"}, status_code=401)
        if self.refuses:
            return JSONResponse({"message": "pods is forbidden"}, status_code=self.refuses)
        return JSONResponse({})

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/api/v1/namespaces/{namespace}/pods/{pod}", self.patch, methods=["PATCH"])])

    @property
    def costs(self) -> list[str]:
        return [body["metadata"]["annotations"][ANNOTATION] for _, _, body in self.asked]


def certificate() -> tuple[bytes, bytes]:
    """Of 127.0.0.1, signed by itself: the certificate, and its key with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "api server")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return made, secret + made


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """As the kubelet mounts it."""
    (tmp_path / "token").write_text("first\n")
    (tmp_path / "namespace").write_text("longshift")
    return tmp_path


@pytest.fixture
def api() -> ApiServer:
    return ApiServer()


@pytest.fixture
def server(api: ApiServer, account: Path) -> Iterator[Running]:
    made, with_key = certificate()
    (account / "ca.crt").write_bytes(made)
    (account / "server.pem").write_bytes(with_key)
    with running(api.app, certificate=account / "server.pem") as server:
        server.url = f"https://127.0.0.1:{server.port}"
        yield server


@asynccontextmanager
async def keeping(cost: PodCost) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(cost.run())
    try:
        yield task
    finally:
        assert not task.done(), "it ended by itself, which would end the worker"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_cost_follows_the_turns_that_run_and_is_written_on_change_only(
    api: ApiServer, server: Running, account: Path
) -> None:
    turns, looks = 0, 0

    def look() -> int:
        nonlocal looks
        looks += 1
        return turns

    async with keeping(PodCost(look, pod="worker-7", url=server.url, account=account, every=SOON)):
        await wait_until(lambda: api.costs == ["0"], description="the cost from before is replaced")
        looks = 0
        await wait_until(lambda: looks > 5, description="it has looked a few times more")
        turns = 12
        await wait_until(lambda: api.costs == ["0", "12"], description="the new cost is written")
    path, content_type, body = api.asked[0]
    assert path == "/api/v1/namespaces/longshift/pods/worker-7"
    assert content_type == "application/merge-patch+json"
    assert body == {"metadata": {"annotations": {"controller.kubernetes.io/pod-deletion-cost": "0"}}}


async def test_a_token_that_the_kubelet_has_replaced_is_read_again(
    api: ApiServer, server: Running, account: Path
) -> None:
    turns = 1
    async with keeping(PodCost(lambda: turns, pod="p", url=server.url, account=account, every=SOON)):
        await wait_until(lambda: api.tokens == ["Bearer first"], description="the first write")
        api.token = "second"
        (account / "token").write_text("second\n")
        turns = 2
        await wait_until(lambda: api.costs == ["1", "2"], description="the second write")
    assert api.tokens == ["Bearer first", "Bearer second"]


@pytest.mark.parametrize("status", [401, 403, 404, 409, 500, 302])
async def test_a_refusal_is_logged_once_and_tried_again(
    api: ApiServer, server: Running, account: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    caplog.set_level(logging.INFO, logger="longshift.podcost")
    api.refuses = status
    async with keeping(PodCost(lambda: 3, pod="p", url=server.url, account=account, every=SOON)):
        await wait_until(lambda: len(api.asked) >= 3, description="it tries again")
        api.refuses = 0
        await wait_until(lambda: len(caplog.records) == 2, description="it is said that it goes on")
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert str(status) in caplog.records[0].__dict__["reason"]
    assert "first" not in caplog.text, "a token in the log"


async def test_what_is_missing_in_the_pod_harms_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with keeping(PodCost(lambda: 3, pod="p", account=tmp_path / "nowhere", every=SOON)):
        await wait_until(lambda: len(caplog.records) == 1, description="it is said")
    assert "token" in caplog.records[0].__dict__["reason"]


@pytest.mark.parametrize("pod", ["p", "no\x00name"])
async def test_an_api_server_that_is_away_or_of_another_authority_harms_nothing(
    api: ApiServer, server: Running, account: Path, caplog: pytest.LogCaptureFixture, pod: str
) -> None:
    (account / "ca.crt").write_bytes(certificate()[0])  # not the one that the server's is of
    async with keeping(PodCost(lambda: 3, pod=pod, url=server.url, account=account, every=SOON)):
        await wait_until(lambda: len(caplog.records) == 1, description="a server of another authority")
        server.stop()
        (account / "token").write_text("\u00e4", encoding="latin-1")
    assert api.asked == [], "the token went to somebody else"


def test_it_writes_at_most_every_fifteen_seconds_and_seldom_while_it_fails() -> None:
    cost = PodCost(lambda: 0, pod="p")
    pauses = []
    for failures in (0, 1, 2, 3, 4, 5, 6, 100):
        cost._failed = failures
        pauses.append(cost._pause())
    assert pauses[:4] == [EVERY, EVERY, 2 * EVERY, 4 * EVERY]
    assert pauses[-2:] == [LONGEST, LONGEST]
    assert min(pauses) == EVERY >= timedelta(seconds=15)
