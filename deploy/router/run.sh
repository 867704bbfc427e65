#!/bin/sh
# run.sh URL URL…: serve several replicas of ONE model under one address with vLLM's router (https://github.com/vllm-project/router).
#
#   python3 -m venv router && router/bin/pip install vllm-router==0.1.17
#   PATH=router/bin:$PATH ROUTER_PORT=8080 deploy/router/run.sh http://10.0.0.1:8000 http://10.0.0.2:8000
#
# Our gateway chooses among variants on one machine, by name, weight and user. This router chooses among equal replicas on
# several machines: it prefers the replica whose cache has the prompt's prefix. It knows no model names, so a replica may be
# a `slimserve serve` with several variants, if all replicas are the same.
#
# Tested with two mock engines (docs/deploy.md): all routes work except /rerank and /v1/rerank, whose answers the router
# fails to rebuild. Use /v2/rerank or /v1/score behind it. The router has its own port for /metrics.
set -eu
[ $# -gt 0 ] || { echo "usage: ROUTER_HOST=127.0.0.1 ROUTER_PORT=8080 run.sh URL [URL…]" >&2; exit 2; }

# cache_aware: sends candidates with the same user history to the replica that computed this prefix. Under light load one
#   replica gets almost everything; from a difference of 8 requests the router balances (its default is 64).
# 2 tries: after 429 (queue full) or 503 (drain) the router tries another replica once. Its default of 5 would multiply an
#   overload.
# /ready: a replica that drains gets no new requests. /health stays 200 during the drain.
# 16 MiB: limit for bodies. Our own default is 8 MiB, the router's is 512 MiB.
exec vllm-router \
    --host "${ROUTER_HOST:-127.0.0.1}" --port "${ROUTER_PORT:-8080}" \
    --prometheus-host "${ROUTER_HOST:-127.0.0.1}" --prometheus-port "${ROUTER_METRICS_PORT:-29000}" \
    --policy "${ROUTER_POLICY:-cache_aware}" --balance-abs-threshold 8 \
    --health-check-endpoint "${ROUTER_HEALTH:-/ready}" --health-check-interval-secs 5 --health-failure-threshold 2 \
    --worker-startup-check-interval 5 --worker-startup-timeout-secs 900 \
    --retry-max-retries 2 --max-payload-size 16777216 --request-timeout-secs 330 \
    --worker-urls "$@"
