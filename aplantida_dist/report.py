"""The live report: a view of the history beside the training, which it can neither end nor slow."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Literal, Protocol

from aplantida_dist.history import Row
from aplantida_dist.wandb_report import Limits, WandbRun, one_line, open_wandb, stop_service

LIMITS = Limits(init_s=15.0, finish_s=20.0, grace_s=15.0)


class Report(Protocol):
    """A view of the history."""

    def show(self, row: Row, *, best: Row | None) -> None:
        """Show a row that the history holds, and which row is the best so far."""

    def finish(self, *, exit_code: int) -> None:
        """Hand over what is left, the files of the record and how the command ends. Returns within its budget."""


class NullReport:
    """The report of a run without W&B, and of every rank but the main process."""

    def show(self, row: Row, *, best: Row | None) -> None:
        """Nothing."""

    def finish(self, *, exit_code: int) -> None:
        """Nothing."""


class AsideReport:
    """A report on a thread of its own: the training waits `start_s` for it to open, `finish_s` to finish, and never between.

    The first trouble is said, those after it are not: the rows are in the history, and the next process that opens the run
    shows them all again.
    """

    def __init__(
        self,
        open_report: Callable[[], Report],
        *,
        warn: Callable[[str], None],
        remedy: str,
        start_s: float,
        finish_s: float,
        stop: Callable[[], None],
    ) -> None:
        self._open, self._stop = open_report, stop
        self._warn, self._remedy = warn, remedy
        self._finish_s = finish_s
        self._acts: SimpleQueue[Callable[[Report], None] | None] = SimpleQueue()
        self._is_open = threading.Event()
        self._is_broken = False
        # A daemon: a view that hangs does not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)
        self._thread.start()
        if not self._is_open.wait(start_s):
            warn(f"W&B: does not start within {start_s:.0f} s; the training does not wait for it")

    def show(self, row: Row, *, best: Row | None) -> None:
        """Have the row shown; returns at once."""
        self._acts.put(lambda report: report.show(row, best=best))

    def finish(self, *, exit_code: int) -> None:
        """Wait for what is left, within the budget; what is not done by then is given up."""
        self._acts.put(lambda report: report.finish(exit_code=exit_code))
        self._acts.put(None)
        self._thread.join(self._finish_s)
        if self._thread.is_alive():
            self._tell(f"not done after {self._finish_s:.0f} s")
            self._stop()

    def _work(self) -> None:
        """The thread: open, then one act after the other, until a None."""
        try:
            report = self._open()
        except Exception as error:
            self._tell(one_line(error))
            return
        finally:
            self._is_open.set()
        while (act := self._acts.get()) is not None:
            try:
                act(report)
            except Exception as error:
                self._tell(one_line(error))

    def _tell(self, trouble: str) -> None:
        """Say the first trouble; those after it follow from it."""
        if not self._is_broken:
            self._is_broken = True
            self._warn(f"W&B: {trouble}; the training goes on, every row is in history.jsonl: {self._remedy}")


def new_run_id() -> str:
    """A W&B run id, drawn once a run and kept in its checkpoints."""
    return secrets.token_hex(4)


def open_report(
    described: WandbRun,
    *,
    mode: Literal["offline", "online", "disabled"],
    rows: Sequence[Row],
    best: Row | None,
    warn: Callable[[str], None],
    limits: Limits = LIMITS,
) -> Report:
    """Open the run in W&B and show it the rows that the history holds already, or nothing when disabled. For the main process."""
    if mode == "disabled":
        return NullReport()
    report = AsideReport(
        partial(open_wandb, described, mode=mode, limits=limits, warn=warn),
        warn=warn,
        remedy=f"`{described.sync_command}` uploads what the folder holds, the training command again fills it up from the history",
        start_s=limits.init_s + limits.grace_s,
        finish_s=limits.finish_s + limits.grace_s,
        stop=stop_service,
    )
    for row in rows:
        report.show(row, best=best)
    return report
