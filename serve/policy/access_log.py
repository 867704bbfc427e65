"""The access log: one line per request, without keys, headers, query strings or bodies."""

from __future__ import annotations

import logging
import sys

from slimserve.serve.policy.routes import OPEN_PATHS

CLIENT_CLOSED_REQUEST = 499
"""Status in logs and metrics of a request whose client disconnected before the end of its answer (nginx's code)."""
_access = logging.getLogger("slimserve.access")


def log_request(
    request_id: str, method: str, path: str, route: str, status: int, duration_s: float, **fields: object
) -> None:
    """Write one line in `key=value` form; successful probes and scrapes (open paths) have level DEBUG.

    `route` is the path as it may be printed. Further fields are printed after the status.
    """
    level = logging.DEBUG if path in OPEN_PATHS and status < 400 else logging.INFO
    if _access.isEnabledFor(level):
        further = "".join(f" {name}={value}" for name, value in fields.items())
        line = "request_id=%s method=%s route=%s status=%d duration_ms=%.1f%s"
        _access.log(level, line, request_id, method, route, status, duration_s * 1e3, further)


def log_to_stderr() -> None:
    """Send the log lines of slimserve to standard error, unless they have a handler already."""
    logger = logging.getLogger("slimserve")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
