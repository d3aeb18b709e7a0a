"""The record: rows that would lie are refused, and what is written is on disk and read back the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aplantida_dist.history import (
    COLUMNS_FILE,
    HISTORY_FILE,
    SPEED_FIELDS,
    History,
    HistoryError,
    make_row,
    read_history,
    without_time,
)


def values(epoch: int = 1, **changes: Any) -> dict[str, Any]:
    split = {
        "loss": 2.5 / epoch,
        "top1": 0.25,
        "top5": 0.5,
        "macro_top1": 0.2,
        "num_samples": 100,
        "expected_samples": 100,
        "void_samples": 0,
        "identity_digest": "0123456789abcdef",
    }
    row = {
        "epoch": epoch,
        "step": 10 * epoch,
        "time_utc": "2026-11-22T00:00:00+00:00",
        "learning_rate": 1e-3,
        "train": {**split, "images_per_s": 100.0, "wait_fraction": 0.1},
        "val": {**split, "top1": 0.1 * epoch},
        "digests": {"config": "c", "class_map": "m", "train_manifest": "t", "val_manifest": "v"},
    }
    return {**row, **changes}


def with_train(**changes: Any) -> dict[str, Any]:
    row = values()
    return {**row, "train": {**row["train"], **changes}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss": float("nan")}, "train.loss"),
        ({"loss": float("inf")}, "train.loss"),
        ({"top1": 0.6}, "top1 0.6 is above top5 0.5"),
        ({"top5": 1.2}, "train.top5"),
        ({"num_samples": 99}, "99 samples counted"),
        ({"num_samples": 0, "expected_samples": 0}, "train.num_samples"),
        ({"void_samples": 1}, "101 expected|are not the 100 expected"),
        ({"identity_digest": ""}, "identity_digest"),
        ({"grad_norm": float("nan")}, "grad_norm is nan"),
        ({"loss": "0.0"}, "train.loss"),
    ],
)
def test_a_row_that_would_lie_is_refused(changes: dict[str, Any], reason: str) -> None:
    """Numbers are finite, counts add up, accuracies are fractions in order, and nothing is not zero."""
    with pytest.raises(HistoryError, match=reason):
        make_row(**with_train(**changes))


def test_rows_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    """Schema first, one line a row, and the columns file holds the same in percent."""
    history = History(tmp_path)
    for epoch in (1, 2):
        history.append(make_row(**values(epoch)))
    lines = (tmp_path / HISTORY_FILE).read_text().splitlines()
    assert [line.startswith('{"schema": 1, "epoch": ') for line in lines] == [True, True]
    assert read_history(tmp_path / HISTORY_FILE) == history.rows == History(tmp_path).rows
    columns = json.loads((tmp_path / COLUMNS_FILE).read_text())
    assert columns["train_loss"] == [2.5, 1.25]
    assert columns["val_top1_acc"] == [10.0, 20.0]
    assert columns["learning_rate"] == [1e-3, 1e-3]


def test_a_split_that_was_not_evaluated_is_absent(tmp_path: Path) -> None:
    """Absent in the row, null in the columns, zero nowhere."""
    history = History(tmp_path)
    history.append(make_row(**values(1, val=None)))
    history.append(make_row(**values(2)))
    assert "val" not in json.loads((tmp_path / HISTORY_FILE).read_text().splitlines()[0])
    assert json.loads((tmp_path / COLUMNS_FILE).read_text())["val_loss"] == [None, 1.25]


def test_the_first_evaluated_epoch_is_a_best_also_at_zero(tmp_path: Path) -> None:
    """Best is the earliest of the best values; rows without the metric do not enter."""
    history = History(tmp_path)
    assert history.best("val.top1", "max") is None
    history.append(make_row(**values(1, val=None)))
    assert history.best("val.top1", "max") is None
    zero = {**values(2)["val"], "top1": 0.0}
    history.append(make_row(**values(2, val=zero)))
    history.append(make_row(**values(3, val=zero)))
    assert history.best("val.top1", "max") is history.rows[1]
    assert history.best("val.loss", "min") is history.rows[1]
    assert history.best("train.loss", "min") is history.rows[2]


def test_a_cut_last_line_is_dropped_and_an_edited_one_named(tmp_path: Path) -> None:
    """A crash can only cut the last line; everything else is a change that somebody made."""
    history = History(tmp_path)
    for epoch in (1, 2):
        history.append(make_row(**values(epoch)))
    path = tmp_path / HISTORY_FILE
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[0][:50])
    assert len(read_history(path)) == 2
    path.write_bytes(whole.replace(b'"top5": 0.5', b'"top5": 7.5', 1))
    with pytest.raises(HistoryError, match=r"line 1 is not a row of schema 1: train\.top5"):
        read_history(path)


def test_rows_beyond_the_checkpoint_are_cut_back_and_kept_aside(tmp_path: Path) -> None:
    """A resumed run writes again what its checkpoint does not know."""
    history = History(tmp_path)
    for epoch in (1, 2, 3):
        history.append(make_row(**values(epoch)))
    assert history.cut_after(20) == 1
    assert [row.epoch for row in History(tmp_path).rows] == [1, 2]
    assert json.loads((tmp_path / "history.cut.jsonl").read_text())["epoch"] == 3
    assert json.loads((tmp_path / COLUMNS_FILE).read_text())["epoch"] == [1, 2]
    assert history.cut_after(0) == 2
    assert not (tmp_path / COLUMNS_FILE).exists()
    history.append(make_row(**values(1)))
    with pytest.raises(HistoryError, match="step 10 cannot follow the row of step 10"):
        history.append(make_row(**values(1)))


def test_equal_runs_differ_in_clock_and_speed_alone() -> None:
    """`without_time` leaves everything else."""
    one = make_row(**values()).to_json()
    speed = dict.fromkeys(SPEED_FIELDS, 0.5) | {"bound_by": "disk"}
    other = make_row(**{**with_train(**speed), "time_utc": "later"}).to_json()
    assert speed.items() <= other["train"].items()
    assert one != other
    assert without_time(one) == without_time(other)
    assert without_time(one)["train"]["loss"] == 2.5


def test_rows_of_an_early_version_hold_less_of_the_speed(tmp_path: Path) -> None:
    """They are read beside new ones, and a column is empty where a row says nothing."""
    history = History(tmp_path)
    history.append(make_row(**values(1)))
    assert "bound_by" not in json.loads((tmp_path / COLUMNS_FILE).read_text())
    told = values(2)
    history.append(make_row(**{**told, "train": {**told["train"], "bound_by": "model", "host_fraction": 0.9}}))
    columns = json.loads((tmp_path / COLUMNS_FILE).read_text())
    assert (columns["bound_by"], columns["host_fraction"]) == ([None, "model"], [None, 0.9])
    assert columns["wait_fraction"] == [0.1, 0.1]
    assert "device_fraction" not in columns
