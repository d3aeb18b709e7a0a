"""Signals: what this process does when Slurm, Kubernetes, a spot machine or a terminal asks it to stop."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Requests to stop: of Kubernetes, spot machines and launchers; of Slurm ahead of the time limit; of a terminal."""
STOPPED_CODE = 75
"""Exit code of a run that stopped on request: EX_TEMPFAIL of sysexits.h, run the same command again."""
INTERRUPTED_CODE = 130
"""Exit code of a command that a signal ended at once."""
SAME_REQUEST_S = 2.0
"""Signals this close are one request: Slurm signals every process, and a launcher passes on to its ranks what it gets itself."""

MEET_WITHIN_S = 8.0
"""So long a process that was asked to stop waits for the other ranks, where it has not met them: one may be dead, and torch would wait for minutes."""

_PR_SET_PDEATHSIG = 1


class Listener:
    """Whether this process was asked to stop. It hears nothing before `listen`.

    The first signal leaves word; a second, SAME_REQUEST_S later or more, ends the process at once, whatever it is waiting for.
    """

    def __init__(self) -> None:
        self._number = 0
        self._heard_s = 0.0
        self._is_resting = False
        self._has_met = threading.Event()

    @property
    def number(self) -> int:
        """The number of the first signal that was heard; 0 if none was."""
        return self._number

    def listen(self) -> None:
        """Begin to listen; once a process, from its main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # A handler written in Python waits for the main thread, which may stand in a collective; a thread hears at once.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(reader,), name="signals", daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, _go_on)
            signal.siginterrupt(number, False)

    def meet(self) -> None:
        """Note that the ranks have met: from here on they agree where they stop."""
        self._has_met.set()

    def rest(self) -> None:
        """Hear no more: all is on disk, and the process is about to leave by itself."""
        self._is_resting = True

    def _hear(self, reader: int) -> None:
        while content := os.read(reader, 1):
            if content[0] in SIGNALS and not self._is_resting:
                self._take(content[0], time.monotonic())

    def _take(self, number: int, now_s: float) -> None:
        name = signal.Signals(number).name
        if not self._number:
            self._number, self._heard_s = number, now_s
            if os.environ.get("LOCAL_RANK", "0") == "0":
                _tell(f"{name}: stopping at the next step boundary; once more to leave at once")
            threading.Thread(target=self._leave_unmet, args=(name,), name="unmet", daemon=True).start()
        elif now_s - self._heard_s >= SAME_REQUEST_S:
            _tell(f"{name}, for the second time: left at once; the last checkpoint is untouched")
            os._exit(INTERRUPTED_CODE)

    def _leave_unmet(self, name: str) -> None:
        if not self._has_met.wait(MEET_WITHIN_S):
            _tell(f"{name}: left at once, as the ranks have not met {MEET_WITHIN_S:.0f} s later; nothing was begun")
            os._exit(INTERRUPTED_CODE)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within it no request to stop reaches this thread, nor a process that it forks, until that calls `outlive_requests`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_requests() -> None:
    """Ignore requests to stop, in a process that serves its parent, and end with the parent."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    end_with_the_parent()


def end_with_the_parent() -> None:
    """Have the kernel end this process when its parent is gone, however that went. Of a parent that is gone already the kernel tells nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def end_like_ctrl_c() -> None:
    """Have SIGTERM and SIGUSR1 end a command that has nothing to save as Ctrl-C does: at once, its unfinished files deleted."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _raise_interrupt)


def _go_on(number: int, frame: FrameType | None) -> None:
    """The thread that listens has heard it."""


def _raise_interrupt(number: int, frame: FrameType | None) -> None:
    # The launcher passes on what this process may have been sent itself; while it cleans up one is enough.
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


def _tell(text: str) -> None:
    """Past Python's own buffers, whose lock the main thread may hold."""
    os.write(2, f"{text}\n".encode())
