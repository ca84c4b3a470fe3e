"""What expressions of alerts and dashboards ask for, and whether the code exports it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser as promql
import yaml

from longshift.metrics import ApiMetrics, Family, FleetMetrics, WorkerMetrics

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "docker" / "prometheus" / "alerts.yaml"
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "longshift.json"
METRICS = ROOT / "docs" / "reference" / "metrics.md"
OF_PROMETHEUS = frozenset({"instance", "job"})
OF_PROCESSES = frozenset({"process_start_time_seconds", "process_resident_memory_bytes"})
"""Of prometheus-client itself."""
_ROW = re.compile(r"^\| `(longshift_\w+)` \| ([^|]*) \|", re.MULTILINE)


@dataclass(frozen=True)
class Selector:
    """A metric in an expression, with the labels that are compared: ``(name, value)``, the value None if not by ``=``."""

    metric: str
    compared: tuple[tuple[str, str | None], ...]


def families() -> dict[str, Family]:
    """Every metric of the code, by each name that it has in a scrape."""
    known = [*WorkerMetrics().families, *ApiMetrics().families, *FleetMetrics(lambda: None).families]
    return {name: family for family in known for name in family.series}


def documented() -> dict[str, dict[str, frozenset[str]]]:
    """The values of labels, as the reference has them, for labels that have few: ``{metric: {label: values}}``."""
    found: dict[str, dict[str, frozenset[str]]] = {}
    for name, column in _ROW.findall(METRICS.read_text()):
        parts = re.findall(r"`(\w+)`(?:: ([\w, ]+))?", column)
        found[name] = {label: frozenset(values.split(", ")) for label, values in parts if values}
    return found


def alerts() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(ALERTS.read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def panels() -> list[dict[str, Any]]:
    """Those that show something, not the rows."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queries() -> dict[str, str]:
    """Every expression of ours, by who asks it."""
    asked = {rule["alert"]: rule["expr"] for rule in alerts()}
    for panel in panels():
        for target in panel["targets"]:
            asked[f"{panel['title']} {target['refId']}"] = target["expr"].replace("$__rate_interval", "1m")
    return asked


def nodes(expression: str) -> Iterator[Any]:
    """Every node of an expression."""
    found: list[Any] = []
    promql.walk(promql.parse(expression), found.append)
    return iter(found)


def selectors(expression: str) -> list[Selector]:
    found = []
    for node in nodes(expression):
        if isinstance(node, promql.VectorSelector):  # inside a MatrixSelector, too
            assert node.name is not None
            compared = [(m.name, m.value if m.op == promql.MatchOp.Equal else None) for m in node.matchers.matchers]
            found.append(Selector(node.name, tuple(compared)))
    return found


def grouped(expression: str) -> set[str]:
    """Labels by which an expression groups or matches."""
    found: set[str] = set()
    for node in nodes(expression):
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            found |= set(node.modifier.labels)
        if isinstance(node, promql.BinaryExpr) and node.modifier is not None and node.modifier.matching is not None:
            found |= set(node.modifier.matching.labels)
    return found


def mistakes(expression: str) -> list[str]:
    """What of an expression the code does not export."""
    known, values, found = families(), documented(), []
    offered: set[str] = set(OF_PROMETHEUS)
    for selector in selectors(expression):
        family = known.get(selector.metric)
        if family is None:
            found += [] if selector.metric in OF_PROCESSES else [f"there is no metric {selector.metric}"]
            continue
        labels = {*family.labels, *OF_PROMETHEUS} | ({"le"} if selector.metric.endswith("_bucket") else set())
        offered |= labels
        for name, value in selector.compared:
            allowed = values[family.name].get(name)
            if name not in labels:
                found.append(f"{selector.metric} has no label {name}")
            elif value is not None and allowed is not None and value not in allowed:
                found.append(f"{selector.metric} is never {name}={value!r}")
    found += [f"no metric of it has the label {label}" for label in grouped(expression) - offered]
    return found
