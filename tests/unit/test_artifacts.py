"""What every artifact store does: one suite, run over a folder and over S3."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from longshift.artifacts import ArtifactStore, object_key, open_store, read_verified, spool
from longshift.artifacts.serving import ANY_TYPE, passive
from longshift.errors import ArtifactCorrupt, InvalidInput, LongshiftError, NotFound, Unavailable
from tests.support.object_store import ObjectServer

MIB = 1024 * 1024
BINARY = "application/octet-stream"
SECRET = "do-not-show-this-secret"
NUMBERS = count()


@pytest.fixture(scope="module")
def credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", SECRET)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


@pytest.fixture(scope="module")
def server(credentials: None) -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        yield server


@dataclass(frozen=True)
class Place:
    """Where a test's objects are: a URL, a way to make it unreachable, and what lies there besides whole objects."""

    url: str
    break_down: Callable[[], None]
    leftovers: Callable[[], list[str]]

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[ArtifactStore]:
        limit = timedelta(seconds=1)
        store = open_store(self.url, threads=4, connect_timeout=limit, read_timeout=limit, attempts=1)
        try:
            yield store
        finally:
            await store.close()


def in_folder(root: Path) -> Place:
    def leftovers() -> list[str]:
        return [path.name for path in (root / ".incoming").iterdir()]

    return Place(root.as_uri(), lambda: shutil.rmtree(root), leftovers)


def in_s3(server: ObjectServer) -> Place:
    def leftovers() -> list[str]:
        uploads = server.client.list_multipart_uploads(Bucket="longshift-test").get("Uploads", [])
        return [upload["Key"] for upload in uploads]

    return Place(server.url(f"t{next(NUMBERS)}"), server.kill, leftovers)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return in_folder(tmp_path / "store") if request.param == "folder" else in_s3(request.getfixturevalue("server"))


@pytest.fixture(params=["folder", "s3"])
def mortal_place(request: pytest.FixtureRequest, tmp_path: Path, credentials: None) -> Iterator[Place]:
    """A place of this test's own, to be broken."""
    if request.param == "folder":
        yield in_folder(tmp_path / "store")
        return
    with ObjectServer() as server:
        yield in_s3(server)


@pytest.fixture
async def store(place: Place) -> AsyncIterator[ArtifactStore]:
    async with place.opened() as store:
        yield store


async def pieces(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def failing(good: int) -> AsyncIterator[bytes]:
    for _ in range(good):
        yield bytes(MIB)
    raise RuntimeError("the client hung up")


async def collect(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def test_an_object_comes_back_as_it_was_put(store: ArtifactStore) -> None:
    await store.put("a/b", b"\x00one\xff", content_type=BINARY)

    assert await store.get("a/b") == b"\x00one\xff"
    assert await collect(store.stream("a/b")) == b"\x00one\xff"


async def test_an_empty_object_is_an_object(store: ArtifactStore) -> None:
    await store.put("empty", b"", size=0, content_type=BINARY)
    await store.put("nothing", pieces(), content_type=BINARY)

    assert await store.get("empty") == b""
    assert await collect(store.stream("empty")) == b""
    assert await collect(store.stream("nothing", start=3)) == b""


async def test_twenty_megabytes_pass_with_flat_memory(store: ArtifactStore) -> None:
    async def source() -> AsyncIterator[bytes]:
        for number in range(20):
            yield bytes([number]) * MIB

    await store.put("warm-up", b"", content_type=BINARY)
    tracemalloc.start()
    try:
        await store.put("big", source(), content_type=BINARY)
        size = 0
        async for chunk in store.stream("big"):
            assert chunk == bytes([size // MIB]) * len(chunk)
            size += len(chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert size == 20 * MIB
    assert peak < 10 * MIB  # one part of an upload (5 MiB) and what goes with it


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.binary(max_size=16), start=st.integers(0, 20), length=st.none() | st.integers(0, 20))
@example(data=b"0123456789", start=2, length=3)
@example(data=b"0123456789", start=0, length=1)
@example(data=b"0123456789", start=9, length=5)
@example(data=b"0123456789", start=10, length=None)
async def test_a_range_is_the_slice_of_what_was_put(
    store: ArtifactStore, data: bytes, start: int, length: int | None
) -> None:
    end = None if length is None else start + length
    await store.put("ranged", data, content_type=BINARY)

    assert await store.get("ranged") == data
    assert await collect(store.stream("ranged", start=start, end=end)) == data[start:end]


@pytest.mark.parametrize(("start", "end"), [(-1, None), (5, 4), (0, -1)])
async def test_what_is_no_range_is_refused(store: ArtifactStore, start: int, end: int | None) -> None:
    with pytest.raises(InvalidInput):
        await collect(store.stream("a", start=start, end=end))


async def test_a_reader_may_go_on_from_where_it_stopped(store: ArtifactStore) -> None:
    data = bytes(range(256)) * 4096
    await store.put("long", data, content_type=BINARY)

    stream = store.stream("long")
    first = await anext(stream)
    await stream.aclose()

    assert 0 < len(first) < len(data)
    assert first + await collect(store.stream("long", start=len(first))) == data


async def test_the_same_key_again_replaces_the_object(store: ArtifactStore) -> None:
    await store.put("k", b"longer than the second", content_type=BINARY)
    await store.put("k", b"second", content_type=BINARY)

    assert await store.get("k") == b"second"


async def test_a_key_may_lie_below_another(store: ArtifactStore) -> None:
    await store.put("a", b"1", content_type=BINARY)
    await store.put("a/b", b"2", content_type=BINARY)
    await store.delete("a")

    assert await store.get("a/b") == b"2"


async def test_a_missing_object_is_not_found(store: ArtifactStore) -> None:
    for reading in (
        store.get("absent/1"),
        collect(store.stream("absent/1")),
        collect(store.stream("absent/1", start=2, end=2)),
        collect(store.stream("absent/1", start=2, end=5)),
    ):
        with pytest.raises(NotFound, match="absent/1"):
            await reading


async def test_a_deleted_object_is_gone_and_may_be_put_again(store: ArtifactStore) -> None:
    await store.put("t/x/1", b"1", content_type=BINARY)
    await store.delete("t/x/1")
    await store.delete("t/x/1")
    await store.delete("never/was")

    with pytest.raises(NotFound):
        await store.get("t/x/1")
    await store.put("t/x/1", b"2", content_type=BINARY)
    assert await store.get("t/x/1") == b"2"


async def test_readers_during_concurrent_puts_see_one_whole_object(store: ArtifactStore, place: Place) -> None:
    bodies = [bytes([n]) * MIB for n in range(8)]
    await store.put("k", bodies[0], content_type=BINARY)

    puts = asyncio.gather(*(store.put("k", pieces(body), content_type=BINARY) for body in bodies))
    seen = [await store.get("k")]
    while not puts.done():
        seen.append(await store.get("k"))
    await puts

    assert all(data in bodies for data in (*seen, await store.get("k")))
    assert place.leftovers() == []


async def test_puts_and_deletes_of_neighbours_do_not_disturb_each_other(store: ArtifactStore) -> None:
    async def come_and_go(key: str) -> None:
        for _ in range(10):
            await store.put(key, b"x", content_type=BINARY)
            await store.delete(key)

    await asyncio.gather(*(come_and_go(f"t/shared/{n}") for n in range(4)))
    await store.put("t/shared/9", b"y", content_type=BINARY)

    assert await store.get("t/shared/9") == b"y"


@pytest.mark.parametrize("good", [0, 1, 12])
async def test_an_upload_that_fails_half_way_leaves_nothing(store: ArtifactStore, place: Place, good: int) -> None:
    with pytest.raises(RuntimeError, match="hung up"):
        await store.put("half", failing(good), content_type=BINARY)

    with pytest.raises(NotFound):
        await store.get("half")
    assert place.leftovers() == []


@pytest.mark.parametrize("size", [3, 5])
async def test_an_upload_of_another_size_than_announced_leaves_nothing(store: ArtifactStore, size: int) -> None:
    for data in (b"four", pieces(b"fo", b"ur")):
        with pytest.raises(InvalidInput):
            await store.put("k", data, size=size, content_type=BINARY)

    with pytest.raises(NotFound):
        await store.get("k")


async def test_a_spooled_upload_can_be_put_twice(store: ArtifactStore) -> None:
    data = bytes(range(256)) * 4 * 6 * 1024  # more than a part
    with await spool(pieces(data), limit=len(data)) as upload:
        await asyncio.gather(
            store.put("one", upload, size=upload.size, content_type=BINARY),
            store.put("two", upload, content_type=BINARY),
        )

    assert await store.get("one") == await store.get("two") == data


async def test_a_cancelled_put_leaves_all_or_nothing(store: ArtifactStore, place: Place) -> None:
    data = bytes(12 * MIB)
    for delay in (0.0, 0.005, 0.02):
        put = asyncio.create_task(store.put("k", data, content_type=BINARY))
        await asyncio.wait({put}, timeout=delay)
        put.cancel()
        await asyncio.gather(put, return_exceptions=True)
    await store.close()

    assert place.leftovers() == []
    async with place.opened() as again:
        try:
            assert len(await again.get("k")) == len(data)
        except NotFound:
            pass


async def test_a_reader_may_be_cancelled_at_any_point(store: ArtifactStore) -> None:
    await store.put("k", bytes(4 * MIB), content_type=BINARY)
    for delay in (0.0, 0.001, 0.003, 0.01):
        reading = asyncio.create_task(collect(store.stream("k")))
        await asyncio.wait({reading}, timeout=delay)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    assert len(await store.get("k")) == 4 * MIB


async def test_a_verified_read_gives_only_what_was_promised(store: ArtifactStore) -> None:
    data = bytes(600 * 1024)
    promised = hashlib.sha256(data).hexdigest()
    key = object_key(UUID(int=7), promised, 1)
    await store.put(key, data, content_type=BINARY)
    assert await read_verified(store, key, sha256=promised) == data

    await store.put(key, b"tampered", content_type=BINARY)
    with pytest.raises(ArtifactCorrupt, match=promised):
        await read_verified(store, key, sha256=promised)


@pytest.mark.parametrize(
    "key",
    ["", "/", "/etc/passwd", "../x", "a/../b", "a/./b", "a//b", "a/", ".incoming/x", "A", "a\\b", "a\n", "é", "a@"],
)
async def test_a_key_that_could_leave_its_place_is_refused(store: ArtifactStore, key: str) -> None:
    for call in (
        store.put(key, b"", content_type=BINARY),
        store.get(key),
        store.delete(key),
        collect(store.stream(key)),
    ):
        with pytest.raises(InvalidInput):
            await call


async def test_a_store_that_is_there_passes_its_check(store: ArtifactStore) -> None:
    await asyncio.gather(store.check(), store.check())
    await store.check()


async def test_a_closed_store_is_unavailable(store: ArtifactStore) -> None:
    await store.close()
    await store.close()

    with pytest.raises(Unavailable, match="closed"):
        await store.get("k")
    with pytest.raises(Unavailable, match="closed"):
        await store.check()


async def test_a_store_that_is_gone_is_unavailable_not_empty(mortal_place: Place) -> None:
    async with mortal_place.opened() as store:
        await store.put("k", b"1", content_type=BINARY)
        mortal_place.break_down()

        for call in (
            store.get("k"),
            store.put("k", b"2", content_type=BINARY),
            store.put("k", bytes(6 * MIB), content_type=BINARY),
            collect(store.stream("k")),
            store.delete("k"),
            store.check(),
        ):
            with pytest.raises(LongshiftError) as caught:
                await call
            assert type(caught.value) is Unavailable
            assert caught.value.__suppress_context__ or caught.value.__context__ is None
            assert SECRET not in str(caught.value)


async def test_a_signed_url_gives_a_download_to_anybody_and_a_folder_has_none(
    store: ArtifactStore, place: Place
) -> None:
    name, hour = 'rapport "é"\r\nX-Evil: 1.html', timedelta(hours=1)
    await store.put("t/x/1", b"<script>", content_type="text/html")
    page = await store.presign("t/x/1", expires_in=hour, name=name, content_type="text/html")
    text = await store.presign("t/x/1", expires_in=hour, name="a", content_type="text/plain; charset=utf-8")
    for wrong in (timedelta(0), timedelta(days=8)):
        with pytest.raises(InvalidInput, match="7 days"):
            await store.presign("t/x/1", expires_in=wrong, name=name, content_type="text/html")

    if place.url.startswith("file:"):
        assert (page, text) == (None, None)
        return
    assert page is not None
    assert text is not None
    assert SECRET not in page.replace(f"Credential={SECRET}", "")  # which is the key's id, the same word here
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(page)
        assert (await client.get(text)).headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.content == b"<script>"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment; filename*=UTF-8''rapport%20%22%C3%A9%22%0D%0A")
    assert "x-evil" not in answer.headers


@pytest.mark.parametrize(
    ("kind", "safe"),
    [
        ("text/html", False),
        ("image/svg+xml", False),
        ("application/xhtml+xml", False),
        ("text/javascript", False),
        ("TEXT/HTML; charset=utf-8", False),
        ("image/png", True),
        ("application/pdf", True),
        ("Text/Plain; charset=utf-8", True),
    ],
)
def test_a_type_that_a_browser_may_run_is_not_repeated(kind: str, safe: bool) -> None:
    assert passive(kind) == (kind if safe else ANY_TYPE)
