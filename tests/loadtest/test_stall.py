"""Tests of the detection of a client that stands still, with a virtual clock and with a stopped process."""

import signal
import threading
import time
from pathlib import Path

import gevent
import psutil
import pytest

from slimserve.core.openai_client import Target
from slimserve.loadtest.run import run_suite
from slimserve.loadtest.settings import LoadSettings
from slimserve.loadtest.stall import StallWatch, longest_stall_s
from tests.conftest import measures_time

pytestmark = measures_time


class Clocks:
    """A clock of the load, and one that also continues while the machine is suspended."""

    def __init__(self) -> None:
        self.awake_s = self.elapsed_s = 100.0

    def advance(self, awake_s: float, suspended_s: float = 0.0) -> None:
        self.awake_s += awake_s
        self.elapsed_s += awake_s + suspended_s


def test_only_times_much_longer_than_the_interval_are_stalls() -> None:
    clocks = Clocks()
    watch = StallWatch(95.0, lambda: clocks.awake_s, lambda: clocks.elapsed_s)
    for awake_s, suspended_s in ((0.05, 0.0), (0.1, 0.0), (2.05, 0.0), (0.05, 0.0), (0.05, 60.0), (0.05, 0.0)):
        clocks.advance(awake_s, suspended_s)
        watch.tick()
    assert watch.stalls == [pytest.approx((5.15, 7.2, 2.0)), pytest.approx((7.25, 7.3, 60.0))]


def test_only_stalls_while_requests_of_the_window_are_open_count() -> None:
    stalls = [(0.5, 3.5, 2.95), (6.0, 7.0, 0.95), (14.0, 15.0, 0.95), (21.0, 29.0, 7.95)]
    assert longest_stall_s(stalls, begin_s=5.0, end_s=20.0) == 0.95
    assert longest_stall_s(stalls, begin_s=3.0, end_s=20.0) == 2.95
    assert longest_stall_s(stalls, begin_s=5.0, end_s=22.0) == 7.95
    assert longest_stall_s([], begin_s=5.0, end_s=20.0) == 0.0


def test_a_blocked_event_loop_is_a_stall() -> None:
    begin_s = time.perf_counter()
    watch = StallWatch(begin_s)
    watching = gevent.spawn(watch.run)
    gevent.sleep(0.2)
    time.sleep(0.6)  # blocks the loop
    gevent.sleep(0.2)
    watching.kill()
    assert 0.5 < longest_stall_s(watch.stalls, 0.0, time.perf_counter() - begin_s) < 0.9


@pytest.mark.parametrize("mode", ["open", "closed"])
def test_a_run_whose_client_was_stopped_is_invalid_and_keeps_all_its_requests(
    fake_url: str, tmp_path: Path, mode: str
) -> None:
    settings = LoadSettings(rate="20" if mode == "open" else "", users=2, duration_s=5, warmup_s=0, cooldown_s=0)
    rows_file = tmp_path / "reasoning.rows.jsonl"
    is_over = threading.Event()

    def stop_for_a_while() -> None:
        while not (rows_file.exists() and rows_file.stat().st_size):
            if is_over.wait(0.1):
                return
        (client,) = [
            process for process in psutil.Process().children() if str(rows_file) in " ".join(process.cmdline())
        ]
        client.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        client.send_signal(signal.SIGCONT)

    stopper = threading.Thread(target=stop_for_a_while)
    stopper.start()
    try:
        summary, rows = run_suite("reasoning", Target(fake_url, "good"), settings, tmp_path)
    finally:
        is_over.set()
        stopper.join()
    assert 1.2 < summary.client.longest_stall_s < 2.5
    reason = f"the client stood still for {summary.client.longest_stall_s:.1f} s"
    assert any(one.startswith(reason) for one in summary.invalid)
    if mode == "open":
        assert sorted(row.scheduled_s for row in rows) == pytest.approx(settings.scheduled_s())
