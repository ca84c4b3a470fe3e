"""What must be true of every object that we give to a cluster, and what must fit between the manifests and the code."""

from __future__ import annotations

import re
import shlex
from datetime import timedelta
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import pytest
from typer.main import get_command

from longshift import underway, worker
from longshift.cli.app import app
from longshift.config import Config, load
from longshift.testing import run
from longshift_api import server
from tests.deploy.manifests import COMPONENT, K8S, QUEUE, Fleet, Manifest, called, containers, main_container, render

OVERLAYS = ("local", "kind", "production")
SECRETS = {
    "LONGSHIFT_DATABASE_URL": "postgresql://u:p@postgres:5432/longshift",
    "LONGSHIFT_REDIS_URL": "redis://redis:6379/0",
    "LONGSHIFT_ARTIFACTS_URL": "s3://bucket/prefix",
    "LONGSHIFT_API_KEY": "lsk_0123456789abcdef0123456789abcdef",
}
CONNECTIONS = {"worker": 9, "api": 8, "exporter": 2}
"""Of Postgres, for each process: LONGSHIFT_POOL_SIZE, and a worker's heartbeat."""


@pytest.fixture(scope="module")
def fleets() -> dict[str, Fleet]:
    return {name: Fleet(name, render(K8S / "overlays" / name)) for name in OVERLAYS}


@pytest.fixture(params=OVERLAYS)
def fleet(fleets: dict[str, Fleet], request: pytest.FixtureRequest) -> Fleet:
    return fleets[request.param]


@pytest.fixture
def production(fleets: dict[str, Fleet]) -> Fleet:
    return fleets["production"]


def seconds(value: timedelta) -> float:
    return value.total_seconds()


def config_of(fleet: Fleet, container: Manifest, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The settings as the container's process would load them."""
    settings = {name: value for name, value in fleet.settings(container).items() if name.startswith("LONGSHIFT_")}
    unknown = {name for name in settings if name.removeprefix("LONGSHIFT_").lower() not in Config.model_fields}
    assert not unknown, f"{fleet}: no settings of Longshift: {unknown}"
    with monkeypatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, SECRETS.get(name, value) if value == "SECRET" else value)
        return load()


# -- what a pod may do


def test_no_container_runs_as_root_or_writes_to_its_image_or_gains_rights(fleet: Fleet) -> None:
    for name, pod in fleet.pods:
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys(), name
        assert not any("hostPath" in volume for volume in pod["spec"].get("volumes", [])), name
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, f"{name}: {container['name']}"


def test_the_namespace_takes_restricted_pods_only(fleet: Fleet) -> None:
    (namespace,) = fleet.of("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_no_container_is_without_limits_of_memory_and_disk_and_none_has_its_cpu_throttled(fleet: Fleet) -> None:
    for name, pod in fleet.pods:
        for container in containers(pod):
            resources = container["resources"]
            assert {"memory", "ephemeral-storage"} <= resources["limits"].keys(), f"{name}: {container['name']}"
            assert {"cpu", "memory"} <= resources["requests"].keys(), f"{name}: {container['name']}"
            assert "cpu" not in resources["limits"], f"{name}: {container['name']}"


def test_our_containers_can_write_to_tmp_and_run_as_the_user_of_the_image(fleet: Fleet) -> None:
    for name, pod in fleet.ours:
        assert pod["spec"]["securityContext"]["runAsUser"] == 10001
        for container in containers(pod):
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "/tmp" in mounts, f"{name}: {container['name']}"


def test_a_token_is_in_the_pods_of_workers_that_keep_their_cost_and_nowhere_else(fleet: Fleet) -> None:
    for name, pod in fleet.pods:
        keeps = any("LONGSHIFT_POD_NAME" in fleet.settings(container) for container in containers(pod))
        assert pod["spec"]["automountServiceAccountToken"] is keeps, name
        assert keeps == (fleet.name != "local" and "worker" in name)
    for account in fleet.of("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_the_only_right_at_the_api_server_is_to_patch_pods_and_a_policy_narrows_that(production: Fleet) -> None:
    assert not production.of("ClusterRole", "ClusterRoleBinding")
    (role,), (binding,) = production.of("Role"), production.of("RoleBinding")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["patch"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    subject = {"kind": "ServiceAccount", "name": "longshift-worker", "namespace": "longshift"}
    assert binding["subjects"] == [subject]
    policy = production.one("ValidatingAdmissionPolicy", "longshift-pod-cost")["spec"]
    assert policy["failurePolicy"] == "Fail"
    (condition,) = policy["matchConditions"]
    user = f"system:serviceaccount:{subject['namespace']}:{subject['name']}"
    assert condition["expression"] == f"request.userInfo.username == '{user}'"
    own, unchanged = (each["expression"] for each in policy["validations"])
    assert own.endswith("request.userInfo.extra['authentication.kubernetes.io/pod-name'] == [object.metadata.name]")
    fields = re.findall(r"object\.(\S+) == oldObject\.(\S+)", unchanged)
    assert {before for before, after in fields if before == after} == {
        "spec", "metadata.?labels", "metadata.?ownerReferences", "metadata.?finalizers"
    }  # fmt: skip
    bound = production.one("ValidatingAdmissionPolicyBinding", "longshift-pod-cost")["spec"]
    assert bound == {"policyName": "longshift-pod-cost", "validationActions": ["Deny"]}


def test_no_pod_gets_settings_from_the_names_of_services(fleet: Fleet) -> None:
    """A Service `longshift` would set LONGSHIFT_PORT."""
    assert all(pod["spec"]["enableServiceLinks"] is False for _, pod in fleet.pods)


def test_images_have_an_explicit_version(fleet: Fleet) -> None:
    for name, pod in fleet.pods:
        for container in containers(pod):
            tag = container["image"].partition(":")[2]
            assert tag not in ("", "latest"), f"{name}: {container['image']}"
    (ours,) = {container["image"] for _, pod in fleet.ours for container in containers(pod)}
    assert ours.startswith("longshift:")


def test_no_secret_with_a_value_worth_hiding_is_in_the_manifests(fleet: Fleet) -> None:
    """Production has none at all; those of the local overlay are of databases that only the namespace reaches."""
    if fleet.name == "production":
        assert fleet.of("Secret") == []
    for name, pod in fleet.pods:
        for container in containers(pod):
            for variable in container.get("env", []):
                if re.search("PASSWORD|SECRET|API_KEY|_URL", variable["name"]):
                    assert "secretKeyRef" in variable.get("valueFrom", {}), f"{name}: {variable['name']}"
    assert not any("KEY" in key or "URL" in key for each in fleet.of("ConfigMap") for key in each["data"])


# -- what fits the code


def test_every_setting_in_the_manifests_is_one_and_loads(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, pod in fleet.ours:
        for container in containers(pod):
            config_of(fleet, container, monkeypatch)
    for deployment in fleet.components("worker"):
        queue = deployment["spec"]["selector"]["matchLabels"][QUEUE]
        config = config_of(fleet, main_container(deployment), monkeypatch)
        assert config.queues == (queue,)
        assert deployment["metadata"]["name"] == f"longshift-worker-{queue}"


def test_every_process_has_the_settings_that_it_cannot_do_without(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs: dict[str, tuple[Any, ...]] = {
        "api": ("database_url", "redis_url", "artifacts_url"),
        "worker": ("database_url", "redis_url", "artifacts_url"),
        "exporter": ("database_url",),
        "migrate": ("database_url",),
    }
    for _, pod in fleet.ours:
        for container in containers(pod):
            config = config_of(fleet, container, monkeypatch)
            for name in needs[container["args"][0]]:
                config.require(name)


def test_every_command_in_the_manifests_is_one_with_these_options(fleet: Fleet) -> None:
    commands: Any = get_command(app)
    for _, pod in fleet.ours:
        for container in containers(pod):
            assert "command" not in container, "the image's entrypoint passes signals on"
            name, *arguments = container["args"]
            commands.commands[name].make_context(name, list(arguments))


def test_no_process_starts_before_its_migration(fleet: Fleet) -> None:
    for deployment in fleet.of("Deployment"):
        (first,) = deployment["spec"]["template"]["spec"]["initContainers"]
        assert first["args"][:2] == ["migrate", "--check"]
        assert first["image"] == main_container(deployment)["image"]
    (job,) = fleet.of("Job")
    assert job["spec"]["template"]["spec"]["containers"][0]["args"][0] == "migrate"


def test_probes_name_ports_at_which_the_process_listens(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    for deployment in fleet.of("Deployment"):
        container = main_container(deployment)
        config = config_of(fleet, container, monkeypatch)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["metrics"] == config.metrics_port
        assert ports.get("http", config.port) == config.port
        assert config.host == "0.0.0.0", "the kubelet comes from outside of the pod"
        probes = {name: container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
        assert {probe["port"] for probe in probes.values()} == {"metrics"}
        assert probes["startupProbe"]["path"] == probes["livenessProbe"]["path"] == "/livez"
        assert probes["readinessProbe"]["path"] == "/readyz"


def test_workers_get_the_time_that_a_drain_may_take(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    for deployment in fleet.components("worker"):
        config = config_of(fleet, main_container(deployment), monkeypatch)
        steps = seconds(config.drain_grace) + worker.CUT_SHORT
        calls = seconds(config.step_timeout) + underway.RECORDING  # of irreversible tools: nobody cuts them short
        records = worker.LAST_RECORDS + worker.CUT_SHORT
        closing = worker.LAST_CALLS + 2 * seconds(config.database_timeout)
        granted = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert steps + calls + records + closing <= granted <= 1.1 * (steps + calls + records + closing)


def test_the_api_gets_the_time_for_the_requests_under_way(fleet: Fleet) -> None:
    (api,) = fleet.components("api")
    pause = main_container(api)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pause + server.GRACE < api["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


# -- what may be disturbed


def test_every_deployment_has_a_budget_that_a_drain_of_its_node_can_keep(fleet: Fleet) -> None:
    for deployment in fleet.of("Deployment"):
        component = deployment["spec"]["template"]["metadata"]["labels"][COMPONENT]
        budgets = [
            each
            for each in fleet.of("PodDisruptionBudget")
            if each["spec"]["selector"]["matchLabels"] == {COMPONENT: component}
        ]
        assert len(budgets) == 1, f"{called(deployment)}: {budgets}"  # two budgets for one pod: it cannot be evicted
        spec = budgets[0]["spec"]
        assert "minAvailable" not in spec, "with one replica nothing may go"
        assert spec["maxUnavailable"] in (1, "25%")  # a share is rounded up
        assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_rollouts_take_no_replica_away_before_another_is_there(fleet: Fleet) -> None:
    for deployment in fleet.of("Deployment"):
        strategy = deployment["spec"]["strategy"]
        if deployment["metadata"]["name"] == "longshift-exporter":
            assert strategy == {"type": "Recreate"}, "two would count everything twice"
        else:
            assert strategy["rollingUpdate"]["maxUnavailable"] == 0


def test_replicas_are_spread_over_nodes_and_zones(fleet: Fleet) -> None:
    for deployment in fleet.components("api") + fleet.components("worker"):
        spec = deployment["spec"]["template"]["spec"]
        keys = {each["topologyKey"] for each in spec["topologySpreadConstraints"]}
        assert keys == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}
        for each in spec["topologySpreadConstraints"]:
            labels = deployment["spec"]["selector"]["matchLabels"]
            assert each["labelSelector"]["matchLabels"].items() <= labels.items()


# -- who scales


def test_one_scaler_for_a_deployment_and_no_replicas_beside_it(fleet: Fleet) -> None:
    scaled = [each["spec"]["scaleTargetRef"]["name"] for each in fleet.of("HorizontalPodAutoscaler", "ScaledObject")]
    assert len(scaled) == len(set(scaled))
    for deployment in fleet.of("Deployment"):
        named = "replicas" in deployment["spec"]
        assert named == (deployment["metadata"]["name"] == "longshift-exporter"), "kubectl scale must outlast an apply"


def test_the_target_of_the_backlog_is_four_fifths_of_a_workers_slots(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scaled in fleet.of("ScaledObject"):
        deployment = fleet.one("Deployment", scaled["spec"]["scaleTargetRef"]["name"])
        config = config_of(fleet, main_container(deployment), monkeypatch)
        work, age = scaled["spec"]["triggers"]
        assert float(work["metadata"]["targetQueryValue"]) == pytest.approx(0.8 * config.capacity)
        (queue,) = config.queues
        for trigger in (work, age):
            assert f"queue = '{queue}'" in trigger["metadata"]["query"]


def test_a_second_queue_is_scaled_by_the_same_rule_and_may_go_to_zero_while_the_first_may_not() -> None:
    first, second = (
        Fleet(name, [each for each in render(K8S / "components" / name) if each["kind"] == "ScaledObject"])
        for name in ("keda", "queue-gpu")
    )
    (default,), (gpu,) = first.objects, second.objects
    queries = [trigger["metadata"]["query"] for trigger in default["spec"]["triggers"]]
    assert [trigger["metadata"]["query"] for trigger in gpu["spec"]["triggers"]] == [
        query.replace("'default'", "'gpu'") for query in queries
    ]
    assert default["spec"]["minReplicaCount"] >= 1, "the sweeper lives in workers"
    assert gpu["spec"]["minReplicaCount"] == 0


def test_the_connections_of_all_replicas_are_what_the_guide_says(production: Fleet) -> None:
    most = {each["spec"]["scaleTargetRef"]["name"]: each for each in production.of("ScaledObject")}
    api = production.one("HorizontalPodAutoscaler", "longshift-api")["spec"]["maxReplicas"]
    workers = most["longshift-worker-default"]["spec"]["maxReplicaCount"]
    config = Config.model_fields["pool_size"].default
    assert (CONNECTIONS["worker"], CONNECTIONS["api"]) == (config + 1, config)
    total = workers * CONNECTIONS["worker"] + api * CONNECTIONS["api"] + CONNECTIONS["exporter"]
    guide = (K8S.parent / "docs" / "how-to" / "kubernetes.md").read_text()
    assert f"{workers} x 9 + {api} x 8 + 2 = {total}" in guide


def test_the_commands_of_the_guide_name_what_is_there() -> None:
    guide = (K8S.parent / "docs" / "how-to" / "kubernetes.md").read_text()
    for block in re.findall(r"^```console\n(.*?)^```", guide, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            for path in (word for word in words if word.startswith("k8s/")):
                assert (K8S.parent / path).exists(), line


def test_the_agent_of_the_trial_in_kind_runs() -> None:
    spec = spec_from_file_location("smoke", K8S / "overlays" / "kind" / "smoke.py")
    assert spec is not None
    assert spec.loader is not None
    smoke = module_from_spec(spec)
    spec.loader.exec_module(smoke)
    assert run(smoke.smoke, 3, fake={smoke.tick: lambda number: number}).output == [0, 1, 2]
    assert "json_array_length(output) <> input::text::int" in (K8S / "kind.sh").read_text(), "what it is checked by"
