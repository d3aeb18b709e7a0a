"""The device's clock: how long a GPU had something of the steps to do, told by events that are read late."""

from __future__ import annotations

import time
from collections import deque

import torch


class DeviceClock:
    """Sums the stretches of a GPU's time between `begin` and `end`. On a CPU host and device are one, and it counts nothing.

    A stretch begins on the device when it comes to it, after all that was queued before: while the device lags behind the host
    stretches follow each other without a gap, and where it has caught up the gap is the time that it stood idle. Nothing waits for
    the device but `catch_up`.
    """

    def __init__(self, device: torch.device) -> None:
        self.busy_ns = 0
        self._device = device
        self._is_gpu = device.type == "cuda"
        self._begun: torch.cuda.Event | None = None
        self._unread: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def counts(self) -> bool:
        """Whether there is a device beside the host."""
        return self._is_gpu

    def begin(self) -> None:
        """What is queued from here on is work of the steps."""
        if self._is_gpu:
            self._begun = self._recorded()

    def end(self) -> None:
        """What is queued from here on is not; without a `begin` before, nothing happens."""
        if self._begun is not None:
            self._unread.append((self._begun, self._recorded()))
            self._begun = None
            self._read_what_is_over()

    def catch_up(self) -> int:
        """Wait until the device has done all that was queued; the nanoseconds that it took, 0 where nothing of the steps was left."""
        if not self._unread:
            return 0
        started_ns = time.perf_counter_ns()
        torch.cuda.synchronize(self._device)
        self._read_what_is_over()
        return time.perf_counter_ns() - started_ns

    def reset(self) -> None:
        """Begin again at zero."""
        self.busy_ns = 0
        self._unread.clear()

    def _recorded(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _read_what_is_over(self) -> None:
        """Add the stretches that the device has come to the end of: to ask for that does not wait."""
        while self._unread and self._unread[0][1].query():
            begun, ended = self._unread.popleft()
            self.busy_ns += round(1e6 * begun.elapsed_time(ended))
