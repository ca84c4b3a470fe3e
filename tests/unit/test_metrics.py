"""What processes count: names and labels, their reference, and the port at which they are read."""

from __future__ import annotations

import json
import logging
import re
import socket
import struct
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from longshift.metrics import ApiMetrics, Family, Figures, FleetMetrics, Metrics, Page, Server, WorkerMetrics
from longshift.metrics.fleet import Queue
from longshift.testing.waiting import wait_until_sync

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
FIGURES = Figures(
    queues={"default": Queue(runnable=3, running=2, oldest_seconds=1.5, slots=10, workers=1, waiting=7)},
    turns={"queued": 3},
    workers={"ok": 1},
    unserved={("triage", "2"): 1},
)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(WorkerMetrics(), {"/livez": lambda: Page(200, {"status": "ok"}), "/readyz": lambda: 1 / 0})  # type: ignore[dict-item, return-value]
    yield server
    server.close()


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def made(metrics: Metrics) -> dict[str, tuple[str, str]]:
    """Kind and help of each metric that a registry gives, by the name that queries use."""
    found = {family.name: family for family in metrics.registry.collect() if family.name.startswith("longshift_")}
    total = {"counter": "_total"}
    return {name + total.get(family.type, ""): (family.type, family.documentation) for name, family in found.items()}


def everything() -> list[Family]:
    fleet = FleetMetrics(lambda: FIGURES)
    return list({family: None for of in (WorkerMetrics(), ApiMetrics(), fleet) for family in of.families})


@pytest.mark.parametrize(
    "metrics", [WorkerMetrics(), ApiMetrics(), FleetMetrics(lambda: FIGURES)], ids=lambda m: type(m).__name__
)
def test_what_a_process_serves_is_what_it_says_that_it_serves(metrics: Metrics) -> None:
    assert made(metrics) == {family.name: (family.kind, family.text) for family in metrics.families}


def test_the_reference_has_each_metric_with_its_labels_and_no_other() -> None:
    rows = re.findall(r"^\| `(longshift_\w+)` \|([^|]*)\|", REFERENCE.read_text(), flags=re.MULTILINE)
    documented = {
        name: tuple(re.findall(r"`(\w+)`(?=:|,| *$)", re.sub(r":[^;]*", ":", labels))) for name, labels in rows
    }

    assert len(rows) == len(documented)
    assert documented == {family.name: family.labels for family in everything()}


def test_without_postgres_an_exporter_says_that_and_nothing_else() -> None:
    fleet = FleetMetrics(lambda: None)

    of_every_process = {family.name for family in Metrics().families}
    assert made(fleet).keys() - of_every_process == {"longshift_exporter_up"}
    assert fleet.registry.get_sample_value("longshift_exporter_up") == 0


def test_metrics_and_pages_are_served_at_one_port(server: Server) -> None:
    url = f"http://127.0.0.1:{server.listen(0, host='127.0.0.1')}"

    status, text = get(f"{url}/metrics")
    assert (status, "longshift_worker_slots" in text) == (200, True)
    assert get(f"{url}/livez") == (200, '{"status": "ok"}\n')
    assert get(f"{url}/nothing")[0] == 404


def test_a_probe_that_fails_is_answered(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    url = f"http://127.0.0.1:{server.listen(0, host='127.0.0.1')}"

    status, text = get(f"{url}/readyz")
    assert (status, json.loads(text)) == (500, {"detail": "the probe failed: the log of this process says why"})
    assert [record.message for record in caplog.records] == ["a probe failed"]


def test_a_port_that_is_taken_costs_the_figures_and_not_the_worker(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    port = server.listen(0, host="127.0.0.1")
    second = Server(WorkerMetrics())

    second.try_listen(port, host="127.0.0.1")

    second.close()
    assert [record.levelname for record in caplog.records if record.message == "metrics cannot be served"] == [
        "WARNING"
    ]


def test_a_burst_of_probes_is_answered_beside_clients_that_say_nothing(server: Server) -> None:
    port = server.listen(0, host="127.0.0.1")
    with ExitStack() as stack, ThreadPoolExecutor(100) as clients:
        for _ in range(50):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        answers = list(clients.map(get, [f"http://127.0.0.1:{port}/livez"] * 200))

    assert {status for status, _ in answers} == {200}


def test_a_client_that_goes_away_leaves_no_traceback(
    server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    client = socket.create_connection(("127.0.0.1", server.listen(0, host="127.0.0.1")))
    client.sendall(b"GET /li")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by a reset
    client.close()
    wait_until_sync(
        lambda: [record for record in caplog.records if record.message == "a connection failed"],
        description="the handler has noticed",
    )

    assert capfd.readouterr().err == ""
