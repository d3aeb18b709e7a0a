"""A pool of processes: a function over many items, its results in their order, and never more than a few of them ahead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from typing import TypeVar

from aplantida_dist.errors import UserError

TASKS_AHEAD = 2
"""Tasks of each process that may be under way or done before the caller asks for them."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class PoolError(UserError):
    """The processes of a pool cannot do their work."""


def map_in_pool(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int, items_per_task: int
) -> Iterator[Result]:
    """Apply a function in `num_workers` processes (0: in this one); the results come in the order of the items.

    What the function raises is raised here. Items are taken and results held only as far ahead as keeps the processes busy.
    """
    if num_workers < 0:
        raise PoolError(f"{num_workers} workers can do nothing; give --workers 0 or more")
    if num_workers == 0:
        yield from map(function, items)
        return
    # spawn: a fork would copy whatever threads and locks the caller holds.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=follow_the_main_process)
    under_way: deque[Future[list[Result]]] = deque()
    tasks = iter(partial(_take, iter(items), items_per_task), [])
    try:
        for task in tasks:
            under_way.append(pool.submit(_apply, function, task))
            if len(under_way) >= TASKS_AHEAD * num_workers:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    except BrokenProcessPool:
        raise PoolError("a worker was killed, mostly for want of memory; build again with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def follow_the_main_process() -> None:
    """Make a worker leave Ctrl-C to the main process, and end when the main process is killed, which the pool does not see to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main_process = multiprocessing.parent_process()
    assert main_process is not None

    def end_with_it() -> None:
        main_process.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()


def _take(items: Iterator[Item], count: int) -> list[Item]:
    return list(islice(items, count))


def _apply(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return list(map(function, items))
