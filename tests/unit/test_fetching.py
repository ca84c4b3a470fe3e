"""Fetching: strangers may name any address, and reach only the public ones, for so long and for so much."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from longshift import InvalidInput
from longshift.errors import ConfigError
from longshift.fetching import Failed, Forbidden, Guard, Limits, _decoded, fetch, is_public, post
from tests.support.http_servers import Running, running
from tests.support.web import Web, bomb, point

HERE = Guard(["127.0.0.1"])
TEXT = {"content-type": "text/plain"}


@pytest.fixture
def web() -> Web:
    return Web()


@pytest.fixture
def site(web: Web) -> Iterator[Running]:
    with running(lambda: web.app) as site:
        yield site


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "192.0.2.1",
        "192.168.0.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::a00:1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::1",
        "5f00::1",
        "fc00::1",
        "fe80::1",
        "fe80::1%eth0",
        "2606:4700::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert not is_public(ip_address(address))
    with pytest.raises(Forbidden, match="not on the public network"):
        Guard().check("somewhere", ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"],
)
def test_public_addresses_are_not(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/",
        "http://localhost:{port}/",
        "http://2130706433:{port}/",
        "http://0x7f.1:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://0:{port}/",
    ],
)
async def test_nothing_of_this_machine_is_asked(url: str, web: Web, site: Running) -> None:
    with pytest.raises(Forbidden, match="LONGSHIFT_FETCH_ALLOW"):
        await fetch(url.format(port=site.port), guard=Guard())
    assert web.asked == []


async def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    point(monkeypatch, "mixed.test", ["8.8.8.8", "10.0.0.1"])
    with pytest.raises(Forbidden, match=r"mixed\.test is 10\.0\.0\.1"):
        await fetch("http://mixed.test/", guard=Guard())


async def test_the_connection_goes_to_the_address_that_was_checked(
    web: Web, site: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.pages["/"] = 200, TEXT, b"hello"
    asked = point(monkeypatch, "rebind.test", ["127.0.0.1"], ["127.0.0.2"])
    page = await fetch(f"http://rebind.test:{site.port}/", guard=HERE)
    assert (page.body, len(asked)) == (b"hello", 1)
    assert web.asked[0][2]["host"] == f"rebind.test:{site.port}"


async def test_the_next_address_is_tried_when_one_takes_no_connection(
    web: Web, site: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.pages["/"] = 200, TEXT, b"hello"
    point(monkeypatch, "two.test", ["127.0.0.9", "127.0.0.1"])
    assert (await fetch(f"http://two.test:{site.port}/", guard=Guard(["two.test"]))).body == b"hello"


async def test_a_redirect_is_checked_like_the_first_address(
    web: Web, site: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    point(monkeypatch, "inside.test", ["127.0.0.2"])
    web.pages["/"] = 302, {"location": f"http://inside.test:{site.port}/secret"}, b""
    with pytest.raises(Forbidden, match=r"inside\.test is 127\.0\.0\.2"):
        await fetch(site.url, guard=HERE)
    assert len(web.asked) == 1


@pytest.mark.parametrize(
    ("location", "complaint"),
    [
        ("file:///etc/passwd", "begins with 'file'"),
        ("http://user:hush@127.0.0.1/", "a user or a password"),
    ],
)
async def test_a_redirect_to_something_else_is_refused(location: str, complaint: str, web: Web, site: Running) -> None:
    web.pages["/"] = 301, {"location": location}, b""
    with pytest.raises(InvalidInput, match=complaint) as caught:
        await fetch(site.url, guard=HERE)
    assert "hush" not in str(caught.value)


async def test_redirects_are_followed_up_to_a_limit(web: Web, site: Running) -> None:
    web.pages |= {f"/{n}": (307, {"location": f"/{n + 1}"}, b"") for n in range(9)} | {"/5": (200, TEXT, b"there")}
    page = await fetch(f"{site.url}/0", guard=HERE)
    assert (page.body, page.url) == (b"there", f"{site.url}/5")
    del web.pages["/5"]
    web.pages["/5"] = 307, {"location": "/6"}, b""
    with pytest.raises(InvalidInput, match="more than 5 times"):
        await fetch(f"{site.url}/0", guard=HERE)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("ftp://example.com/", "begins with 'ftp'"),
        ("file:///etc/passwd", "begins with 'file'"),
        ("//example.com", "begins with 'nothing'"),
        ("http://", "begins with 'http'"),
        ("http://me:hush@example.com/", "a user or a password"),
        ("http://example.com:99999/", "port 99999"),
    ],
)
async def test_an_address_of_another_kind_is_refused(url: str, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint) as caught:
        await fetch(url, guard=HERE)
    assert "hush" not in str(caught.value)


async def test_a_name_that_nobody_has_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(Failed, match=r"there is no host 'nobody\.test'"):
        await fetch("http://nobody.test/", guard=HERE)


SMALL = Limits(size=100_000, time=timedelta(seconds=20))


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ((200, TEXT, b"x" * 100_001), "more than 100,000 bytes"),
        ((200, TEXT | {"content-encoding": "gzip"}, bomb(200_000_000)), "more than 100,000 bytes"),
        ((200, TEXT | {"content-encoding": "br"}, b"?"), "compressed with 'br'"),
        ((200, TEXT | {"content-encoding": "gzip"}, b"no zip"), "not compressed as it says"),
        ((200, {"content-type": "image/png"}, b""), "of type 'image/png', not text"),
        ((404, {}, b""), "HTTP 404"),
    ],
    ids=["large", "bomb", "other coding", "no coding", "picture", "missing"],
)
async def test_what_is_not_text_of_a_bearable_size_is_refused(
    page: tuple[int, dict[str, str], bytes], complaint: str, web: Web, site: Running
) -> None:
    web.pages["/"] = page
    with pytest.raises(InvalidInput, match=complaint):
        await fetch(site.url, guard=HERE, limits=SMALL)


async def test_a_bomb_is_defused_piece_by_piece() -> None:
    response = httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(bomb(50_000_000)))
    assert max([len(piece) async for piece in _decoded(response, 1000)]) == 1001


async def test_what_follows_the_end_of_compressed_text_is_not_read() -> None:
    read: list[bytes] = []

    async def parts() -> AsyncIterator[bytes]:
        for part in (bomb(10), b"more", b"and more"):
            read.append(part)
            yield part

    response = httpx.Response(200, headers={"content-encoding": "gzip"}, content=parts())
    assert len(b"".join([piece async for piece in _decoded(response, 1000)])) == 10
    assert len(read) == 1


async def test_an_answer_without_end_is_left(site: Running) -> None:
    with pytest.raises(InvalidInput, match="more than 100,000 bytes"):
        await fetch(f"{site.url}/endless", guard=HERE, limits=SMALL)


async def test_a_host_that_does_not_answer_is_left(site: Running) -> None:
    with pytest.raises(Failed, match=r"more than 0\.1 s"):
        await fetch(f"{site.url}/mute", guard=HERE, limits=Limits(time=timedelta(seconds=0.1)))


async def test_a_host_that_is_busy_says_when_to_come_again(web: Web, site: Running) -> None:
    web.pages["/"] = 503, {"retry-after": "30"}, b""
    with pytest.raises(Failed, match="HTTP 503") as caught:
        await fetch(site.url, guard=HERE)
    assert caught.value.retry_after == "30"


async def test_compressed_text_is_read(web: Web, site: Running) -> None:
    web.pages["/"] = 200, {"content-type": "text/html; charset=latin-1", "content-encoding": "gzip"}, bomb(50_000)
    page = await fetch(site.url, guard=HERE, limits=SMALL)
    assert (page.content_type, page.charset, len(page.body)) == ("text/html", "latin-1", 50_000)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Of ``news.test``, signed by itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "news.test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("news.test")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "news.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


async def test_a_certificate_must_be_of_the_name_that_was_asked_for(
    web: Web, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.pages["/"] = 200, TEXT, b"news"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    point(monkeypatch, "news.test", ["127.0.0.1"])
    with running(lambda: web.app, certificate=certificate) as site:
        assert (await fetch(f"https://news.test:{site.port}/", guard=HERE)).body == b"news"
        with pytest.raises(Failed, match="CERTIFICATE_VERIFY_FAILED"):
            await fetch(f"https://127.0.0.1:{site.port}/", guard=HERE)


async def test_a_webhook_gets_json_and_a_key(web: Web, site: Running) -> None:
    web.pages["/hook"] = 204, {}, b""
    await post(f"{site.url}/hook", {"answer": 42}, key="k1", guard=HERE)
    method, path, headers, body = web.asked[0]
    assert (method, path, headers["idempotency-key"], body) == ("POST", "/hook", "k1", {"answer": 42})


async def test_a_webhook_is_not_looked_for_elsewhere(web: Web, site: Running) -> None:
    web.pages["/hook"] = 307, {"location": "/other"}, b""
    with pytest.raises(InvalidInput, match="answered with a redirect"):
        await post(f"{site.url}/hook", {}, key="k1", guard=HERE)
    with pytest.raises(Forbidden):
        await post(f"{site.url}/hook", {}, key="k1", guard=Guard())
    assert len(web.asked) == 1


@pytest.mark.parametrize("entry", ["", "http://wiki.internal", "10.0.0.0/33", "10.0.0.1/8", "a b"])
def test_a_permission_that_means_nothing_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="LONGSHIFT_FETCH_ALLOW"):
        Guard([entry])
