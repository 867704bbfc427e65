"""A load that cannot run ends within seconds with its own reason in one line, whatever a workload's code does."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slimserve.core.errors import UserError, exception_text
from slimserve.core.openai_client import Target
from slimserve.loadtest.run import run_suite
from slimserve.loadtest.settings import LoadSettings
from tests.conftest import measures_time

_WORKLOAD = """
import os, sys
from slimserve.core.errors import UserError
from slimserve.workloads.interface import ChatPrompt, Workload


class Broken(Workload):
    name = "broken"
    primary_metric = "accuracy"

    def make_prompts(self, split, num_prompts, seed=0):
        prompts = [ChatPrompt(({"role": "user", "content": "?"},), 5, "", "", "", {}) for _ in range(num_prompts)]
        if num_prompts > 1:
            FAULT
        return prompts

    def metric_data(self, prompts, answers):
        return {}


WORKLOAD = Broken()
"""
_LINE = 14
"""Line of the fault in the file."""
FAULTS = {
    "float('n/a')": "ValueError: could not convert string to float: 'n/a'",
    "float('2023-11-16T18:15:46Z')": "ValueError: could not convert string to float: '2023-11-16T18:15:46Z'",
    "int(None)": "TypeError: int() argument must be a string, a bytes-like object or a real number, not 'NoneType'",
    "{}['title']": "KeyError: 'title'",
    "[][3]": "IndexError: list index out of range",
    "None.title": "AttributeError: 'NoneType' object has no attribute 'title'",
    "1 / 0": "ZeroDivisionError: division by zero",
    "'\\ud83d'.encode()": "UnicodeEncodeError: 'utf-8' codec can't encode character",
    "open('/nowhere')": "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere'",
    "import nowhere": "ModuleNotFoundError: No module named 'nowhere'",
    "raise MemoryError": "MemoryError",
    "raise RecursionError('deep')": "RecursionError: deep",
    "assert not prompts, 'two\\nlines'": "AssertionError: two lines",
    "raise StopIteration": "StopIteration",
    "raise UserError('data', 'a.jsonl:3', 'has no title', 'add it')": "data: 'a.jsonl:3' has no title; add it",
    "prompts[1] = None": "AssertionError",
    "prompts[1].messages[0]['content'] = '\\ud83d'": "broken: 'prompt 2' cannot be sent as JSON (UnicodeEncodeError",
    "prompts[1].messages[0]['content'] = object()": "broken: 'prompt 2' cannot be sent as JSON (TypeError",
}


def write_workload(folder: Path, name: str, fault: str) -> Path:
    file = folder / f"{name}.py"
    file.write_text(_WORKLOAD.replace("FAULT", fault))
    return file


def test_every_exception_of_a_worker_ends_the_run_with_its_reason_and_its_line(tmp_path: Path) -> None:
    files = [write_workload(tmp_path, f"w{number}", fault) for number, fault in enumerate(FAULTS)]
    command = [sys.executable, str(Path(__file__).with_name("guarded_run.py")), str(tmp_path), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == len(FAULTS)
    for file, (fault, text), (failure, num_quits, exit_code) in zip(files, FAULTS.items(), reports, strict=True):
        line = str(UserError(**failure))
        assert text.replace("FILE", str(file)) in line, fault
        assert text.startswith(("data:", "workload:", "broken:", "Assertion")) or f"{file}:{_LINE}" in line, fault
        assert (num_quits, exit_code) == (1, 2), fault


@measures_time
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("{}['title']", r"failed \(KeyError: 'title', .*w.py:14\); read .*broken.locust.log"),
        ("os._exit(7)", r"exit status 7|0 of 2 workers, as the others ended before the load began; read .*locust.log"),
    ],
)
def test_a_worker_that_fails_or_dies_ends_a_real_run(
    fake_url: str, tmp_path: Path, fault: str, message: str, processes: int
) -> None:
    file = write_workload(tmp_path, "w", fault)
    settings = LoadSettings(rate="9", duration_s=1, warmup_s=0, cooldown_s=0, processes=processes)
    begun_s = time.monotonic()
    with pytest.raises(UserError, match=message):
        run_suite(str(file), Target(fake_url, "good"), settings, tmp_path / "out")
    assert time.monotonic() - begun_s < 60


def test_a_fault_of_the_first_prompt_is_found_before_the_load(tmp_path: Path) -> None:
    file = write_workload(tmp_path, "first", "pass\n        None.title")
    with pytest.raises(UserError, match=r"cannot make its requests \(AttributeError: .*first.py:15\)"):
        run_suite(str(file), Target("http://127.0.0.1:1", "m"), LoadSettings(rate="9"), tmp_path / "out")


def test_a_verifier_that_fails_leaves_the_measured_latencies(fake_url: str, tmp_path: Path) -> None:
    file = write_workload(tmp_path, "verifier", "pass")
    file.write_text(file.read_text().replace("return {}", "return {}['bug']"))
    settings = LoadSettings(rate="9", duration_s=1, warmup_s=0, cooldown_s=0)
    summary, _ = run_suite(str(file), Target(fake_url, "good"), settings, tmp_path / "out")
    assert summary.num_succeeded == summary.num_requests > 0
    assert summary.ttft_s.p50 is not None
    assert any("could not be evaluated: KeyError: 'bug', " in warning for warning in summary.warnings)


def test_an_exception_is_one_line_with_the_users_file() -> None:
    try:
        json.loads("{")
    except ValueError as error:
        text = exception_text(error)
    assert text.startswith("JSONDecodeError: Expecting property name")
    assert text.endswith(f"{__file__}:{text.rpartition(':')[2]}")
    assert exception_text(ValueError("a\nb")) == "ValueError: a b"
    assert exception_text(KeyError()) == "KeyError"
