#!/usr/bin/env bash
# Tries the manifests out in a kind cluster: KEDA scales, kubectl scales, a rollout and a drained node lose nothing.
#
#     k8s/kind.sh up       make the cluster, or bring the one that is there up to date
#     k8s/kind.sh smoke    give it work, and check
#     k8s/kind.sh down     remove it
#
# Needs docker, kind and kubectl, and the image longshift:local, which `up` builds if it is not there. All of it may be repeated.
set -euo pipefail

readonly CLUSTER=longshift
readonly KEDA=2.20.1
readonly KEDA_MANIFESTS="https://github.com/kedacore/keda/releases/download/v${KEDA}/keda-${KEDA}.yaml"
readonly WORKERS=longshift-worker-default
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT

k() { kubectl --context "kind-${CLUSTER}" --namespace longshift "$@"; }

say() { printf '== %s\n' "$*" >&2; }

fail() {
    printf 'FAILED: %s\n' "$*" >&2
    k get pods,jobs,scaledobjects,hpa -o wide >&2 || true
    k logs --selector app.kubernetes.io/component=worker --tail 40 --prefix >&2 || true
    exit 1
}

# until_true WHAT SECONDS COMMAND...: run the command every two seconds until it succeeds
until_true() {
    local what=$1 end=$((SECONDS + $2))
    shift 2
    until "$@"; do
        if ((SECONDS > end)); then fail "$what"; fi
        sleep 2
    done
    say "$what: yes"
}

up() {
    if ! kind get clusters | grep -qx "$CLUSTER"; then
        kind create cluster --name "$CLUSTER" --wait 120s
    fi
    if ! docker image inspect longshift:local > /dev/null 2>&1; then
        docker build --file "$ROOT/docker/Dockerfile" --tag longshift:local "$ROOT"
    fi
    kind load docker-image longshift:local --name "$CLUSTER"
    # on the server's side: what KEDA defines is too large for kubectl's own annotation
    kubectl --context "kind-${CLUSTER}" apply --server-side --force-conflicts --filename "$KEDA_MANIFESTS"
    kubectl --context "kind-${CLUSTER}" --namespace keda wait deployment --all --for condition=Available --timeout 300s
    k apply --kustomize "$ROOT/k8s/overlays/local"
    k rollout status statefulset/postgres --timeout 300s
    k rollout status deployment/longshift-api --timeout 300s
    # after the migration, which makes what the role may read; and before KEDA asks, which tries again less and less often
    psql_in < "$ROOT/k8s/components/keda/role.sql"
    psql_in <<< "ALTER ROLE keda PASSWORD 'local'"
    k apply --kustomize "$ROOT/k8s/overlays/kind"
    k rollout status "deployment/$WORKERS" --timeout 900s
    k rollout status deployment/longshift-exporter --timeout 300s
    k wait "scaledobject/$WORKERS" --for condition=Ready --timeout 120s
}

psql_in() {
    k exec --stdin statefulset/postgres -- psql --username longshift --dbname longshift --no-align --tuples-only \
        --quiet --set ON_ERROR_STOP=1
}

# The command line in a pod of the API, which has the key.
longshift() { k exec --stdin deployment/longshift-api --container api -- longshift "$@"; }

# submit TURNS STEPS: the id of a batch
submit() {
    local line
    for ((line = 0; line < $1; line++)); do printf '{"agent": "smoke", "input": %d}\n' "$2"; done | longshift batch -
}

open_turns() { psql_in <<< "SELECT count(*) FROM turns WHERE status NOT IN ('succeeded', 'failed', 'cancelled', 'expired')"; }
other_ends() { psql_in <<< "SELECT count(*) FROM turns WHERE status IN ('failed', 'cancelled', 'expired')"; }
running() { psql_in <<< "SELECT count(*) FROM sessions WHERE lease_worker IS NOT NULL"; }
ready() { k get "deployment/$WORKERS" --output 'jsonpath={.status.readyReplicas}'; }
pods() { k get pods --selector app.kubernetes.io/component=worker --output name | wc -l; }
# recorded twice, or not at all: each turn has as many results as steps
odd_turns() {
    psql_in <<< "SELECT count(*) FROM turns WHERE status = 'succeeded' AND json_array_length(output) <> input::text::int"
}

is_none_open() { [[ $(open_turns) == 0 ]]; }
is_some_running() { (($(running || true) + 0 > 0)); }
has_ready() { [[ $(ready) == "$1" ]]; }
has_ready_at_least() { (($(ready || true) + 0 >= $1)); }
has_pods() { [[ $(pods) == "$1" ]]; }
costs() {
    k get pods --selector app.kubernetes.io/component=worker \
        --output 'jsonpath={.items[*].metadata.annotations.controller\.kubernetes\.io/pod-deletion-cost}'
}
has_cost() { [[ $(costs) == *[1-9]* ]]; }

scaler() { k annotate "scaledobject/$WORKERS" --overwrite "$@"; }

smoke() {
    say "kubectl scale, without the autoscaler"
    scaler autoscaling.keda.sh/paused=true
    k scale "deployment/$WORKERS" --replicas 2
    until_true "two workers are ready" 180 has_ready 2
    submit 10 40
    until_true "turns run" 60 is_some_running
    until_true "a worker says what its end would cost" 60 has_cost
    k scale "deployment/$WORKERS" --replicas 1
    until_true "one worker has drained" 180 has_pods 1
    say "a rollout in the middle"
    k rollout restart "deployment/$WORKERS"
    k rollout status "deployment/$WORKERS" --timeout 300s
    until_true "every turn has ended" 300 is_none_open

    say "a worker may change no pod but its own"
    local other
    other=$(k get pods --selector app.kubernetes.io/component=api --output name | head -n 1)
    if k patch "$other" --as system:serviceaccount:longshift:longshift-worker --type merge \
        --patch '{"metadata": {"labels": {"app.kubernetes.io/component": "worker"}}}'; then
        fail "the policy of components/pod-cost let a foreign pod be changed"
    fi

    say "KEDA scales up and down"
    scaler autoscaling.keda.sh/paused-
    submit 60 20
    until_true "three workers or more are ready" 240 has_ready_at_least 3
    until_true "every turn has ended" 600 is_none_open
    until_true "one worker is left" 600 has_pods 1

    [[ $(other_ends) == 0 ]] || fail "turns that did not succeed: $(other_ends)"
    [[ $(odd_turns) == 0 ]] || fail "turns whose output is not what their steps gave: $(odd_turns)"
    longshift probe ready
    say "nothing is lost"
}

down() { kind delete cluster --name "$CLUSTER"; }

case ${1:-} in
    up | smoke | down) "$1" ;;
    *)
        echo "usage: k8s/kind.sh up|smoke|down" >&2
        exit 2
        ;;
esac
