"""Loader workers that are sure to be born: a fork that hangs before its first line of Python is made again.

CPython 3.11 takes a lock of its list of threads in the child, first of all (`_PyThreadState_DeleteExcept`; seen with 3.11.7). Where another
thread held it at the fork, without the GIL as those of C++ do, the child waits for ever, and the rank for its first batch.
"""

from __future__ import annotations

import os
import select
import signal
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from typing import Any

from aplantida_dist.errors import UserError

BORN_WITHIN_S = 10.0
"""It takes milliseconds; on a machine that is out of memory, or was stopped, more."""
TRIES = 3


class WorkerError(UserError):
    """No loader worker could be forked that ran."""


class _Birth:
    """How a worker tells that it runs, and is told that it may go on: until then it has touched nothing that others share."""

    def __init__(self) -> None:
        self._told, self._tell = os.pipe()
        self._leave, self._give_leave = os.pipe()

    def tell(self) -> None:
        """In the worker: tell, and wait for leave. Without, as the rank is gone or has given it up, end."""
        os.close(self._give_leave)
        os.write(self._tell, b".")
        if not os.read(self._leave, 1):
            os._exit(1)
        for descriptor in (self._told, self._tell, self._leave):
            os.close(descriptor)

    def is_told(self) -> bool:
        """In the rank: wait for it, for BORN_WITHIN_S, and give leave."""
        told, _, _ = select.select([self._told], [], [], BORN_WITHIN_S)
        if told:
            os.write(self._give_leave, b".")
        return bool(told)

    def close(self) -> None:
        for descriptor in (self._told, self._tell, self._leave, self._give_leave):
            os.close(descriptor)


class _Popen(Popen):
    def _launch(self, process_obj: Any) -> None:
        for _ in range(TRIES):
            process_obj.birth = birth = _Birth()
            try:
                super()._launch(process_obj)  # type: ignore[misc] # typeshed does not know it
                if birth.is_told():
                    return
            finally:
                birth.close()
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.close()
        raise WorkerError(
            f"a loader worker was forked {TRIES} times, and none ran within {BORN_WITHIN_S:.0f} s; is memory left? lower data.num_workers"
        )


class _Worker(ForkProcess):
    birth: _Birth

    @staticmethod
    def _Popen(process_obj: Any) -> Popen:  # noqa: N802 -- the name is multiprocessing's
        return _Popen(process_obj)

    def run(self) -> None:
        self.birth.tell()
        super().run()


class WorkerContext(ForkContext):
    """The context of multiprocessing whose processes are forked, and born."""

    Process = _Worker
