"""Prepares the run of each given workload as Locust would, in one process, and prints what the load then reports.

python guarded_run.py FOLDER FILE.py … prints one JSON line per file.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
from locust.env import Environment

from slimserve.loadtest.settings import LoadSettings, SuiteOptions
from slimserve.loadtest.user import _TRAFFIC_FIELDS, RowFile, TrafficRun, _guarded


class StoppableRunner:
    num_quits = 0

    def quit(self) -> None:
        self.num_quits += 1


def prepare(environment: Any) -> None:
    run = environment.slimserve_run = TrafficRun(environment)
    run.prepare()
    run.begin(0.0, 0, 1)


def main() -> None:
    folder = Path(sys.argv[1])
    for file in sys.argv[2:]:
        defaults = {name.removesuffix("_s"): LoadSettings.model_fields[name].default for name in _TRAFFIC_FIELDS}
        options = SimpleNamespace(
            **defaults,
            **dict(SuiteOptions()),
            suite=file,
            model="m",
            load_seconds=1.0,
            headless=True,
            rows=str(folder / "rows"),
            client_report=str(folder / "report"),
        )
        runner = StoppableRunner()
        environment: Any = Environment(host="http://127.0.0.1:1", parsed_options=options)
        environment.runner = runner
        environment.slimserve_sink = RowFile(environment)
        (folder / "report").unlink(missing_ok=True)
        _guarded(prepare)(environment)
        gevent.sleep(0.05)
        report = json.loads((folder / "report").read_bytes())
        print(json.dumps([report.get("failure"), runner.num_quits, environment.process_exit_code]), flush=True)


if __name__ == "__main__":
    main()
