#!/usr/bin/env bash
# Brings the whole of Longshift up with Docker Compose, gives it work, and checks what a user and an operator would see.
#
#     docker/smoke.sh up       build the image, start everything, wait until it is healthy
#     docker/smoke.sh smoke    give it work, and check
#     docker/smoke.sh down     stop it, and remove its data
#
# Needs docker with compose, curl and jq.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
export LONGSHIFT_API_KEY=${LONGSHIFT_API_KEY:-lsk_of_the_smoke_test_0123456789}

compose() { docker compose --file "$ROOT/docker/compose.yaml" "$@"; }

# The command line in a container of the API, through nginx.
longshift() { compose exec --no-TTY --env LONGSHIFT_URL=http://nginx:8080 api longshift "$@"; }

prometheus() { curl --fail --silent --show-error --get http://127.0.0.1:9090/api/v1/query --data-urlencode "query=$1"; }

say() { printf '== %s\n' "$*" >&2; }

fail() {
    printf 'FAILED: %s\n' "$*" >&2
    compose ps --all >&2 || true
    compose logs --tail 40 >&2 || true
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
    compose up --build --detach --wait || fail "not everything is healthy"
    compose up --detach --wait --scale api=3 --scale worker=3 || fail "it does not scale"
}

is_scraped() { [[ $(prometheus 'count(up == 1)' | jq -r '.data.result[0].value[1]') == 7 ]]; }
is_measured() { [[ $(prometheus 'sum(longshift_turns_ended_total{status="succeeded"})' | jq -r '.data.result[0].value[1]') -ge 1 ]]; }

smoke() {
    say "a conversation, over the replicas and the workers"
    local turn session answer n
    turn=$(longshift submit greeting '"Ada"' --wait --json)
    session=$(jq -r .session_id <<< "$turn")
    for n in 2 3 4 5 6; do
        answer=$(longshift submit greeting '"Grace"' --session "$session" --wait)
        [[ $answer == *"number $n"* ]] || fail "greeting number $n was: $answer"
    done

    say "a batch, while the workers are replaced one after the other"
    for n in $(seq 30); do printf '{"agent": "greeting", "input": "%d"}\n' "$n"; done > /tmp/longshift-smoke.jsonl
    longshift batch - --wait < /tmp/longshift-smoke.jsonl &
    local batch=$! worker
    for worker in $(compose ps --quiet worker); do
        docker stop --timeout 120 "$worker" > /dev/null
        [[ $(docker inspect --format '{{.State.ExitCode}}' "$worker") == 0 ]] || fail "a worker did not end in order"
        docker start "$worker" > /dev/null
    done
    wait "$batch" || fail "the batch has lost something"

    say "what operators see"
    longshift probe ready
    longshift doctor
    [[ $(curl --silent --output /dev/null --write-out '%{http_code}' http://127.0.0.1:8420/metrics) == 404 ]] || fail "/metrics is public"
    until_true "Prometheus sees three replicas, three workers and the exporter" 60 is_scraped
    until_true "turns are counted" 60 is_measured
    curl --fail --silent http://127.0.0.1:9090/api/v1/rules | jq --exit-status '.data.groups[0].rules | length > 0' > /dev/null
    curl --fail --silent http://127.0.0.1:3000/api/dashboards/uid/longshift > /dev/null || fail "Grafana has no dashboard"
    say "all is well"
}

down() { compose down --volumes --remove-orphans; }

case ${1:-} in
    up | smoke | down) "$1" ;;
    *)
        echo "usage: docker/smoke.sh up|smoke|down" >&2
        exit 2
        ;;
esac
