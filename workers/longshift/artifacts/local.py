"""The cold tier in a folder: for one machine, or for several that share a POSIX file system.

    <root>/.incoming/<random>      being written; replaced into place when it is whole and on disk
    <root>/<key>@                  an object; the "@", which no key contains, lets "a" and "a/b" both be objects

``.incoming`` also marks the root: without it the folder is not there (an unmounted volume), which must read as
``Unavailable`` and never as ``NotFound``.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO

from longshift.artifacts.spool import CHUNK
from longshift.clock import SYSTEM, Clock
from longshift.errors import ConfigError, LongshiftError, NotFound, Unavailable

log = logging.getLogger(__name__)

ABANDONED = timedelta(days=1)
"""A file in ``.incoming`` this old was left by a process that died."""

_RACES = 100  # a put meets a delete that removes empty folders; each round needs a further delete to lose


class LocalReader:
    """Reads at most ``length`` bytes (None: to the end) of a file."""

    def __init__(self, file: IO[bytes], *, length: int | None) -> None:
        self._file = file
        self._left = length

    def read(self, size: int | None, /) -> bytes:
        wanted = min((n for n in (size, self._left) if n is not None), default=-1)
        try:
            data = self._file.read(wanted)
        except OSError as error:
            raise Unavailable(f"cannot read on in the artifact folder: {error.strerror}") from None
        if self._left is not None:
            self._left -= len(data)
        return data

    def close(self) -> None:
        self._file.close()


class LocalBackend:
    """Creates ``root`` if need be. Files are private to the user (mode 0600); their content type is not kept.

    Raises:
        ConfigError: ``root`` cannot be created or is no folder.
    """

    def __init__(self, root: Path, *, clock: Clock = SYSTEM) -> None:
        self._root = root
        self._incoming = root / ".incoming"
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
            self._discard_abandoned(clock)
        except OSError as error:
            raise ConfigError(
                f"LONGSHIFT_ARTIFACTS_URL: cannot use the folder {str(root)!r}: {error.strerror}"
            ) from None

    def put(self, key: str, source: IO[bytes], *, size: int, content_type: str) -> None:
        with self._errors("store", key):
            descriptor, name = tempfile.mkstemp(dir=self._incoming)
            temporary = Path(name)
            try:
                with os.fdopen(descriptor, "wb") as target:
                    shutil.copyfileobj(source, target, CHUNK)
                    target.flush()
                    os.fsync(target.fileno())
                self._publish(temporary, self._path(key))
            finally:
                temporary.unlink(missing_ok=True)

    def open(self, key: str, *, start: int, end: int | None) -> LocalReader:
        with self._errors("read", key):
            file = self._path(key).open("rb")
        file.seek(start)  # of a regular file: cannot fail
        return LocalReader(file, length=None if end is None else end - start)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            with self._errors("delete", key):
                path.unlink()
                _sync(path.parent)
                self._prune(path.parent)
        except NotFound:
            pass

    def presign(self, key: str, *, expires_in: timedelta, headers: Mapping[str, str]) -> None:
        """Nobody serves a folder."""

    def check(self) -> None:
        if not os.access(self._incoming, os.W_OK | os.X_OK):
            raise Unavailable(f"the artifact folder {str(self._root)!r} is missing or cannot be written")

    def close(self) -> None:
        """Nothing is held between two calls."""

    def _path(self, key: str) -> Path:
        return self._root / f"{key}@"

    def _publish(self, temporary: Path, target: Path) -> None:
        """Make the file visible under its name, and the name durable: a crash may lose neither after this returns."""
        for _ in range(_RACES):
            try:
                self._make_folder(target.parent)
                temporary.replace(target)
                _sync(target.parent)
            except (
                FileNotFoundError
            ):  # delete() removed the folder meanwhile; without its marker the root itself is gone
                if not self._incoming.exists():
                    raise
                continue
            return
        raise Unavailable("a folder of the artifact store is removed as often as it is made: try again")

    def _make_folder(self, folder: Path) -> None:
        """Syncs folders that exist, too: whoever made them may not have got that far."""
        above = self._root
        for part in folder.relative_to(self._root).parts:
            try:
                (above / part).mkdir()
            except FileExistsError:
                pass  # not exist_ok: that looks again, and complains of a folder that delete() removed in between
            _sync(above)
            above /= part

    def _prune(self, folder: Path) -> None:
        """Remove folders that have become empty, or every collected object would leave some behind."""
        while folder != self._root:
            try:
                folder.rmdir()
            except OSError:
                return  # not empty, or another delete was here first
            folder = folder.parent

    def _discard_abandoned(self, clock: Clock) -> None:
        oldest = (clock.now() - ABANDONED).timestamp()
        for path in self._incoming.iterdir():
            try:
                if path.stat().st_mtime < oldest:
                    path.unlink()
                    log.info("abandoned upload removed", extra={"file": path.name})
            except FileNotFoundError:
                continue  # it was finished, or another process removes it

    @contextmanager
    def _errors(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._meaning(error, doing, key) from None

    def _meaning(self, error: OSError, doing: str, key: str) -> LongshiftError:
        if isinstance(error, FileNotFoundError) and self._incoming.exists():
            return NotFound(f"there is no artifact {key!r}")
        return Unavailable(f"cannot {doing} artifact {key!r} in the folder {str(self._root)!r}: {error.strerror}")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
