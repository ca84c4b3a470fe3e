"""Alerts: each asks for what the code exports, fires for what it is about, and says what to do."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from longshift.metrics import WorkerMetrics
from tests.deploy.promql import ALERTS, ROOT, alerts, documented, mistakes
from tests.support.programs import program

UNIT_TESTS = ALERTS.with_name("alerts_test.yaml")
RUNBOOKS = "docs/how-to/alerts.md"


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_the_code_exports(rule: dict[str, str]) -> None:
    assert mistakes(rule["expr"]) == []


def test_mistakes_of_expressions_are_found() -> None:
    assert mistakes("longshift_queue_depth > 0") == ["there is no metric longshift_queue_depth"]
    assert mistakes("longshift_claims_total{outcome='won'}") == ["longshift_claims_total has no label outcome"]
    assert mistakes("longshift_claims_total{result='taken'}") == ["longshift_claims_total is never result='taken'"]
    assert mistakes("rate(longshift_turn_seconds[5m])") == ["there is no metric longshift_turn_seconds"]
    assert mistakes("sum by (queue) (longshift_suspects)") == ["no metric of it has the label queue"]
    assert mistakes("longshift_suspects and on (queue) longshift_suspects") == ["no metric of it has the label queue"]
    assert mistakes("sum by (le) (rate(longshift_turn_seconds_bucket{agent='a'}[5m]))") == []


def test_every_alert_is_made_to_fire_and_none_fires_in_a_fleet_that_is_well() -> None:
    well, *others = yaml.safe_load(UNIT_TESTS.read_text())["tests"]
    names = {rule["alert"] for rule in alerts()}
    fired = {check["alertname"] for test in others for check in test["alert_rule_test"] if check.get("exp_alerts")}
    assert fired == names
    assert {check["alertname"] for check in well["alert_rule_test"]} == names
    promtool = [str(program("promtool")), "test", "rules", str(UNIT_TESTS)]
    done = subprocess.run(promtool, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_first_drift_of_a_process_is_an_increase() -> None:
    """A series that begins with 1 has increased by nothing, as Prometheus sees it."""
    reasons = documented()["longshift_context_drift_total"]["reason"]
    scraped = WorkerMetrics().registry
    assert {scraped.get_sample_value("longshift_context_drift_total", {"reason": r}) for r in reasons} == {0}


def test_every_alert_has_its_runbook_and_every_runbook_its_alert() -> None:
    sections = re.findall(r"^### (\w+)$", (ROOT / RUNBOOKS).read_text(), re.MULTILINE)
    assert sections == [rule["alert"] for rule in alerts()]
    for rule in alerts():
        assert rule["annotations"]["runbook"] == f"{RUNBOOKS}#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")
