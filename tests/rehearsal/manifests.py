"""What the rehearsal takes from k8s/, so that it rehearses what is deployed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.rehearsal.rule import Rule, read

ROOT = Path(__file__).parents[2]
SCALED_OBJECT = ROOT / "k8s" / "components" / "keda" / "scaledobject.yaml"
CAPACITY = 100
GRACE = 60.0


def rule_for(slots: int, file: Path = SCALED_OBJECT) -> Rule:
    """The rule of ``file`` for workers that have ``slots`` instead of what the ConfigMap gives them."""
    rule = read(file)
    triggers = tuple(
        replace(trigger, target=trigger.target * slots / CAPACITY) if trigger.average else trigger
        for trigger in rule.triggers
    )
    return replace(rule, triggers=triggers)
