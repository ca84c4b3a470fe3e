"""The metrics of a worker: their names, and the port at which they are read."""

from __future__ import annotations

import logging
import urllib.request
from pathlib import Path

import pytest

from longshift.metrics import Metrics

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"


def test_metrics_are_served_at_a_port_and_each_is_documented(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics = Metrics()
    metrics.contexts.labels(tier="hot").inc()
    metrics.drift.labels(reason="fold").inc()
    metrics.serve(0, host="127.0.0.1")

    port = next(record.__dict__["port"] for record in caplog.records if record.message == "metrics are served")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    metrics.close()

    assert 'longshift_contexts_restored_total{tier="hot"} 1.0' in text
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    documented = REFERENCE.read_text()
    assert [name for name in names if not name.endswith("_created") and f"`{name}`" not in documented] == []


def test_a_port_that_is_taken_costs_the_figures_and_not_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first, second = Metrics(), Metrics()
    first.serve(0, host="127.0.0.1")
    port = next(record.__dict__["port"] for record in caplog.records if record.message == "metrics are served")

    second.serve(port, host="127.0.0.1")

    assert [record.levelname for record in caplog.records if record.message == "metrics cannot be served"] == [
        "WARNING"
    ]
    for metrics in (first, second):
        metrics.close()
