"""Load a server with a workload's traffic through Locust, and say what a client saw.

`suites/` are locustfiles, usable with plain `locust -f` too; `stream` times one request at
the socket; `rows` are its raw measurements; `summary` turns rows into figures; `run` drives
it all from the command line.
"""
