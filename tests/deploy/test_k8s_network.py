"""The network policies let pass what the code needs, and nothing else: asked as a cluster's network would decide it."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

import pytest

from tests.deploy.manifests import COMPONENT, K8S, Fleet, Manifest, render, selects

HERE = "longshift"


@dataclass(frozen=True)
class Peer:
    """The other side: a pod of a namespace, or an address outside of the cluster."""

    namespace: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    address: str = "10.20.30.40"


PUBLIC, INSIDE, METADATA = Peer(address="93.184.216.34"), Peer(), Peer(address="169.254.169.254")
DNS, PROMETHEUS, INGRESS = Peer("kube-system"), Peer("monitoring"), Peer("ingress-nginx")
STRANGER = Peer("default")


def ours(component: str) -> Peer:
    return Peer(HERE, {COMPONENT: component})


@pytest.fixture(scope="module", params=["local", "kind", "production"])
def fleet(request: pytest.FixtureRequest) -> Fleet:
    return Fleet(request.param, render(K8S / "overlays" / request.param))


@pytest.fixture(scope="module")
def production() -> Fleet:
    return Fleet("production", render(K8S / "overlays" / "production"))


def passes(fleet: Fleet, pod: str, *, direction: str, peer: Peer, port: int | str, protocol: str = "TCP") -> bool:
    """Whether a component's pods may be called by ``peer`` (Ingress) or call it (Egress)."""
    (labels,) = {
        tuple(sorted(template["metadata"]["labels"].items()))
        for _, template in fleet.pods
        if template["metadata"]["labels"][COMPONENT] == pod
    }
    policies = [
        each["spec"]
        for each in fleet.of("NetworkPolicy")
        if selects(each["spec"]["podSelector"], dict(labels)) and direction in each["spec"]["policyTypes"]
    ]
    assert policies, f"{pod} is selected by no policy for {direction}: everything would pass"
    side = "from" if direction == "Ingress" else "to"
    return any(
        _has_port(rule, port, protocol) and (side not in rule or any(_is(peer, each) for each in rule[side]))
        for spec in policies
        for rule in spec.get(direction.lower(), [])
    )


def _has_port(rule: Manifest, port: int | str, protocol: str) -> bool:
    return any((each["port"], each["protocol"]) == (port, protocol) for each in rule["ports"])


def _is(peer: Peer, rule: Manifest) -> bool:
    if "ipBlock" in rule:
        address, block = ip_address(peer.address), rule["ipBlock"]
        inside = [address in ip_network(each) for each in (block["cidr"], *block.get("except", []))]
        return peer.namespace is None and inside[0] and not any(inside[1:])
    if peer.namespace is None:
        return False
    if "namespaceSelector" in rule:
        named = {"kubernetes.io/metadata.name": peer.namespace}
        return selects(rule["namespaceSelector"], named) and selects(rule.get("podSelector", {}), peer.labels)
    return peer.namespace == HERE and selects(rule["podSelector"], peer.labels)


def calls(fleet: Fleet, pod: str, peer: Peer, port: int | str, protocol: str = "TCP") -> bool:
    return passes(fleet, pod, direction="Egress", peer=peer, port=port, protocol=protocol)


def hears(fleet: Fleet, pod: str, peer: Peer, port: int | str) -> bool:
    return passes(fleet, pod, direction="Ingress", peer=peer, port=port)


def test_every_pod_is_selected_for_both_directions(fleet: Fleet) -> None:
    for component in {pod["metadata"]["labels"][COMPONENT] for _, pod in fleet.pods}:
        assert not hears(fleet, component, STRANGER, 22)
        assert not calls(fleet, component, STRANGER, 22)


def test_everybody_may_look_up_names(fleet: Fleet) -> None:
    for component in ("api", "worker", "exporter", "migrate"):
        assert calls(fleet, component, DNS, 53, "UDP")
        assert calls(fleet, component, DNS, 53)


@pytest.mark.parametrize(
    ("pod", "ports"),
    [
        ("api", {5432, 6379, 443}),
        ("worker", {5432, 6379, 443}),
        ("exporter", {5432}),
        ("migrate", {5432}),
    ],
)
def test_each_process_reaches_its_servers_and_no_others(fleet: Fleet, pod: str, ports: set[int]) -> None:
    assert {port for port in (80, 443, 5432, 6379, 8080, 8420) if calls(fleet, pod, INSIDE, port)} == ports


def test_agents_fetch_from_the_public_net_only(fleet: Fleet) -> None:
    assert calls(fleet, "worker", PUBLIC, 80)
    assert calls(fleet, "worker", PUBLIC, 443)
    for forbidden in (INSIDE, METADATA, Peer(address="192.168.1.1"), STRANGER, ours("api")):
        assert not calls(fleet, "worker", forbidden, 80)
    assert not calls(fleet, "api", PUBLIC, 80)


def test_the_api_is_called_from_its_namespace_and_through_the_ingress(production: Fleet) -> None:
    assert hears(production, "api", ours("worker"), "http")
    assert hears(production, "api", INGRESS, "http")
    assert not hears(production, "api", STRANGER, "http")
    assert not hears(production, "worker", INGRESS, "http")


def test_metrics_and_health_are_for_prometheus_and_the_kubelet(fleet: Fleet) -> None:
    for component in ("api", "worker", "exporter"):
        assert hears(fleet, component, PROMETHEUS, "metrics")
        assert not hears(fleet, component, STRANGER, "metrics")
        assert not hears(fleet, component, INGRESS, "metrics")


def test_traces_go_to_the_collector_beside_prometheus(fleet: Fleet) -> None:
    assert calls(fleet, "worker", PROMETHEUS, 4318)
    assert not calls(fleet, "worker", STRANGER, 4318)


def test_workers_that_keep_their_cost_reach_the_api_server(production: Fleet) -> None:
    assert all(calls(production, "worker", INSIDE, port) for port in (443, 6443))
    assert not calls(production, "exporter", INSIDE, 6443)


def test_the_local_servers_hear_this_namespace_and_keda() -> None:
    fleet = Fleet("kind", render(K8S / "overlays" / "kind"))
    for peer in (ours("api"), ours("worker"), ours("exporter"), ours("migrate"), Peer("keda")):
        assert hears(fleet, "postgres", peer, "postgres")
    assert hears(fleet, "redis", ours("worker"), "redis")
    assert not hears(fleet, "redis", Peer("keda"), "redis")
    assert not hears(fleet, "postgres", STRANGER, "postgres")
