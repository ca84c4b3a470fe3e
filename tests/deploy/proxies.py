"""nginx as `docker/nginx/` has it, in front of processes of this machine.

What differs from the files is what cannot be the same here: addresses, paths, and the `resolve` of names, which Debian's
nginx is too old for. Docker's name server answers `api` with every replica; here each replica becomes a line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from longshift.embedded import Guardian
from longshift.testing.waiting import wait_until_sync
from tests.support.fleet_worker import free_port
from tests.support.programs import program

FILES = Path(__file__).parents[2] / "docker" / "nginx"
Policy = Literal["least_conn", "round_robin", "weighted"]
_BLOCK = re.compile(r"^#?upstream api \{\n(?:.*\n)*?#?\}\n", re.MULTILINE)
_SERVER = re.compile(r"^( *server )(\S+):8420 resolve( .*;)$", re.MULTILINE)
_NOBODY = 65534


def blocks() -> dict[Policy, str]:
    """The three blocks of upstream.conf, without the ``#`` of those that are not in force."""
    found = [
        re.sub(r"^#", "", block, flags=re.MULTILINE) for block in _BLOCK.findall((FILES / "upstream.conf").read_text())
    ]
    named: dict[Policy, str] = {}
    for block in found:
        name: Policy = "least_conn" if "least_conn" in block else "weighted" if "weight=" in block else "round_robin"
        named[name] = block
    assert len(found) == len(named) == 3
    return named


def upstream(policy: Policy, replicas: Sequence[str]) -> str:
    """The block of ``policy`` for ``replicas`` (``host:port``); by weight: the first for ``longshift-api-1`` and so on."""

    def expand(found: re.Match[str]) -> str:
        before, name, rest = found.groups()
        number = re.search(r"-(\d+)$", name)
        chosen = replicas if number is None else [replicas[int(number[1]) - 1]]
        return "\n".join(f"{before}{replica}{rest}" for replica in chosen)

    text, count = _SERVER.subn(expand, blocks()[policy])
    assert count == (3 if policy == "weighted" else 1)
    return text


@dataclass(frozen=True)
class Request:
    """A line of the access log; ``asked``: the replicas in their order, each with the bytes that it was sent."""

    method: str
    path: str
    status: int
    asked: tuple[tuple[str, int], ...]


class Proxy:
    """A running nginx."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self._log = folder / "access.log"
        self._seen = 0

    def requests(self, count: int) -> list[Request]:
        """The next ``count`` requests that have ended, in the order of their ends; waits for them."""

        def lines() -> list[str] | None:
            found = self._log.read_text().splitlines(keepends=True)[self._seen :]
            return found if sum(line.endswith("\n") for line in found) >= count else None

        found = wait_until_sync(lines, description=f"{count} requests are in the log of nginx")
        assert found is not None
        self._seen += count
        return [_request(json.loads(line)) for line in found[:count]]

    def shares(self, count: int) -> Counter[str]:
        """How many of the next ``count`` requests each replica has answered."""
        return Counter(request.asked[-1][0] for request in self.requests(count))


def _request(line: dict[str, Any]) -> Request:
    names = [name for name in re.split(r"[, ]+", line["upstream"]) if name]
    sent = [0 if given == "-" else int(given) for given in re.split(r"[, ]+", line["sent"]) if given]
    return Request(line["method"], line["path"], line["status"], tuple(zip(names, sent, strict=True)))


@contextmanager
def proxy(policy: Policy, replicas: Sequence[str], *, guardian: Guardian) -> Iterator[Proxy]:
    """nginx with ``policy``, by a user without rights if we are root, in a folder of its own."""
    binary, port = program("nginx"), free_port()
    folder = Path(tempfile.mkdtemp(prefix="longshift-nginx-"))  # not tmp_path: that is closed to other users
    try:
        (folder / "nginx.conf").write_text(_config(folder, port))
        (folder / "upstream.conf").write_text(upstream(policy, replicas))
        (folder / "access.log").touch()
        user = _NOBODY if os.geteuid() == 0 else None
        if user is not None:
            for path in (folder, *folder.iterdir()):
                os.chown(path, _NOBODY, _NOBODY)
        command = [str(binary), "-e", f"{folder}/error.log", "-p", str(folder), "-c", f"{folder}/nginx.conf"]
        groups = None if user is None else list[int]()
        process = subprocess.Popen([*command, "-g", "daemon off;"], user=user, group=user, extra_groups=groups)
        guardian.watch(process.pid)
        try:
            yield _ready(Proxy(folder, f"http://127.0.0.1:{port}"), process, folder)
        finally:
            process.terminate()
            process.wait(10)
            guardian.forget(process.pid)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _config(folder: Path, port: int) -> str:
    text = (FILES / "nginx.conf").read_text()
    places = {
        "/tmp/": f"{folder}/",
        "listen 8080;": f"listen 127.0.0.1:{port};",
        "/dev/stdout": f"{folder}/access.log",
        "/dev/stderr": f"{folder}/error.log",
    }
    for place, here in places.items():
        assert place in text
        text = text.replace(place, here)
    return text


def _ready(proxy: Proxy, process: subprocess.Popen[bytes], folder: Path) -> Proxy:
    def answers() -> bool:
        assert process.poll() is None, (folder / "error.log").read_text()
        try:
            return httpx.get(f"{proxy.url}/metrics").status_code == 404  # which nginx says by itself
        except httpx.TransportError:
            return False

    wait_until_sync(answers, description="nginx answers")
    proxy.requests(1)
    return proxy
