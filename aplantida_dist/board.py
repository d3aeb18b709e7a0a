"""The board: where the ranks of a run leave word for each other, beside their collectives."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

Value = TypeVar("Value")


class Board(Protocol):
    """Where ranks leave word for each other: torch's TCPStore. A call may raise RuntimeError, and may never return."""

    def set(self, key: str, value: str) -> None: ...

    def multi_get(self, keys: list[str]) -> Sequence[bytes]: ...

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes: ...


class Messenger:
    """A thread that alone speaks with the board: a board on a stopped machine never answers, and a watchdog must not wait for it."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._errands: queue.SimpleQueue[tuple[Callable[[Board], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="messenger", daemon=True).start()

    def ask(self, act: Callable[[Board], Value]) -> Future[Value]:
        """Have it done after what was asked before."""
        future: Future[Value] = Future()
        self._errands.put((act, future))
        return future

    def _run(self) -> None:
        while True:
            act, future = self._errands.get()
            try:
                future.set_result(act(self._board))
            except RuntimeError as error:
                future.set_exception(error)
                break
        while True:
            # One failure is enough: torch writes a page about each.
            self._errands.get()[1].set_exception(RuntimeError("the board is lost"))
