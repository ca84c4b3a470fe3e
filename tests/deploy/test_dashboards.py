"""The dashboard, and what a real Prometheus over real processes makes of it and of the alerts."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import yaml

from longshift.embedded import Guardian, LocalRedis
from longshift.testing.fleet import Process
from longshift.testing.waiting import wait_until_sync
from tests.deploy.promql import (
    ALERTS,
    DASHBOARD,
    OF_PROMETHEUS,
    ROOT,
    alerts,
    families,
    grouped,
    mistakes,
    panels,
    queries,
    selectors,
)
from tests.support.databases import Databases
from tests.support.fleet import Fleet
from tests.support.fleet_worker import free_port
from tests.support.programs import program


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_asks_for_what_the_code_exports(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", "1m")
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        known = [families()[s.metric] for s in selectors(expression) if s.metric in families()]
        labels = grouped(expression) or {label for family in known for label in family.labels}
        assert mistakes(expression) == []
        assert shown <= labels | OF_PROMETHEUS
        assert len(panel["targets"]) == 1 or target["legendFormat"]


def test_the_dashboard_is_laid_out_without_gaps() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    taken = [(x, y) for panel in dashboard["panels"] for x, y in cells(panel["gridPos"])]
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert len(set(taken)) == len(taken) == 24 * (max(y for _, y in taken) + 1)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert rows == ["Are users served?", "Workers", "Turns", "Tiers", "API"]
    assert all(panel["description"] for panel in panels())


def cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y


def test_grafana_finds_the_dashboard_and_prometheus_where_compose_puts_them() -> None:
    folder, compose = ROOT / "docker" / "grafana", yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    [source] = yaml.safe_load((folder / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    [provider] = yaml.safe_load((folder / "provisioning/dashboards/longshift.yaml").read_text())["providers"]
    mounted = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    assert mounted["./grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./grafana/provisioning"] == "/etc/grafana/provisioning"
    assert source["url"] == "http://prometheus:9090"
    home = compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"


# ----------------------------------------------------------------------------------------------------- for real


@pytest.fixture(scope="module")
def prometheus(
    databases: Databases, redis_server: LocalRedis, guardian: Guardian, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """Prometheus, with our rules, over a worker, an API process and an exporter; a turn has run."""
    program("prometheus")
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    folder: Path = tmp_path_factory.mktemp("prometheus")
    with (
        databases.fresh() as url,
        Fleet(folder, database_url=url, redis_url=redis_server.url, guardian=guardian) as fleet,
    ):
        fleet.settings = {"metrics_port": 0}
        targets = {
            "longshift-exporter": fleet._start("exporter", ("longshift.cli", "exporter"), {}, environment={}),
            "longshift-worker": fleet.start_worker("worker", ready=False),
            "longshift-api": fleet.start_api(),
        }
        fleet.wait_ready(targets["longshift-worker"])
        turn = fleet.client.submit("ordered", 1)
        fleet.client.wait(turn)
        (folder / ALERTS.name).write_text(ALERTS.read_text())
        (folder / "prometheus.yaml").write_text(config({job: scraped(process) for job, process in targets.items()}))
        yield from serve(folder, guardian)


def scraped(process: Process) -> str:
    """Where a process serves its metrics, as its log says."""

    def place() -> str | None:
        assert process.alive, process.log()
        lines = [json.loads(line) for line in process.log().splitlines() if "metrics are served" in line]
        return f"127.0.0.1:{lines[0]['port']}" if lines else None

    found = wait_until_sync(place, description=f"{process.name} serves its metrics")
    assert found is not None
    return found


def config(targets: dict[str, str]) -> str:
    """prometheus.yaml with addresses of this machine instead of the names of containers, and a shorter interval."""
    given = yaml.safe_load((ALERTS.with_name("prometheus.yaml")).read_text())
    given["global"] = dict.fromkeys(given["global"], "250ms")
    for job in given["scrape_configs"]:
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [targets.pop(job["job_name"])]}]
    assert not targets
    return yaml.safe_dump(given)


def serve(folder: Path, guardian: Guardian) -> Iterator[httpx.Client]:
    port = free_port()
    arguments = [f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    arguments += [f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([program("prometheus"), *arguments], stdout=log, stderr=log)
    guardian.watch(process.pid)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1") as http:
            wait_until_sync(lambda: len(answer(http, "up == 1")) == 3, description="three targets are scraped")
            wait_until_sync(lambda: answer(http, "longshift_turns_ended_total"), description="a turn is counted")
            yield http
    finally:
        process.terminate()
        process.wait(10)
        guardian.forget(process.pid)


def answer(http: httpx.Client, expression: str) -> list[Any]:
    try:
        told = http.get("/query", params={"query": expression}).json()
    except (httpx.TransportError, json.JSONDecodeError):
        return []
    assert told["status"] == "success", told
    result: list[Any] = told["data"]["result"]
    return result


def test_a_real_prometheus_understands_every_expression(prometheus: httpx.Client) -> None:
    for name, expression in queries().items():
        told = prometheus.get("/query", params={"query": expression}).json()
        assert (name, told["status"]) == (name, "success"), told
    [group] = prometheus.get("/rules").json()["data"]["groups"]
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in alerts()]


def test_real_processes_export_every_metric_that_is_asked_for(prometheus: httpx.Client) -> None:
    exported = {entry["metric"] for entry in prometheus.get("/targets/metadata").json()["data"]}
    asked = {selector.metric for expression in queries().values() for selector in selectors(expression)}
    named = {families()[name].name if name in families() else name for name in asked}
    assert named - exported - {name.removesuffix("_total") + "_total" for name in exported} == set()


def test_a_healthy_fleet_fires_no_alert(prometheus: httpx.Client) -> None:
    for rule in alerts():
        assert (rule["alert"], answer(prometheus, rule["expr"])) == (rule["alert"], [])
