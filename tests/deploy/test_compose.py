"""The compose file, without Docker: its schema, and that everything in it fits the code and each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
import yaml
from typer.main import get_command

from longshift import underway, worker
from longshift.artifacts.location import _s3_location, _split
from longshift.cli.app import app
from longshift.config import Config
from longshift_api.server import GRACE
from tests.deploy import images, proxies
from tests.deploy.images import ROOT

DOCKER = ROOT / "docker"
OURS = ("migrate", "api", "worker", "exporter")
GIVEN = {"LONGSHIFT_API_KEY": "lsk_only_for_this_test_0123456789"}
"""Variables that have no default."""
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)\}")
_UNITS = {"s": 1, "m": 60}


def compose() -> dict[str, Any]:
    """The file as Compose reads it when nothing is set that has a default."""
    read: dict[str, Any] = _filled(yaml.safe_load((DOCKER / "compose.yaml").read_text()))
    return read


def _filled(value: Any) -> Any:
    match value:
        case str():
            return _VARIABLE.sub(lambda found: GIVEN.get(found[1], found[2]) or "", value)
        case list():
            return [_filled(part) for part in value]
        case dict():
            return {name: _filled(part) for name, part in value.items()}
        case _:
            return value


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def config_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The settings of a service, from the image's environment and its own."""
    for variable, value in {**images.environment(), **services()[name]["environment"]}.items():
        monkeypatch.setenv(variable, value)
    return Config()


def vendored(name: str) -> Any:
    """A schema that check-jsonschema brings."""
    return json.loads((files("check_jsonschema") / "builtin_schemas" / "vendor" / f"{name}.json").read_text())


def seconds(written: str) -> int:
    return int(written[:-1]) * _UNITS[written[-1]]


def test_it_is_valid() -> None:
    schema = vendored("compose-spec")
    jsonschema.validators.validator_for(schema)(schema).validate(compose())
    unset = set(_VARIABLE.findall((DOCKER / "compose.yaml").read_text()))
    assert {name for name, default in unset if not default} - set(GIVEN) == {"OTEL_EXPORTER_OTLP_ENDPOINT"}


def test_every_command_and_every_setting_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: Any = get_command(app)
    for name in OURS:
        service = services()[name]
        command, *arguments = service["command"]
        commands.commands[command].make_context(command, arguments)  # raises what the command line would
        if "healthcheck" in service:
            how, program, command, *arguments = service["healthcheck"]["test"]
            assert (how, program) == ("CMD", "longshift")
            commands.commands[command].make_context(command, arguments)
        known = {name for name in service["environment"] if name.startswith("LONGSHIFT_")}
        assert {name.removeprefix("LONGSHIFT_").lower() for name in known} <= set(Config.model_fields)
        config_of(name, monkeypatch)


def test_everything_is_found_where_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    config, store = config_of("api", monkeypatch), services()["store"]
    location = _s3_location(_split(config.require("artifacts_url")))
    [volume] = store["volumes"]
    environment = services()["api"]["environment"]
    assert location.endpoint_url == f"http://store{store['command'][1]}"
    assert volume == f"store:{store['command'][3]}/{location.bucket}"
    assert environment["AWS_ACCESS_KEY_ID"] == store["environment"]["ROOT_ACCESS_KEY"]
    assert environment["AWS_SECRET_ACCESS_KEY"] == store["environment"]["ROOT_SECRET_KEY"]
    postgres = services()["postgres"]["environment"]
    user, password, name = (postgres[f"POSTGRES_{part}"] for part in ("USER", "PASSWORD", "DB"))
    assert config.require("database_url") == f"postgresql://{user}:{password}@postgres:5432/{name}"
    assert config.require("redis_url").startswith("redis://redis:6379")


def test_what_is_mounted_exists() -> None:
    for name, service in services().items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists(), f"{name}: {source}"
            elif not source.startswith("/"):
                assert source in compose()["volumes"], f"{name}: {source}"


def test_the_agents_that_it_names_exist() -> None:
    [mounted] = [volume for volume in services()["worker"]["volumes"] if volume.endswith(":/agents:ro")]
    names = services()["worker"]["environment"]["LONGSHIFT_AGENTS"].split(",")
    script = "import sys; from longshift.agent import load_agents; print([a.name for a in load_agents(sys.argv[1:])])"
    path = [str(DOCKER / mounted.split(":")[0]), str(ROOT / "workers")]
    loaded = subprocess.run(
        [sys.executable, "-c", script, *names],
        env={"PYTHONPATH": ":".join(path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.strip() == str(["research", "greeting"])


def test_our_containers_may_do_little_and_nothing_is_open_to_the_world() -> None:
    for name in (*OURS, "nginx"):
        service = services()[name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "/tmp" in service.get("volumes", []) + service.get("tmpfs", []), name
    for name, service in services().items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert ":" in service["image"], name


def test_nothing_starts_before_the_migration_has_succeeded() -> None:
    assert services()["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in set(OURS) - {"migrate"}:
        assert services()[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}, name
    for name, service in services().items():
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in services()[needed], name


def test_a_stop_gives_the_time_that_it_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("worker", monkeypatch)
    grace, timeout = config.drain_grace.total_seconds(), config.step_timeout.total_seconds()
    calls = timeout + underway.RECORDING  # of irreversible tools: nobody cuts them short
    records = worker.LAST_RECORDS + 2 * worker.CUT_SHORT + worker.LAST_CALLS
    needed = grace + calls + records + 2 * config.database_timeout.total_seconds()
    assert needed <= seconds(services()["worker"]["stop_grace_period"]) <= 1.2 * needed
    assert seconds(services()["api"]["stop_grace_period"]) > GRACE


def test_nginx_and_prometheus_ask_for_services_at_their_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("api", monkeypatch)
    servers = set(re.findall(r"server (\S+) resolve", (proxies.FILES / "upstream.conf").read_text()))
    replicas = {f"{compose()['name']}-api-{n}:{config.port}" for n in (1, 2, 3)}
    assert servers == {f"api:{config.port}", *replicas}
    version = re.search(r":(\d+)\.(\d+)", services()["nginx"]["image"])
    assert version is not None
    assert tuple(map(int, version.groups())) > (1, 27)  # 1.27.3 was the first with `resolve`
    scraped = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"]
    found = {name: part["port"] for job in scraped for part in job["dns_sd_configs"] for name in part["names"]}
    assert found == dict.fromkeys(("api", "worker", "exporter"), config.metrics_port)


def test_the_public_workflow_is_valid_and_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text())
    schema = vendored("github-workflows")
    told = json.loads(json.dumps({("on" if key is True else key): value for key, value in workflow.items()}))
    jsonschema.validators.validator_for(schema)(schema).validate(told)
    steps = [step.get("run", "") for job in told["jobs"].values() for step in job["steps"]]
    for command in (".ci/run", "docker/smoke.sh up", "docker/smoke.sh smoke", "k8s/kind.sh up", "k8s/kind.sh smoke"):
        assert any(command in step for step in steps), command
        assert (ROOT / command.split()[0]).stat().st_mode & 0o111, command


def test_scripts_of_the_shell_are_understood_by_it() -> None:
    for script in (DOCKER / "smoke.sh", ROOT / ".ci" / "run"):
        subprocess.run(["bash", "-n", script], check=True)


def test_every_command_of_the_guide_is_marked_and_those_executed_are_in_the_workflow() -> None:
    text = (ROOT / "docs/how-to/docker.md").read_text()
    workflow = (ROOT / ".github/workflows/ci.yaml").read_text()
    pattern = (
        r"\*(Executed by the public workflow|Not executed here)\.?\*(?:(?!```)[\s\S])*?\n\n```console\n([\s\S]*?)```"
    )
    marked = re.findall(pattern, text)
    assert len(marked) == text.count("```console") > 0
    for mark, block in marked:
        for command in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
            assert mark == "Not executed here" or f"run: {command}" in workflow, command
