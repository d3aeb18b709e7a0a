"""Work done behind the caller: on one other thread, in order, bounded, and what fails there fails here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")


class Behind:
    """A thread that does one act after another, while at most `ahead` of them wait.

    A context: it ends when all is done; where it ends by an exception, what still waits is dropped.
    """

    def __init__(self, *, ahead: int) -> None:
        self._ahead = ahead
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._given: deque[Future[Any]] = deque()

    def do(self, act: Callable[[], Result]) -> Future[Result]:
        """Have it done; waits while too much waits already. Raises what an earlier act raised."""
        while len(self._given) >= self._ahead:
            self._given.popleft().result()
        future = self._thread.submit(act)
        self._given.append(future)
        return future

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=error is not None)
