"""Kubernetes takes the manifests: every overlay and every combination of components renders, and is strictly valid."""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.deploy.manifests import K8S, QUEUE, Fleet, Manifest, Refused, called, render, selects, validate

COMPONENTS = ("keda", "queue-gpu", "hpa", "fixed", "pod-cost", "ingress")
"""In the order in which a kustomization has to list them."""
NEEDS = {"queue-gpu": "keda"}
FIGHTS = {("keda", "fixed"), ("hpa", "fixed"), ("queue-gpu", "fixed")}


def combinations() -> Iterator[tuple[str, ...]]:
    """Each component, each two of them, and all that go together."""
    wanted = [chosen for size in (0, 1, 2) for chosen in itertools.combinations(COMPONENTS, size)]
    for chosen in (*wanted, tuple(name for name in COMPONENTS if name != "fixed")):
        whole = {*chosen, *(NEEDS[name] for name in chosen if name in NEEDS)}
        if not any({one, other} <= whole for one, other in FIGHTS):
            yield tuple(name for name in COMPONENTS if name in whole)


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fleet]:
    """All overlays, and the base with each combination of components."""
    folders = {path.name: path for path in sorted((K8S / "overlays").iterdir())}
    made = tmp_path_factory.mktemp("combinations").resolve()
    for chosen in sorted(set(combinations())):
        name = "+".join(("base", *chosen))
        folders[name] = made / name
        folders[name].mkdir()
        to = [os.path.relpath(K8S / path, folders[name]) for path in ("base", *(f"components/{one}" for one in chosen))]
        text = json.dumps({"resources": to[:1], "components": to[1:], "namespace": "longshift"})
        (folders[name] / "kustomization.yaml").write_text(text)
    with ThreadPoolExecutor(4) as threads:
        rendered = threads.map(render, folders.values())
        return {name: Fleet(name, objects) for name, objects in zip(folders, rendered, strict=True)}


def test_kubernetes_takes_every_object_of_every_combination(fleets: dict[str, Fleet]) -> None:
    known = {json.dumps(each, sort_keys=True): each for fleet in fleets.values() for each in fleet.objects}
    assert len(fleets) > 15
    for manifest in known.values():
        validate(manifest)


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("Deployment", lambda spec: spec["template"]["spec"].update(terminationGracePeriod=5)),
        ("Deployment", lambda spec: spec["template"]["spec"]["containers"][0]["ports"][0].update(containerPort="x")),
        ("NetworkPolicy", lambda spec: spec.update(egres=[])),
        ("ScaledObject", lambda spec: spec.update(minReplicas=1)),
        ("ScaledObject", lambda spec: spec["triggers"][0]["metadata"].update(targetQueryValue=80)),
        ("TriggerAuthentication", lambda spec: spec["secretTargetRef"][0].pop("key")),
    ],
)
def test_a_slip_would_be_found(fleets: dict[str, Fleet], kind: str, spoil: Callable[[Manifest], object]) -> None:
    manifest = copy.deepcopy(fleets["production"].of(kind)[0])
    spoil(manifest["spec"])
    with pytest.raises(Refused):
        validate(manifest)


def test_everything_is_in_the_namespace_or_belongs_to_the_cluster(fleets: dict[str, Fleet]) -> None:
    of_the_cluster = {"Namespace", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
    for fleet in fleets.values():
        for each in fleet.objects:
            if each["kind"] not in of_the_cluster:
                assert each["metadata"].get("namespace") == "longshift", f"{fleet}: {called(each)}"


def test_selectors_select_what_they_mean_and_no_pods_of_another_owner(fleets: dict[str, Fleet]) -> None:
    for fleet in fleets.values():
        owners = fleet.of("Deployment", "StatefulSet")
        for owner in owners:
            chosen = [
                called(each)
                for each in owners
                if selects(owner["spec"]["selector"], each["spec"]["template"]["metadata"]["labels"])
            ]
            assert chosen == [called(owner)], f"{fleet}: {called(owner)} selects {chosen}"
        for service in fleet.of("Service"):
            selector = {"matchLabels": service["spec"]["selector"]}
            chosen = [name for name, pod in fleet.pods if selects(selector, pod["metadata"]["labels"])]
            assert len(chosen) == 1, f"{fleet}: {called(service)} selects {chosen}"
            assert chosen[0].endswith(f"/{service['metadata']['name']}")


def test_services_and_ingresses_name_ports_that_are_there(fleets: dict[str, Fleet]) -> None:
    for fleet in fleets.values():
        for service in fleet.of("Service"):
            (pod,) = [pod for name, pod in fleet.pods if name.endswith(f"/{service['metadata']['name']}")]
            names = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
        for ingress in fleet.of("Ingress"):
            for rule in ingress["spec"]["rules"]:
                backend = rule["http"]["paths"][0]["backend"]["service"]
                service = fleet.one("Service", backend["name"])
                assert backend["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}


def test_what_is_referred_to_is_there(fleets: dict[str, Fleet]) -> None:
    """ConfigMaps by the name with the hash, accounts, claims, and what a ScaledObject asks with."""
    for fleet in fleets.values():
        for name, pod in fleet.pods:
            for container in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]:
                for source in container.get("envFrom", []):
                    if "configMapRef" in source:
                        fleet.one("ConfigMap", source["configMapRef"]["name"])
            if "longshift" in name:
                fleet.one("ServiceAccount", pod["spec"]["serviceAccountName"])
            for volume in pod["spec"].get("volumes", []):
                if "persistentVolumeClaim" in volume:
                    fleet.one("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
        for scaled in fleet.of("ScaledObject"):
            fleet.one("Deployment", scaled["spec"]["scaleTargetRef"]["name"])
            for trigger in scaled["spec"]["triggers"]:
                fleet.one("TriggerAuthentication", trigger["authenticationRef"]["name"])


def test_the_job_is_of_one_version_and_changes_with_no_setting(fleets: dict[str, Fleet]) -> None:
    """A Job cannot be changed: `kubectl apply` of a new version must make another one, of a new setting the same."""
    production = fleets["production"]
    (job,) = production.of("Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert job["metadata"]["name"] == f"longshift-migrate-{container['image'].split(':')[1]}"
    assert "envFrom" not in container
    hashed = [each["metadata"]["name"] for each in production.of("ConfigMap")]
    assert not any(name in json.dumps(job) for name in hashed)


def test_a_second_queue_has_workers_and_a_scaler_of_its_own(fleets: dict[str, Fleet]) -> None:
    fleet = fleets["base+keda+queue-gpu"]
    workers = fleet.components("worker")
    assert {each["spec"]["template"]["metadata"]["labels"][QUEUE] for each in workers} == {"default", "gpu"}
    assert {each["spec"]["scaleTargetRef"]["name"] for each in fleet.of("ScaledObject")} == {
        each["metadata"]["name"] for each in workers
    }
