"""What an API process counts and measures."""

from __future__ import annotations

from longshift.metrics.families import Metrics

REQUESTS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60)
"""Seconds: long polls may take a minute."""


class ApiMetrics(Metrics):
    """The metrics of one API process. Routes are named by their template, ``none`` if no route matched."""

    def __init__(self, *, revision: str | None = None) -> None:
        super().__init__(revision=revision)
        self.requests = self.counter(
            "longshift_http_requests_total", "Requests that were answered.", "method", "route", "status"
        )
        self.seconds = self.histogram(
            "longshift_http_request_seconds",
            "Time from a request to the first byte of its answer; long polls wait because they are asked to.",
            "route",
            buckets=REQUESTS,
        )
        self.accepted = self.counter(
            "longshift_turns_accepted_total", "Turns that this process has accepted; repeated requests do not count."
        )
