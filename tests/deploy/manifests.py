"""The manifests of ``k8s/``, rendered, and what the tests ask of them. Nothing here needs a cluster."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jsonschema
import kubernetes_validate
import yaml

from tests.support.programs import program

K8S = Path(__file__).parents[2] / "k8s"
SCHEMAS = Path(__file__).parent / "schemas"
VERSIONS = ("1.35", "1.36", "1.37")
"""The three newest minors of Kubernetes."""
COMPONENT = "app.kubernetes.io/component"
QUEUE = "longshift/queue"
SCHEMA_CONTENTS = kubernetes_validate.utils.schema_contents

Manifest = dict[str, Any]


def kustomize() -> tuple[str | Path, ...]:
    """The command that renders a folder."""
    found = shutil.which("kustomize")
    return (found, "build") if found else (program("kubectl"), "kustomize")


def render(folder: Path) -> list[Manifest]:
    """What `kubectl apply -k folder` would send."""
    done = subprocess.run([*kustomize(), folder], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{folder.name}: {done.stderr}"
    assert "deprecated" not in done.stderr, done.stderr
    return [manifest for manifest in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if manifest]


def called(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


class Refused(AssertionError):
    """A manifest that a strict API server would not take."""


@cache
def _read(name: str, version: str) -> Any:
    """A file of schemas, once: kubernetes_validate reads megabytes of them for each object."""
    return SCHEMA_CONTENTS(name, version)


def validate(manifest: Manifest) -> None:
    """As the API server does with strict validation, in each of ``VERSIONS``; custom resources by their own schema."""
    custom = _custom().get((manifest["apiVersion"], manifest["kind"]))
    try:
        if custom is not None:
            jsonschema.validate(manifest, custom)
            return
        with patch("kubernetes_validate.utils.schema_contents", _read):
            for version in VERSIONS:
                assert kubernetes_validate.validate(manifest, version, strict=True) == version
    except jsonschema.ValidationError as error:  # that of kubernetes_validate is one, too
        raise Refused(f"{called(manifest)}: {'.'.join(map(str, error.path))}: {error.message}") from None


@cache
def _custom() -> dict[tuple[str, str], Manifest]:
    found = [json.loads(path.read_text()) for path in sorted(SCHEMAS.glob("*.json"))]
    return {(f"{each['group']}/{each['version']}", each["kind"]): _strict(each["schema"]) for each in found}


def _strict(schema: Any) -> Any:
    """Every object takes the fields that it names and no others."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    return {**strict, "additionalProperties": False} if isinstance(schema.get("properties"), dict) else strict


@dataclass(frozen=True)
class Fleet:
    """The objects of one overlay."""

    name: str
    objects: list[Manifest]

    def __str__(self) -> str:
        return self.name

    def of(self, *kinds: str) -> list[Manifest]:
        return [each for each in self.objects if each["kind"] in kinds]

    def one(self, kind: str, name: str) -> Manifest:
        (found,) = [each for each in self.of(kind) if each["metadata"]["name"] == name]
        return found

    @property
    def pods(self) -> list[tuple[str, Manifest]]:
        """Each template of pods, under the name of what makes them."""
        return [(called(each), each["spec"]["template"]) for each in self.of("Deployment", "StatefulSet", "Job")]

    @property
    def ours(self) -> list[tuple[str, Manifest]]:
        """Without the databases of the local overlay."""
        return [(name, pod) for name, pod in self.pods if "longshift" in name]

    def components(self, component: str) -> list[Manifest]:
        return [each for each in self.of("Deployment") if labels_of(each)[COMPONENT] == component]

    def settings(self, container: Manifest) -> dict[str, str]:
        """The environment of a container; values from Secrets as ``SECRET``."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                found |= self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        for variable in container.get("env", []):
            found[variable["name"]] = variable.get("value", "SECRET")
        return found


def labels_of(manifest: Manifest) -> dict[str, str]:
    labels: dict[str, str] = manifest["metadata"].get("labels", {})
    return labels


def containers(pod: Manifest) -> Iterator[Manifest]:
    yield from pod["spec"].get("initContainers", [])
    yield from pod["spec"]["containers"]


def main_container(deployment: Manifest) -> Manifest:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    found: Manifest = container
    return found


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Kubernetes' rule; an empty selector selects everything."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In", "the tests know no other operator"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return True
