"""What Kubernetes makes of a KEDA ScaledObject: how many workers there shall be.

KEDA turns a ScaledObject into a HorizontalPodAutoscaler whose external metrics are KEDA's triggers, and keeps only the way from
0 to 1 and back for itself. So what decides is the algorithm of the HorizontalPodAutoscaler, written here as the documentation
of Kubernetes describes it ("Horizontal Pod Autoscaling", sections "Algorithm details" and "Configurable scaling behavior"):

    every 15 s      each metric proposes a number; the largest counts
    AverageValue    ceil(value / target), unless value / (target x replicas) is within 10 % of 1
    Value           ceil(ready pods x value / target), unless value / target is within 10 % of 1
    windows         the smallest proposal of the last ``scaleUp.stabilizationWindowSeconds`` bounds growth, the largest one
                    of the last ``scaleDown.stabilizationWindowSeconds`` bounds shrinking
    policies        by how much, or by which share, the number may change within a period
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

SYNC = 15.0
"""Seconds between two decisions: ``--horizontal-pod-autoscaler-sync-period``."""
TOLERANCE = 0.1
"""``--horizontal-pod-autoscaler-tolerance``."""
POLLING, COOLDOWN = 30.0, 300.0
"""KEDA's ``pollingInterval`` and ``cooldownPeriod``, where a ScaledObject does not say."""
UP: Mapping[str, Any] = {
    "stabilizationWindowSeconds": 0,
    "policies": [
        {"type": "Percent", "value": 100, "periodSeconds": 15},
        {"type": "Pods", "value": 4, "periodSeconds": 15},
    ],
}
DOWN: Mapping[str, Any] = {
    "stabilizationWindowSeconds": 300,
    "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}],
}
"""Defaults of ``behavior``."""


@dataclass(frozen=True, slots=True)
class Policy:
    percent: bool
    value: float
    period: float  # seconds


@dataclass(frozen=True, slots=True)
class Behaviour:
    """``behavior.scaleUp`` or ``scaleDown``."""

    window: float  # seconds
    policies: tuple[Policy, ...]
    select: Literal["Max", "Min", "Disabled"] = "Max"


@dataclass(frozen=True, slots=True)
class Trigger:
    """A ``postgresql`` trigger: its ``query`` gives one number."""

    query: str
    target: float
    activation: float = 0.0
    average: bool = True  # metricType AverageValue, else Value


@dataclass(frozen=True, slots=True)
class Rule:
    """A ScaledObject."""

    least: int
    most: int
    triggers: tuple[Trigger, ...]
    up: Behaviour
    down: Behaviour
    polling: float = POLLING
    cooldown: float = COOLDOWN
    sync: float = SYNC

    def faster(self, times: float) -> Rule:
        """The same with every time divided, for a rehearsal that has no hour."""

        def quick(behaviour: Behaviour) -> Behaviour:
            policies = tuple(replace(policy, period=policy.period / times) for policy in behaviour.policies)
            return replace(behaviour, window=behaviour.window / times, policies=policies)

        return replace(
            self,
            up=quick(self.up),
            down=quick(self.down),
            polling=self.polling / times,
            cooldown=self.cooldown / times,
            sync=self.sync / times,
        )


def read(file: Path) -> Rule:
    """The rule of the first ScaledObject in a file.

    Raises:
        ValueError: it has something that is not modelled here.
    """
    documents = [each for each in yaml.safe_load_all(file.read_text()) if each]
    spec = next(each["spec"] for each in documents if each["kind"] == "ScaledObject")
    advanced = spec.get("advanced", {})
    if "scalingModifiers" in advanced or "idleReplicaCount" in spec:
        raise ValueError(f"{file}: scalingModifiers and idleReplicaCount are not modelled in tests/rehearsal/rule.py")
    behaviour = advanced.get("horizontalPodAutoscalerConfig", {}).get("behavior", {})
    return Rule(
        least=int(spec.get("minReplicaCount", 0)),
        most=int(spec.get("maxReplicaCount", 100)),
        triggers=tuple(_trigger(each) for each in spec["triggers"]),
        up=_behaviour({**UP, **behaviour.get("scaleUp", {})}),
        down=_behaviour({**DOWN, **behaviour.get("scaleDown", {})}),
        polling=float(spec.get("pollingInterval", POLLING)),
        cooldown=float(spec.get("cooldownPeriod", COOLDOWN)),
    )


def _trigger(given: Mapping[str, Any]) -> Trigger:
    if given["type"] != "postgresql":
        raise ValueError(f"a trigger of type {given['type']!r} is not modelled in tests/rehearsal/rule.py")
    metadata = given["metadata"]
    return Trigger(
        query=metadata["query"],
        target=float(metadata["targetQueryValue"]),
        activation=float(metadata.get("activationTargetQueryValue", 0)),
        average=given.get("metricType", "AverageValue") == "AverageValue",
    )


def _behaviour(given: Mapping[str, Any]) -> Behaviour:
    policies = tuple(
        Policy(each["type"] == "Percent", float(each["value"]), float(each["periodSeconds"]))
        for each in given["policies"]
    )
    return Behaviour(float(given["stabilizationWindowSeconds"]), policies, given.get("selectPolicy", "Max"))


@dataclass
class Autoscaler:
    """Decides for one Deployment; give it each moment in order."""

    rule: Rule
    _proposals: list[tuple[float, int]] = field(default_factory=list)  # (when, how many)
    _changes: list[tuple[float, int]] = field(default_factory=list)  # (when, by how many)
    _active_until: float = -math.inf

    def decide(self, now: float, *, current: int, ready: int, values: Sequence[float]) -> int:
        """How many replicas from now on. ``values``: of the triggers; call it every ``rule.sync`` seconds."""
        rule = self.rule
        if any(value > trigger.activation for trigger, value in zip(rule.triggers, values, strict=True)):
            self._active_until = now + rule.cooldown
        if current == 0:  # KEDA's own part
            return max(rule.least, 1) if now < self._active_until else rule.least
        if rule.least == 0 and now >= self._active_until:
            return 0
        wanted = max(self._propose(*pair, current, ready) for pair in zip(rule.triggers, values, strict=True))
        allowed = self._limit(now, current, self._stabilize(now, current, wanted))
        if allowed != current:
            self._changes.append((now, allowed - current))
        return allowed

    def _propose(self, trigger: Trigger, value: float, current: int, ready: int) -> int:
        ratio = value / (trigger.target * (current if trigger.average else 1))
        if 1 - TOLERANCE <= ratio <= 1 + TOLERANCE:
            return current
        return math.ceil(value / trigger.target) if trigger.average else math.ceil(ready * ratio)

    def _stabilize(self, now: float, current: int, wanted: int) -> int:
        up, down = self.rule.up.window, self.rule.down.window
        self._proposals = [(at, n) for at, n in self._proposals if at > now - max(up, down)]
        most = max([wanted, *(n for at, n in self._proposals if at > now - down)])
        least = min([wanted, *(n for at, n in self._proposals if at > now - up)])
        self._proposals.append((now, wanted))
        return min(max(current, least), most)

    def _limit(self, now: float, current: int, wanted: int) -> int:
        rule = self.rule
        if wanted > current:
            limits = [
                math.ceil(start * (1 + policy.value / 100)) if policy.percent else start + policy.value
                for policy, start in self._starts(now, current, rule.up)
            ]
            limit = max(current, int(_select(rule.up, limits, most=max, none=current)))
            return min(wanted, limit, max(rule.most, rule.least))
        if wanted < current:
            limits = [
                math.floor(start * (1 - policy.value / 100)) if policy.percent else start - policy.value
                for policy, start in self._starts(now, current, rule.down)
            ]
            limit = min(current, int(_select(rule.down, limits, most=min, none=current)))
            return max(wanted, limit, rule.least, 1)
        return min(max(current, rule.least, 1), rule.most)

    def _starts(self, now: float, current: int, behaviour: Behaviour) -> list[tuple[Policy, int]]:
        """Each policy with the number of replicas at the beginning of its period."""
        return [
            (policy, current - sum(change for at, change in self._changes if at > now - policy.period))
            for policy in behaviour.policies
        ]


def _select(behaviour: Behaviour, limits: Sequence[float], *, most: Any, none: int) -> float:
    """The limit that allows the most change, or the least; ``selectPolicy``."""
    if behaviour.select == "Disabled" or not limits:
        return none
    least = min if most is max else max
    chosen: float = (most if behaviour.select == "Max" else least)(limits)
    return chosen
