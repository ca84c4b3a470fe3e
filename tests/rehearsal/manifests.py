"""What the rehearsal takes from k8s/, so that it rehearses what is deployed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tests.rehearsal.rule import Rule, read

K8S = Path(__file__).parents[2] / "k8s"
SCALED_OBJECT = K8S / "components" / "keda" / "scaledobject.yaml"
SETTINGS = K8S / "base" / "settings.env"
WORKER = K8S / "base" / "worker" / "default.yaml"
GRACE = 60.0
"""``terminationGracePeriodSeconds`` of a rehearsal: LONGSHIFT_DRAIN_GRACE is 20 s there, the longest irreversible call 8 s."""


def capacity() -> int:
    """``LONGSHIFT_CAPACITY`` of the deployed workers, which the targets of the rule are made for."""
    settings = dict(line.split("=", 1) for line in SETTINGS.read_text().splitlines() if "=" in line and line[0] != "#")
    return int(settings["LONGSHIFT_CAPACITY"])


def command() -> list[str]:
    """What the container of a worker runs: the image's entry point is ``longshift``."""
    found: dict[str, Any] = yaml.safe_load(WORKER.read_text())
    (container,) = found["spec"]["template"]["spec"]["containers"]
    return ["longshift", *container["args"]]


def rule_for(slots: int, file: Path = SCALED_OBJECT) -> Rule:
    """The rule of ``file`` for workers that have ``slots`` instead of what the settings give them."""
    rule = read(file)
    triggers = tuple(
        replace(trigger, target=trigger.target * slots / capacity()) if trigger.average else trigger
        for trigger in rule.triggers
    )
    return replace(rule, triggers=triggers)
