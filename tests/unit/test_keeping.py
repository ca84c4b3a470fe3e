"""What a turn keeps in the cold tier, however it comes: bytes, files, streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from longshift import Retry, Turn, agent, step
from longshift.artifacts.spool import CHUNK
from longshift.errors import InvalidInput, StepFailed
from longshift.model import TurnStatus
from longshift.testing import crash_points, run

LARGE = bytes(range(256)) * (3 * CHUNK // 256) + b"end"
READS: list[str] = []


async def source(data: bytes = LARGE, *, fails: bool = False) -> AsyncIterator[bytes]:
    READS.append("source")
    for first in range(0, len(data), 1000):
        yield data[first : first + 1000]
    if fails:
        raise ConnectionError("the other side hung up")


@agent("keeper")
async def keeper(turn: Turn, path: str) -> list[str]:
    of_file = await turn.artifact("file", Path(path), content_type="image/png")
    of_source = await turn.artifact("source", source())
    of_bytes = await turn.artifact("bytes", LARGE)
    parts = [chunk async for chunk in turn.stream(of_source)]
    assert len(parts) > 1
    assert b"".join(parts) == await turn.read(of_file) == LARGE
    assert b"".join([chunk async for chunk in turn.stream(of_bytes.id, start=5, end=8)]) == LARGE[5:8]
    assert [chunk async for chunk in turn.stream(of_bytes, start=len(LARGE))] == []
    assert of_file.content_type == "image/png"
    return [of_file.sha256, of_source.sha256, of_bytes.sha256]


def test_a_file_and_a_stream_are_kept_as_their_bytes_are(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(LARGE)

    result = run(keeper, str(tmp_path / "f"))

    assert len(set(result.output)) == 1
    assert result.artifacts["source"] == result.artifacts["file"] == LARGE


def test_whatever_is_recorded_is_not_read_again_wherever_the_worker_dies(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(LARGE)
    for point in crash_points(keeper, str(tmp_path / "f")):
        READS.clear()
        assert run(keeper, str(tmp_path / "f"), crash_after=point).status is TurnStatus.SUCCEEDED
        assert READS == ["source"]


def test_a_source_that_fails_is_not_taken_for_one_that_has_ended() -> None:
    @agent("unlucky")
    async def unlucky(turn: Turn, _: None) -> None:
        await turn.artifact("half", source(fails=True))

    READS.clear()
    result = run(unlucky, None)

    assert result.error is not None
    assert "its source failed, ConnectionError: the other side hung up" in str(result.error["message"])
    assert (READS, dict(result.artifacts)) == (["source"], {})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = run(keeper, str(tmp_path / "absent"))
    assert "No such file" in str(result.error)
    assert "absent" in str(result.error)


def test_inside_a_step_a_source_that_fails_is_tried_again_with_the_step() -> None:
    tries: list[int] = []

    @step(retry=Retry(attempts=2, on=(ConnectionError,)))
    async def fetch(turn: Turn) -> str:
        tries.append(1)
        return (await turn.artifact("page", source(b"page", fails=len(tries) == 1))).sha256

    @agent("fetcher")
    async def fetcher(turn: Turn, _: None) -> str:
        return await fetch(turn)

    assert len(run(fetcher, None).output) == 64
    assert len(tries) == 2


def test_what_is_no_range_is_refused() -> None:
    @agent("reader")
    async def reader(turn: Turn, _: None) -> None:
        page = await turn.artifact("page", "text")
        with pytest.raises(InvalidInput):
            await anext(turn.stream(page, start=3, end=2))
        with pytest.raises(StepFailed):
            await turn.artifact("never", source(fails=True))

    assert run(reader, None).status is TurnStatus.SUCCEEDED
