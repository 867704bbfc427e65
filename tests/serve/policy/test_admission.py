"""Tests of admission: slots, the queue, rejections and the order.

They run on a virtual clock, so that their times are exact and do not depend on the machine.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from slimserve.serve.policy.admission import Admission
from slimserve.serve.policy.errors import ClientDisconnected, Rejection
from slimserve.serve.policy.limits import Limits


class VirtualClock(selectors.DefaultSelector):
    """A selector that does not wait: the time jumps to the next timer of the loop."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now_s += timeout or 0.0
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a virtual clock."""

    def __init__(self) -> None:
        self._virtual = VirtualClock()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now_s


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(asyncio.wait_for(test(), 10))


def never() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


def admission_of(seen: list[tuple[int, int]] | None = None, **limits: Any) -> Admission:
    keep = [] if seen is None else seen
    return Admission(Limits(**{"max_running": 2, "max_queued": 2} | limits), lambda *now: keep.append(now))


def test_slots_go_to_waiting_requests_in_their_order() -> None:
    async def test() -> None:
        seen: list[tuple[int, int]] = []
        admission = admission_of(seen)
        order: list[int] = []

        async def request_slot(number: int) -> None:
            await admission.acquire(never)
            order.append(number)

        tasks = [asyncio.create_task(request_slot(number)) for number in range(4)]
        await asyncio.sleep(0)
        assert (order, admission.num_running, admission.num_queued) == ([0, 1], 2, 2)
        with pytest.raises(Rejection) as rejected:
            await admission.acquire(never)
        assert rejected.value.code == "queue_full"
        admission.release(1.0)
        # A new request does not overtake a waiting one.
        with pytest.raises(Rejection):
            admission.release(1.0)
            await asyncio.gather(*(admission.acquire(never) for _ in range(3)))
        await asyncio.gather(*tasks[2:])
        assert order == [0, 1, 2, 3]
        assert max(running for running, _ in seen) == 2

    run(test)


def test_a_request_that_waits_too_long_or_disconnects_leaves_the_queue_at_once() -> None:
    async def test() -> None:
        admission = admission_of(max_running=1, queue_timeout_s=0.05)
        await admission.acquire(never)
        with pytest.raises(Rejection) as rejected:
            await admission.acquire(never)
        assert rejected.value.code == "queue_timeout"
        left = never()
        waiting = asyncio.create_task(admission.acquire(lambda: left))
        await asyncio.sleep(0)
        assert admission.num_queued == 1
        left.set_result(None)
        with pytest.raises(ClientDisconnected):
            await waiting
        assert (admission.num_running, admission.num_queued) == (1, 0)

    run(test)


def test_a_slot_given_to_a_cancelled_request_is_not_lost() -> None:
    async def test() -> None:
        admission = admission_of(max_running=1)
        await admission.acquire(never)
        waiting = asyncio.create_task(admission.acquire(never))
        await asyncio.sleep(0)
        admission.release(0.1)  # the waiting request has the slot now, but has not run yet
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.wait_for(admission.acquire(never), 1)
        assert (admission.num_running, admission.num_queued) == (1, 0)

    run(test)


def test_closing_rejects_queued_and_new_requests_and_keeps_running_ones() -> None:
    async def test() -> None:
        admission = admission_of(max_running=1)
        await admission.acquire(never)
        waiting = asyncio.create_task(admission.acquire(never))
        await asyncio.sleep(0)
        admission.close()
        with pytest.raises(Rejection) as rejected:
            await waiting
        assert rejected.value.code == "draining"
        with pytest.raises(Rejection) as rejected:
            admission.check()
        assert rejected.value.code == "draining"
        assert admission.num_running == 1
        admission.release(0.1)
        assert admission.num_running == 0

    run(test)


def test_retry_after_is_the_time_to_serve_the_queue_at_the_current_pace() -> None:
    async def test() -> None:
        admission = admission_of(max_running=2, max_queued=3)
        for _ in range(60):
            await admission.acquire(never)
            admission.release(8.0)
        assert admission.service_s == pytest.approx(8.0, rel=0.01)
        tasks = [asyncio.create_task(admission.acquire(never)) for _ in range(5)]
        await asyncio.sleep(0)
        # Four would be waiting, two are served every 8 s.
        assert admission.retry_after_s() == 16
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(test)


async def overload(admission: Admission, service_s: Callable[[], float]) -> tuple[list[float], int]:
    """Return the sorted times of the accepted requests and the number of rejected ones at ten times the capacity."""
    loop = asyncio.get_running_loop()
    taken: list[float] = []
    num_rejected = 0

    async def request_slot() -> None:
        nonlocal num_rejected
        begin = loop.time()
        try:
            await admission.acquire(never)
        except Rejection:
            num_rejected += 1
            return
        seconds = service_s()
        await asyncio.sleep(seconds)
        admission.release(seconds)
        taken.append(loop.time() - begin)

    request_slots = []
    for _ in range(100):  # 8 arrive where 0.8 could be served
        request_slots += [asyncio.create_task(request_slot()) for _ in range(8)]
        await asyncio.sleep(0.01)
    await asyncio.gather(*request_slots)
    return sorted(taken), num_rejected


def test_at_ten_times_the_load_accepted_requests_take_less_than_twice_the_service_time() -> None:
    async def test() -> None:
        draw = random.Random(3)
        taken, num_rejected = await overload(
            admission_of(max_running=8, max_queued=4), lambda: draw.uniform(0.06, 0.14)
        )
        assert num_rejected > 600
        assert len(taken) >= 60  # the slots were never empty
        assert taken[int(len(taken) * 0.99) - 1] <= 2 * 0.139

    run(test)


def test_requests_that_end_together_do_not_make_a_new_one_wait_for_a_full_service_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        admission = admission_of(max_running=8, max_queued=4)
        admission.service_s = 0.1
        taken, _ = await overload(admission, lambda: 0.1)
        assert len(taken) >= 60
        assert taken[int(len(taken) * 0.99) - 1] <= 0.19

    monkeypatch.setattr("slimserve.serve.policy.admission._MIN_WAIT_S", 0.0)
    run(test)


def test_no_request_waits_longer_than_half_the_service_time() -> None:
    async def test() -> None:
        admission = admission_of(max_running=1, max_queued=4)
        admission.service_s = 0.8
        await admission.acquire(never)
        begin = asyncio.get_running_loop().time()
        with pytest.raises(Rejection) as rejected:
            await admission.acquire(never)
        assert rejected.value.code == "queue_timeout"
        assert asyncio.get_running_loop().time() - begin == pytest.approx(0.4)

    run(test)
