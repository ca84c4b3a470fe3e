"""An S3 that refuses, is silent, fails, is slow or cuts its answers off."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from urllib.parse import urlsplit

import pytest

from longshift.artifacts import ArtifactStore, open_store, read_verified
from longshift.artifacts.threads import Threads
from longshift.errors import ArtifactCorrupt, Unavailable
from longshift.testing.waiting import wait_until
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.object_store import BUCKET, ObjectServer

SHORT = timedelta(seconds=1)
BINARY = "application/octet-stream"
LARGE = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with ObjectServer() as server:
            yield server


@pytest.fixture
def proxy(server: ObjectServer) -> Iterator[FaultProxy]:
    port = urlsplit(server.endpoint).port
    assert port is not None
    with FaultProxy(port) as proxy:
        yield proxy


@pytest.fixture
async def store(proxy: FaultProxy) -> AsyncIterator[ArtifactStore]:
    url = f"s3://{BUCKET}/faults?region=us-east-1&endpoint_url={proxy.url}"
    store = open_store(url, threads=2, connect_timeout=SHORT, read_timeout=SHORT, attempts=1)
    yield store
    await store.close()


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.SILENT, Fault.UNAVAILABLE, Fault.ERROR])
async def test_a_store_in_trouble_is_unavailable_keeps_nothing_and_serves_again(
    server: ObjectServer, proxy: FaultProxy, store: ArtifactStore, fault: Fault
) -> None:
    key, new = f"{fault}/old", f"{fault}/new"
    await store.put(key, b"old", content_type=BINARY)
    proxy.suffer(fault)

    for call in (store.put(new, b"new", content_type=BINARY), store.get(key), store.delete(key), store.check()):
        with pytest.raises(Unavailable):
            await call
    kept = server.client.list_objects_v2(Bucket=BUCKET, Prefix=f"faults/{fault}")
    assert [entry["Key"] for entry in kept.get("Contents", [])] == [f"faults/{key}"]

    proxy.suffer(Fault.NONE)
    await store.put(new, b"new", content_type=BINARY)
    assert await store.get(key) == b"old"


async def test_an_answer_that_is_cut_off_is_no_answer_and_not_a_corrupt_one(
    proxy: FaultProxy, store: ArtifactStore
) -> None:
    await store.put("large", LARGE, content_type=BINARY)
    proxy.suffer(Fault.CUT)
    with pytest.raises(Unavailable):
        await read_verified(store, "large", sha256=hashlib.sha256(LARGE).hexdigest())
    with pytest.raises(Unavailable):
        b"".join([chunk async for chunk in store.stream("large")])
    proxy.suffer(Fault.NONE)
    with pytest.raises(ArtifactCorrupt):
        await read_verified(store, "large", sha256="0" * 64)


async def test_a_slow_store_takes_its_time_and_the_event_loop_goes_on(proxy: FaultProxy, store: ArtifactStore) -> None:
    await store.put("large", LARGE, content_type=BINARY)
    proxy.suffer(Fault.SLOW)
    reading = asyncio.create_task(store.get("large"))
    turns_of_the_loop = 0
    while not reading.done():
        await asyncio.sleep(0)
        turns_of_the_loop += 1
    assert await reading == LARGE
    assert turns_of_the_loop > 100


async def test_work_for_which_no_thread_becomes_free_is_refused_and_the_rest_is_done() -> None:
    threads, begun, go = Threads(1, within=timedelta(milliseconds=50)), threading.Event(), threading.Event()
    done: list[str] = []

    def slow() -> None:
        begun.set()
        go.wait()

    working = asyncio.create_task(threads.run(slow))
    await wait_until(begun.is_set, description="it has begun")
    with pytest.raises(Unavailable):
        await threads.run(lambda: done.append("in vain"))
    assert not working.done()
    go.set()
    await working
    await threads.run(lambda: done.append("after"))
    await threads.close()
    assert done == ["after"]
