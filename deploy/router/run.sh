#!/bin/sh
# run.sh URL URL…: one address for several replicas of ONE model, by vLLM's own router (https://github.com/vllm-project/router).
#
#   python3 -m venv router && router/bin/pip install vllm-router==0.1.17
#   PATH=router/bin:$PATH ROUTER_PORT=8080 deploy/router/run.sh http://10.0.0.1:8000 http://10.0.0.2:8000
#
# What for: our gateway picks among several variants on one machine, by name, weight and user; this router picks among
# equal replicas on several machines, by which of them has the prompt's prefix in its cache. It knows no model names, so
# a replica may itself be a whole slimserve stack, as long as all are the same.
#
# Tried with two stand-ins for an engine (docs/deploy.md): every route of vLLM and ours passes but /rerank and /v1/rerank,
# whose answers the router rebuilds and fails on: use /v2/rerank or /v1/score behind it. Its /metrics is a port of its own.
set -eu
[ $# -gt 0 ] || { echo "usage: ROUTER_HOST=127.0.0.1 ROUTER_PORT=8080 run.sh URL [URL…]" >&2; exit 2; }

# cache_aware: candidates behind one member history meet their prefix where it was computed. Under light load it sends
#   almost everything to one replica; from 8 requests of difference on it evens out (the default waits for 64).
# 2 tries: a replica that answers 429 (queue full) or 503 (drain) hands over to the other once; the default of 5 would
#   multiply an overload.
# /ready: a replica that drains leaves at once; /health stays 200 while it drains.
# 16 MiB: our own limit on bodies is 8 MiB, the router's default 512.
exec vllm-router \
    --host "${ROUTER_HOST:-127.0.0.1}" --port "${ROUTER_PORT:-8080}" \
    --prometheus-host "${ROUTER_HOST:-127.0.0.1}" --prometheus-port "${ROUTER_METRICS_PORT:-29000}" \
    --policy "${ROUTER_POLICY:-cache_aware}" --balance-abs-threshold 8 \
    --health-check-endpoint "${ROUTER_HEALTH:-/ready}" --health-check-interval-secs 5 --health-failure-threshold 2 \
    --worker-startup-check-interval 5 --worker-startup-timeout-secs 900 \
    --retry-max-retries 2 --max-payload-size 16777216 --request-timeout-secs 330 \
    --worker-urls "$@"
