"""A timer that wakes a greenlet within some tens of microseconds; gevent's own timers have a resolution of 1 ms."""

from __future__ import annotations

import ctypes
import os
import time

import gevent
from gevent.socket import wait_read

_ABSOLUTE = 1
_CLOCK_MONOTONIC = 1
_NS_PER_S = 1_000_000_000


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


class Timer:
    """A kernel timer (timerfd) for one greenlet; falls back to gevent's timers on systems without timerfd."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        try:
            self._fd = int(self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
        except AttributeError:
            self._fd = -1

    def wait_until(self, at_s: float) -> None:
        """Return at `at_s` seconds of perf_counter, or at once if that time is past."""
        left_s = at_s - time.perf_counter()
        if left_s <= 0:
            return
        if self._fd < 0:
            gevent.sleep(left_s)
            return
        # perf_counter reads CLOCK_MONOTONIC on every system that has timerfd.
        seconds, nanoseconds = divmod(int(at_s * _NS_PER_S), _NS_PER_S)
        when = _Itimerspec(_Timespec(0, 0), _Timespec(seconds, nanoseconds))
        self._libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(when), None)
        wait_read(self._fd)
        os.read(self._fd, 8)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
