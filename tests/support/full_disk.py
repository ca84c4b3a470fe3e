"""A Postgres that has no space left: by a limit on the size of its files, or on a small file system of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
from psycopg import sql

from longshift.embedded.postgres import _server_account, _unprivileged

FILE_LIMIT = 20 * 1024 * 1024
"""Bytes; more than a segment of the write-ahead log has (16 MiB), which must still be written."""
SMALL_DISK = 48 * 1024 * 1024

SET_LIMIT = """
import sys
from resource import RLIM_INFINITY, RLIMIT_FSIZE, prlimit
size, *pids = map(int, sys.argv[1:])
for pid in pids:
    most = prlimit(pid, RLIMIT_FSIZE)[1]
    prlimit(pid, RLIMIT_FSIZE, (most if size == RLIM_INFINITY else size, most))
"""
FILL_EVENTS = b"""
INSERT INTO events (session_id, seq, id, epoch, kind, schema_version, payload)
SELECT gen_random_uuid(), 1, gen_random_uuid(), 1, 'filler', 1, to_json(repeat(md5(random()::text), %s))
  FROM generate_series(1, %s)"""
FILL = b"INSERT INTO filler SELECT repeat(md5(random()::text), %s) FROM generate_series(1, %s)"


@contextmanager
def limited_files(pid: int | None, url: str) -> Iterator[str]:
    """No file of the server may grow over ``FILE_LIMIT``, and the table ``events`` has reached it; gives the SQLSTATE.

    The limit holds for all processes of the server that there are, and for those that it starts.
    """
    assert pid is not None, "the server does not run"
    try:
        _limit(pid, FILE_LIMIT)
        yield fill(url, FILL_EVENTS)
    finally:
        _limit(pid, resource.RLIM_INFINITY)


def _limit(pid: int, size: int) -> None:
    """By a process of the server's account: root needs a capability for the processes of others that containers lack."""
    parent = psutil.Process(pid)
    pids = [process.pid for process in (parent, *parent.children(recursive=True))]
    command = _unprivileged([sys.executable, "-I", "-S", "-c", SET_LIMIT, str(size), *map(str, pids)])
    subprocess.run(command, check=True, env={"PATH": os.defpath})


def fill(url: str, statement: bytes) -> str:
    """Insert rows, in the end the smallest, until none fits any more; the SQLSTATE of the refusal."""
    state = ""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        for words, rows in ((40, 1000), (40, 20), (1, 20), (1, 1)):
            try:
                while True:
                    connection.execute(statement, (words, rows))
            except psycopg.Error as error:
                state = error.sqlstate or ""
    return state


def can_mount() -> bool:
    """Whether this process may mount a file system: root in a container often may not."""
    if os.geteuid() != 0:
        return False
    folder = Path("/mnt")
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)
    return done.returncode == 0


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of ``SMALL_DISK`` bytes, for a tablespace."""
    folder.mkdir()
    user, group = _server_account()
    options = f"size={SMALL_DISK},mode=0700,uid={user},gid={group}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def move_to(folder: Path, *, server_url: str, name: str) -> None:
    """Move database ``name`` into a tablespace in ``folder``; its write-ahead log stays where there is space."""
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE TABLESPACE small LOCATION {}").format(sql.Literal(str(folder))))
        connection.execute(sql.SQL("ALTER DATABASE {} SET TABLESPACE small").format(sql.Identifier(name)))
