"""Load a server with a workload's requests through Locust and measure what its clients see.

`suites/` holds locustfiles, which also run with plain `locust -f`. `http_client` and `sse` time each request at the
socket, `rows` holds the raw measurements, `summary` computes the metrics and `run` drives a complete run.
"""
