"""The way back to a checkpoint: what a run folder says beyond it is put aside, and its pointers are made true again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from aplantida_dist.checkpoint import Checkpoint, load_checkpoint, point_to
from aplantida_dist.errors import UserError
from aplantida_dist.history import History, HistoryError
from aplantida_dist.record import point_to_best

ASIDE_DIR = "aside"
"""Below checkpoints/: the checkpoints beyond the one that a run went back to. Nothing reads them; they may be deleted."""


def rewind(
    checkpoints_dir: Path,
    *,
    history: History,
    checkpoint: Checkpoint | None,
    recorded_step: int,
    best_metric: str,
    best_mode: Literal["min", "max"],
    warn: Callable[[str], None],
) -> None:
    """Make history, checkpoints and pointers those of the moment when a checkpoint was saved; None is the beginning.

    `recorded_step` is the last one that a row may tell of then. Rows beyond it go to history.cut.jsonl, checkpoints beyond it to checkpoints/aside/. Raises HistoryError, before anything is moved,
    where a line that the checkpoint knows has changed since.
    """
    step = 0 if checkpoint is None else checkpoint.position.step
    if checkpoint is not None:
        _require_known_history(history, checkpoint, recorded_step=recorded_step)
    for folder in _put_aside_beyond(checkpoints_dir, step):
        warn(f"{folder.name} lies beyond the checkpoint of step {step}; it was moved to {folder.parent}")
    if cut := history.cut_after(recorded_step):
        warn(f"{cut} rows of the history lie beyond the checkpoint of step {step}; they will be written again")
    if checkpoint is not None:
        point_to(checkpoints_dir, "last", checkpoint.path, step=step)
        _mend_best(checkpoints_dir, history, best_metric=best_metric, best_mode=best_mode, warn=warn)


def _require_known_history(history: History, checkpoint: Checkpoint, *, recorded_step: int) -> None:
    """Every line that the checkpoint knows is as it was, and none was put among them."""
    known = checkpoint.position.history
    if known is None:
        return
    history.require_unchanged(known, since=checkpoint.path)
    num_rows = sum(row.step <= recorded_step for row in history.rows)
    if num_rows != len(known):
        raise HistoryError(
            f"{history.path}: line {len(known) + 1} was added since {checkpoint.path} was saved; take it out or start a new run folder"
        )


def _put_aside_beyond(checkpoints_dir: Path, step: int) -> list[Path]:
    """Move the checkpoints of later steps away: one that is broken would count among the newest, one that is whole would win the next resume."""
    moved = []
    for folder in sorted(checkpoints_dir.glob("step_*")):
        if not _is_beyond(folder, step):
            continue
        aside = checkpoints_dir / ASIDE_DIR / folder.name
        try:
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
        except OSError as error:
            raise UserError(
                f"{folder}: lies beyond the checkpoint of step {step} and cannot be moved: {error.strerror}; delete it"
            ) from error
        moved.append(aside)
    return moved


def _is_beyond(folder: Path, step: int) -> bool:
    number = folder.name.removeprefix("step_")
    return number.isdecimal() and int(number) > step


def _mend_best(
    checkpoints_dir: Path,
    history: History,
    *,
    best_metric: str,
    best_mode: Literal["min", "max"],
    warn: Callable[[str], None],
) -> None:
    """Let best.json name the checkpoint of the best row, whatever it held; none where that checkpoint is gone or broken."""
    row = history.best(best_metric, best_mode)
    pointer = checkpoints_dir / "best.json"
    if row is None:
        pointer.unlink(missing_ok=True)
        return
    try:
        best = load_checkpoint(checkpoints_dir / f"step_{row.step:08d}")
    except UserError as error:
        warn(f"{error}; so there is no best checkpoint until a better one is saved")
        pointer.unlink(missing_ok=True)
        return
    point_to_best(best.path, row, best_metric=best_metric, best_mode=best_mode)
