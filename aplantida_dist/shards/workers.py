"""Worker processes: a function over many items, a few at a time; the results come in order, and few of them are in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from aplantida_dist.errors import UserError

ITEMS_PER_TASK = 16
TASKS_AHEAD = 4
"""Tasks that are handed out for each worker and not yet fetched: enough that none waits for the main process."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkersError(UserError):
    """The worker processes could not do their work."""


def map_in_order(
    function: Callable[[Sequence[Item]], list[Result]], items: Iterable[Item], *, num_workers: int
) -> Iterator[Result]:
    """Apply a function to runs of ITEMS_PER_TASK items in `num_workers` processes (0: in this one); results in the order of the items.

    The function returns a result for each item. Items are taken as results are fetched, at most num_workers · TASKS_AHEAD
    tasks ahead. Raises WorkersError, also where a worker is killed, and what the function raises.
    """
    if num_workers < 0:
        raise WorkersError(f"{num_workers} workers cannot work; give --workers 0 or more")
    tasks = _tasks_of(items)
    if num_workers == 0:
        for task in tasks:
            yield from function(task)
        return
    # spawn: a fork would copy whatever threads and locks the caller holds.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_follow_the_main_process)
    waiting: deque[Future[list[Result]]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) == num_workers * TASKS_AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise WorkersError(
            "a decoding process was killed, mostly for want of memory; build again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _tasks_of(items: Iterable[Item]) -> Iterator[tuple[Item, ...]]:
    rest = iter(items)
    while task := tuple(islice(rest, ITEMS_PER_TASK)):
        yield task


def _follow_the_main_process() -> None:
    """Make a worker leave Ctrl-C to the main process, and end when the main process is killed, which the pool does not see to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main_process = multiprocessing.parent_process()
    assert main_process is not None

    def end_with_it() -> None:
        main_process.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
