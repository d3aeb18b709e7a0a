"""A process that records and reports as the main process of a training does, and stops at stages for a test to break something.

Run as `python -m tests.wandb_process RUN_DIR online|offline LAST_EPOCH INIT_S FINISH_S GRACE_S`. It tells each stage, with its seconds,
in a line of JSON, and goes on when it is sent a line: `open`, `half` of the rows shown, `shown`; at the end `done`, and leaves by
the interpreter's own exit.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Literal, cast

from aplantida_dist.history import History, Row, make_row
from aplantida_dist.report import Report, open_report
from aplantida_dist.wandb_report import Limits, WandbRun

RUN_ID = "abcd1234"


def row_of(epoch: int) -> Row:
    """A row that is the same in every process that writes it."""
    split = {"loss": 2.5 / epoch, "top1": 0.25, "top5": 0.5, "macro_top1": 0.2, "identity_digest": "0123456789abcdef"}
    counts = {"num_samples": 100, "expected_samples": 100, "void_samples": 0}
    return make_row(
        epoch=epoch,
        step=10 * epoch,
        time_utc="2026-11-22T00:00:00+00:00",
        learning_rate=1e-3,
        train={**split, **counts, "images_per_s": 100.0, "wait_fraction": 0.1},
        val={**split, **counts},
        digests={"config": "c", "class_map": "m", "train_manifest": "t", "val_manifest": "v"},
    )


def stage(name: str, **facts: Any) -> None:
    """Tell where this process is, and wait to be sent on."""
    print(json.dumps({"stage": name, **facts}), flush=True)
    sys.stdin.readline()


def record(history: History, report: Report, epochs: range) -> float:
    """Append and show rows, as the trainer's record does; returns the longest time that a row took to be shown, in s."""
    longest_s = 0.0
    for epoch in epochs:
        row = row_of(epoch)
        history.append(row)
        started_s = time.monotonic()
        report.show(row, best=history.best("val.top1", "max"))
        longest_s = max(longest_s, time.monotonic() - started_s)
    return longest_s


def main() -> None:
    run_dir, mode, last_epoch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    limits = Limits(*(float(limit) for limit in sys.argv[4:]))
    run_dir.mkdir(exist_ok=True)
    history = History(run_dir)
    started_s = time.monotonic()
    report = open_report(
        WandbRun("herbarium", "leaves", ["a"], RUN_ID, run_dir, {"seed": 3}),
        mode=cast(Literal["offline", "online"], mode),
        rows=history.rows,
        best=history.best("val.top1", "max"),
        warn=lambda text: print(f"warning: {text}", file=sys.stderr, flush=True),
        limits=limits,
    )
    stage("open", seconds=time.monotonic() - started_s)
    first, middle = len(history.rows) + 1, (len(history.rows) + last_epoch) // 2
    longest_s = record(history, report, range(first, middle + 1))
    stage("half")
    longest_s = max(longest_s, record(history, report, range(middle + 1, last_epoch + 1)))
    stage("shown", seconds=longest_s)
    started_s = time.monotonic()
    report.finish(exit_code=0)
    stage("done", seconds=time.monotonic() - started_s)


if __name__ == "__main__":
    main()
