"""What an API process counts."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry

from tests.support.api import api_config, running_api


def requests(registry: CollectorRegistry) -> dict[tuple[str, str, str], float]:
    found: dict[tuple[str, str, str], float] = {}
    for family in registry.collect():
        for sample in family.samples:
            if sample.name == "longshift_http_requests_total":
                labels = sample.labels
                found[labels["method"], labels["route"], labels["status"]] = sample.value
    return found


async def test_requests_are_counted_by_route_and_turns_once(database_url: str, redis_url: str, tmp_path: Path) -> None:
    async with running_api(api_config(database_url, redis_url, tmp_path)) as api:
        turn = await api.submit()
        for _ in range(2):
            answer = await api.client.post(
                "/v1/turns",
                json={"agent": "echo", "input": {"text": "again"}},
                headers={"Idempotency-Key": "one"},
            )
            assert answer.status_code == 202
        batch = [{"agent": "echo", "input": {"text": "hello"}}] * 3
        assert (await api.client.post("/v1/batches", json=batch)).status_code == 202
        await api.client.get(f"/v1/turns/{turn['id']}")
        await api.client.get("/nothing/of/the/kind")
        await api.client.request("BREW", "/v1/turns")
        await api.client.post("/v1/turns", json={"agent": "unknown"})
        registry = api.edge.metrics.registry

    assert requests(registry) == {
        ("POST", "/v1/turns", "202"): 3,
        ("POST", "/v1/batches", "202"): 1,
        ("GET", "/v1/turns/{turn_id}", "200"): 1,
        ("GET", "none", "404"): 1,
        ("other", "/v1/turns", "405"): 1,
        ("POST", "/v1/turns", "422"): 1,
    }
    assert registry.get_sample_value("longshift_turns_accepted_total") == 5
    assert registry.get_sample_value("longshift_http_request_seconds_count", {"route": "/v1/turns"}) == 5
