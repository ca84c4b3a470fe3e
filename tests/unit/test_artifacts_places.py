"""The artifact stores where they differ, the URL that chooses one, and the spooling of uploads."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshift.artifacts import ArtifactStore, Digest, object_key, open_store, spool
from longshift.artifacts.local import ABANDONED, LocalBackend, LocalReader
from longshift.artifacts.store import ThreadedStore, check_key
from longshift.artifacts.threads import Lent
from longshift.clock import Clock
from longshift.errors import ConfigError, InvalidInput, Unavailable
from longshift.testing.waiting import wait_until
from tests.support.object_store import BUCKET, ObjectServer

SECRET = "do-not-show-this-secret"
SHORT = timedelta(milliseconds=300)


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return monkeypatch


@pytest.fixture
def silent_endpoint() -> Iterator[str]:
    """Connections are accepted by the kernel and never answered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def impatient(url: str) -> ArtifactStore:
    return open_store(url, threads=1, connect_timeout=SHORT, read_timeout=SHORT, attempts=1)


async def pieces(size: int, *, count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * size


# the URL


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/var/lib/longshift",
        "file://relative/dir",
        "file:relative",
        "file:///dir?x=1",
        "http://bucket/prefix",
        "gs://bucket/prefix",
        "s3://",
        "s3:///prefix",
        "s3://UPPER/prefix",
        "s3://bucket/a/../b",
        "s3://bucket/prefix#part",
        "s3://[bucket/prefix",
    ],
)
def test_a_url_of_another_form_is_refused_naming_both_forms(url: str) -> None:
    with pytest.raises(ConfigError, match=r"s3://bucket/prefix.* or file:///dir"):
        open_store(url)


@pytest.mark.parametrize(
    "query",
    [
        "acl=public-read",
        "region=",
        "region=a&region=b",
        "region=not%20a%20region",
        "sse=rot13",
        "kms_key_id=k",
        "addressing=sideways",
        "endpoint_url=minio:9000",
        "endpoint_url=http://",
        "endpoint_url=http://h:port",
    ],
)
def test_an_option_that_does_not_fit_is_refused_naming_the_setting(query: str) -> None:
    with pytest.raises(ConfigError, match="LONGSHIFT_ARTIFACTS_URL"):
        open_store(f"s3://bucket/prefix?{query}")


@pytest.mark.parametrize(
    "url",
    [
        f"s3://key:{SECRET}@bucket/prefix",
        f"s3://bucket/prefix?endpoint_url=http://key:{SECRET}@host",
        f"s3://bucket/prefix?aws_secret_access_key={SECRET}",
        f"s4://key:{SECRET}@bucket",
    ],
)
def test_credentials_in_the_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(url)

    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_an_unknown_aws_profile_is_a_matter_of_settings(aws: pytest.MonkeyPatch, tmp_path: Path) -> None:
    aws.setenv("AWS_PROFILE", "nobody")
    aws.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))

    with pytest.raises(ConfigError, match="ProfileNotFound"):
        open_store("s3://bucket/prefix")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(ConfigError, match="LONGSHIFT_ARTIFACTS_URL"):
        open_store((tmp_path / "file" / "store").as_uri())


def test_boto3_is_imported_only_for_s3(tmp_path: Path) -> None:
    script = (
        "import sys; from longshift.artifacts import open_store; open_store(sys.argv[1])\n"
        "assert not {'boto3', 'botocore', 'urllib3'} & set(sys.modules)\n"
        "open_store('s3://bucket/prefix?region=eu-central-1'); assert 'boto3' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path.as_uri()], check=True, timeout=60)


# keys


def test_an_object_key_is_tenant_hash_and_generation() -> None:
    sha256 = hashlib.sha256(b"").hexdigest()

    assert object_key(UUID(int=10), sha256, 2) == f"{'0' * 31}a/{sha256}/2"
    check_key(object_key(UUID(int=10), sha256, 2))
    for wrong in (sha256.upper(), sha256[1:], f"{sha256}\n", "../" + sha256[3:]):
        with pytest.raises(InvalidInput):
            object_key(UUID(int=10), wrong, 0)


@given(st.text(alphabet="a./\\@~\0\n-", max_size=12))
def test_a_key_is_refused_or_stays_below_its_root(key: str) -> None:
    try:
        check_key(key)
    except InvalidInput:
        return
    path = os.path.normpath(f"/srv/store/{key}@")
    assert path == f"/srv/store/{key}@"
    assert not path.startswith("/srv/store/.")


# spooling


@pytest.mark.parametrize(("size", "count"), [(0, 0), (0, 3), (1, 5), (1000, 3000), (3_000_000, 2)])
async def test_a_spooled_upload_has_its_size_hash_and_bytes(size: int, count: int) -> None:
    whole = b"x" * size * count
    with await spool(pieces(size, count=count), limit=len(whole)) as upload:
        assert upload.size == len(whole)
        assert upload.sha256 == hashlib.sha256(whole).hexdigest()
        assert b"".join([chunk async for chunk in upload]) == whole


async def test_an_upload_above_the_limit_is_refused_before_it_is_read_whole() -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1000
            yield bytes(1000)

    with pytest.raises(InvalidInput, match="10000"):
        await spool(endless(), limit=10_000)
    assert read == 11_000


def test_a_digest_counts_and_hashes() -> None:
    digest = Digest()
    digest.update(b"ab")
    digest.update(b"c")

    assert (digest.size, digest.sha256) == (3, hashlib.sha256(b"abc").hexdigest())


def test_a_file_closed_under_its_user_closes_when_the_user_leaves() -> None:
    file = io.BytesIO(b"1")
    lent = Lent(file)

    with lent.use() as used:
        lent.close()
        assert used.read() == b"1"
    assert file.closed
    with pytest.raises(ValueError, match="close"), lent.use():
        pass


# the folder


def test_an_upload_abandoned_by_a_dead_process_is_removed_at_the_next_start(tmp_path: Path) -> None:
    LocalBackend(tmp_path)
    abandoned = tmp_path / ".incoming" / "left"
    abandoned.write_bytes(b"half")

    LocalBackend(tmp_path)
    assert abandoned.exists()
    LocalBackend(tmp_path, clock=Clock(now=lambda: datetime.now(UTC) + ABANDONED + timedelta(minutes=1)))
    assert not abandoned.exists()


async def test_deleting_leaves_no_empty_folders(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    await store.put("t/x/1", b"1", content_type="text/plain")
    await store.put("t/y/1", b"1", content_type="text/plain")
    await store.delete("t/x/1")
    await store.close()

    assert [path.name for path in (tmp_path / "t").iterdir()] == ["y"]


# S3


async def test_a_server_that_never_answers_is_unavailable_in_time(silent_endpoint: str) -> None:
    store = impatient(f"s3://bucket/p?region=us-east-1&endpoint_url={silent_endpoint}")

    for call in (store.check(), store.get("k"), store.put("k", b"1", content_type="text/plain"), store.delete("k")):
        with pytest.raises(Unavailable):
            await asyncio.wait_for(call, 10)
    await store.close()


class StuckBackend(LocalBackend):
    """Reads only when it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def open(self, key: str, *, start: int, end: int | None) -> LocalReader:
        self.entered.set()
        assert self.let_go.wait(20)
        return super().open(key, start=start, end=end)


async def test_a_busy_pool_does_not_make_the_store_unreachable(tmp_path: Path) -> None:
    backend = StuckBackend(tmp_path)
    store = ThreadedStore(backend, threads=1, probe_timeout=timedelta(seconds=10))
    await store.put("k", b"1", content_type="text/plain")
    reading = asyncio.create_task(store.get("k"))
    await wait_until(backend.entered.is_set, description="the only thread is busy")

    await store.check()

    assert not reading.done()
    backend.let_go.set()
    assert await reading == b"1"
    await store.close()


async def test_what_a_cancelled_reader_was_opening_is_closed(tmp_path: Path) -> None:
    backend = StuckBackend(tmp_path)
    store = ThreadedStore(backend, threads=1, probe_timeout=SHORT)
    await store.put("k", b"1", content_type="text/plain")
    stream = store.stream("k")
    reading = asyncio.ensure_future(anext(stream))
    await wait_until(backend.entered.is_set, description="the object is being opened")
    reading.cancel()
    await asyncio.wait({reading})

    backend.let_go.set()
    await store.close()  # a file left open would be a ResourceWarning, and warnings are errors here
    gc.collect()


async def test_missing_credentials_are_named_as_such(aws: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        aws.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        aws.setenv(name, str(tmp_path / "none"))
    store = impatient("s3://bucket/p?region=us-east-1&endpoint_url=http://127.0.0.1:1")

    with pytest.raises(Unavailable, match="NoCredentialsError; check the credentials"):
        await store.get("k")
    await store.close()


async def test_s3_keeps_type_encryption_and_prefix_and_names_a_missing_bucket() -> None:
    with ObjectServer() as server:
        store = impatient(server.url("some/prefix") + "&sse=AES256")
        await store.put("k", b"1", content_type="text/plain")
        await store.put("big", bytes(6 * 1024 * 1024), content_type="text/plain")
        await store.close()
        for key in ("some/prefix/k", "some/prefix/big"):
            head = server.client.head_object(Bucket=BUCKET, Key=key)
            assert (head["ContentType"], head["ServerSideEncryption"]) == ("text/plain", "AES256")

        nowhere = impatient(server.url("p").replace(BUCKET, "no-such-bucket"))
        with pytest.raises(Unavailable, match="create the bucket"):
            await nowhere.check()
        with pytest.raises(Unavailable, match="NoSuchBucket; create the bucket"):
            await nowhere.get("k")
        await nowhere.close()
