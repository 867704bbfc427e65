"""The door: places, the queue, who is refused and who is next."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from slimserve.serve.policy.admission import Admission, Gone, Refused
from slimserve.serve.policy.limits import Limits


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))


def never() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


def door(seen: list[tuple[int, int]] | None = None, **limits: Any) -> Admission:
    keep = [] if seen is None else seen
    return Admission(Limits(**{"max_running": 2, "max_queued": 2} | limits), lambda *now: keep.append(now))


def test_places_go_to_those_who_waited_in_their_order() -> None:
    async def test() -> None:
        seen: list[tuple[int, int]] = []
        admission = door(seen)
        order: list[int] = []

        async def visit(number: int) -> None:
            await admission.enter(never)
            order.append(number)

        tasks = [asyncio.create_task(visit(number)) for number in range(4)]
        await asyncio.sleep(0)
        assert (order, admission.num_running, admission.num_queued) == ([0, 1], 2, 2)
        with pytest.raises(Refused, match="queue_full"):
            await admission.enter(never)
        admission.leave(1.0)
        # Who arrives just now does not pass the one who waited.
        with pytest.raises(Refused):
            admission.leave(1.0)
            await asyncio.gather(*(admission.enter(never) for _ in range(3)))
        await asyncio.gather(*tasks[2:])
        assert order == [0, 1, 2, 3]
        assert max(running for running, _ in seen) == 2

    run(test)


def test_who_waits_too_long_or_goes_leaves_the_queue_at_once() -> None:
    async def test() -> None:
        admission = door(max_running=1, queue_timeout_s=0.05)
        await admission.enter(never)
        with pytest.raises(Refused, match="queue_timeout"):
            await admission.enter(never)
        left = never()
        waiting = asyncio.create_task(admission.enter(lambda: left))
        await asyncio.sleep(0)
        assert admission.num_queued == 1
        left.set_result(None)
        with pytest.raises(Gone):
            await waiting
        assert (admission.num_running, admission.num_queued) == (1, 0)

    run(test)


def test_a_place_given_to_a_cancelled_waiter_is_not_lost() -> None:
    async def test() -> None:
        admission = door(max_running=1)
        await admission.enter(never)
        waiting = asyncio.create_task(admission.enter(never))
        await asyncio.sleep(0)
        admission.leave(0.1)  # the place is now the waiter's, who has not run yet
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.wait_for(admission.enter(never), 1)
        assert (admission.num_running, admission.num_queued) == (1, 0)

    run(test)


def test_closing_refuses_the_waiting_and_the_coming_and_leaves_the_running() -> None:
    async def test() -> None:
        admission = door(max_running=1)
        await admission.enter(never)
        waiting = asyncio.create_task(admission.enter(never))
        await asyncio.sleep(0)
        admission.close()
        with pytest.raises(Refused, match="draining"):
            await waiting
        with pytest.raises(Refused, match="draining"):
            admission.check()
        assert admission.num_running == 1
        admission.leave(0.1)
        assert admission.num_running == 0

    run(test)


def test_the_time_to_retry_is_the_queue_ahead_at_the_pace_of_late() -> None:
    async def test() -> None:
        admission = door(max_running=2, max_queued=3)
        for _ in range(60):
            await admission.enter(never)
            admission.leave(8.0)
        assert admission.service_s == pytest.approx(8.0, rel=0.01)
        tasks = [asyncio.create_task(admission.enter(never)) for _ in range(5)]
        await asyncio.sleep(0)
        # Four would be waiting, two are served every 8 s.
        assert admission.retry_after_s() == 16
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(test)


async def overload(admission: Admission, service_s: Callable[[], float]) -> tuple[list[float], int]:
    """Times of the accepted, sorted, and how many were refused, where ten times as many come as can be served."""
    loop = asyncio.get_running_loop()
    taken: list[float] = []
    refused = 0

    async def visit() -> None:
        nonlocal refused
        begin = loop.time()
        try:
            await admission.enter(never)
        except Refused:
            refused += 1
            return
        seconds = service_s()
        await asyncio.sleep(seconds)
        admission.leave(seconds)
        taken.append(loop.time() - begin)

    visits = []
    for _ in range(100):  # 8 arrive where 0.8 could be served
        visits += [asyncio.create_task(visit()) for _ in range(8)]
        await asyncio.sleep(0.01)
    await asyncio.gather(*visits)
    return sorted(taken), refused


def test_ten_times_the_load_leaves_the_accepted_under_twice_the_service_time() -> None:
    async def test() -> None:
        draw = random.Random(3)
        taken, refused = await overload(door(max_running=8, max_queued=4), lambda: draw.uniform(0.06, 0.14))
        assert refused > 600
        assert len(taken) >= 60  # the places were never empty
        assert taken[int(len(taken) * 0.99) - 1] <= 2 * 0.139

    run(test)


def test_requests_in_step_do_not_make_a_latecomer_wait_for_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        admission = door(max_running=8, max_queued=4)
        admission.service_s = 0.1
        taken, _ = await overload(admission, lambda: 0.1)
        assert len(taken) >= 60
        assert taken[int(len(taken) * 0.99) - 1] <= 0.19

    monkeypatch.setattr("slimserve.serve.policy.admission._LEAST_PATIENCE_S", 0.0)
    run(test)


def test_nobody_waits_longer_than_half_of_what_a_request_takes() -> None:
    async def test() -> None:
        admission = door(max_running=1, max_queued=4)
        admission.service_s = 0.8
        await admission.enter(never)
        begin = asyncio.get_running_loop().time()
        with pytest.raises(Refused, match="queue_timeout"):
            await admission.enter(never)
        assert 0.38 < asyncio.get_running_loop().time() - begin < 0.55

    run(test)
