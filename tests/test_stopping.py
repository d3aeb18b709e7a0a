"""Early stopping, and the metric that chooses: both go by the rows of the history alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from aplantida_dist.config import ConfigError
from aplantida_dist.config_file import load_config
from aplantida_dist.history import HistoryError, Row, make_row
from aplantida_dist.stopping import Stopping, reason_to_stop
from tests.ranks import Finished, command_on_ranks
from tests.runs import cut_back, rows_of, write_config

BLOCK = {
    "loss": 1.0,
    "top1": 0.5,
    "top5": 1.0,
    "macro_top1": 0.5,
    "num_samples": 4,
    "expected_samples": 4,
    "void_samples": 0,
    "identity_digest": "0" * 16,
}


def row(epoch: int, top1: float | None, **more: Any) -> Row:
    """A row whose val.top1 is given; None for an epoch that was not evaluated."""
    return make_row(
        epoch=epoch,
        step=epoch,
        time_utc="",
        learning_rate=0.0,
        train={**BLOCK, "images_per_s": 1.0, "wait_fraction": 0.0},
        val=None if top1 is None else {**BLOCK, "top1": top1, **more},
        digests={"config": "", "class_map": "", "train_manifest": ""},
    )


def stops_at(
    values: list[float | None], *, patience: int, min_delta: float = 0.0, mode: Literal["max", "min"] = "max"
) -> int | None:
    """The epoch after which a run with these values of val.top1 stops; None where it does not."""
    rows = [row(epoch, value) for epoch, value in enumerate(values, start=1)]
    stopping = Stopping("val.top1", mode, patience, min_delta)
    reasons = (reason_to_stop(rows[:epoch], stopping) for epoch in range(len(rows) + 1))
    return next((epoch for epoch, reason in enumerate(reasons) if reason is not None), None)


def test_a_run_stops_after_so_many_epochs_without_a_better_value() -> None:
    """Equal is not better; a rise within min_delta is none, and does not move the mark; not evaluated shows nothing."""
    assert stops_at([0.1, 0.2, 0.3], patience=1) is None
    assert stops_at([0.3, 0.3, 0.4], patience=1) == 2
    assert stops_at([0.3, 0.2, 0.1, 0.4], patience=3) is None
    assert stops_at([0.3, 0.2, 0.1, 0.3], patience=3) == 4
    assert stops_at([0.30, 0.31, 0.32, 0.33], patience=3, min_delta=0.02) is None, "0.33 is 0.03 above the mark of 0.30"
    assert stops_at([0.30, 0.31, 0.315, 0.319], patience=3, min_delta=0.02) == 4
    assert stops_at([0.3, 0.2, 0.1, 0.1], patience=1, mode="min") == 4
    assert stops_at([None, 0.3, None, 0.3, None, 0.3], patience=3) == 6
    assert stops_at([None, None], patience=1) is None
    assert stops_at([], patience=1) is None


def test_the_reason_is_a_sentence() -> None:
    """Metric, margin, patience, and what was best."""
    rows = [row(epoch, 0.25) for epoch in range(1, 5)]
    expected = (
        "stopped early at epoch 4: val.top1 has not risen by more than 0.001 for 3 epochs; it was 0.25 at epoch 1"
    )
    assert reason_to_stop(rows, Stopping("val.top1", "max", 3, 0.001)) == expected


def test_any_number_of_a_row_is_a_metric_and_an_unknown_one_names_them() -> None:
    """Rows without an evaluation are judged by train alone; text and identities are no metrics."""
    leaking = row(1, 0.5, leaked_samples=4)
    for name in ("val.leaked_samples", "val.top1", "train.images_per_s", "train.macro_top1"):
        leaking.require_metric(name)
    for name in ("val.rare_top1", "ema.val.top1", "train.identity_digest", "digests.config"):
        with pytest.raises(HistoryError, match=r"there are train\.loss, .*val\.macro_top1"):
            leaking.require_metric(name)
    row(1, None).require_metric("val.rare_top1")
    with pytest.raises(HistoryError, match=r"train\.few_top1"):
        row(1, None).require_metric("train.few_top1")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("checkpoint.best_metric=ema.val.loss", "checkpoint.best_mode"),
        ("checkpoint.best_metric=val..top1", "names with points between"),
        ("stopping.patience_epochs=0", "stopping.patience_epochs"),
        ("stopping.min_delta=-0.1", "stopping.min_delta"),
    ],
)
def test_wrong_stopping_is_an_error_of_the_config(tmp_path: Path, override: str, text: str) -> None:
    """Told before anything runs."""
    with pytest.raises(ConfigError, match=text):
        load_config(write_config(tmp_path / "config.yaml", tmp_path), [override])


def test_stopping_fits_its_mode_and_its_evaluation(tmp_path: Path) -> None:
    """A loss falls, and what is not evaluated stops nothing."""
    config = write_config(tmp_path / "config.yaml", tmp_path)
    with pytest.raises(ConfigError, match=r"stopping.mode: found \"max\", expected min for stopping.metric val.loss"):
        load_config(config, ["stopping.patience_epochs=1", "stopping.metric=val.loss"])
    never = ["evaluation.every_epochs=0", "checkpoint.best_metric=train.top1"]
    load_config(config, never)
    with pytest.raises(ConfigError, match=r"stopping.metric: found \"val.top1\", expected a metric of train"):
        load_config(config, [*never, "stopping.patience_epochs=1"])


def train(world_size: int, config: Path, run_dir: Path, folder: Path, *overrides: str) -> list[Finished]:
    arguments = ["--config", config, "--run-dir", run_dir, *overrides]
    return command_on_ranks(world_size, "aplantida_dist.train", arguments, folder)


STOP = ("stopping.patience_epochs=2", "stopping.metric=train.loss", "stopping.mode=min", "stopping.min_delta=9")
"""No loss falls by 9, so this stops after epoch 3."""


def test_a_run_stops_on_all_ranks_and_stays_stopped(dataset_dir: Path, tmp_path: Path) -> None:
    """Its rows are the unbroken run's, it ends with 0, status says why, and the same command again does not train on.

    More patience does, and then nothing is lost: the rows are again those of the unbroken run.
    """
    config, run_dir = write_config(tmp_path / "config.yaml", dataset_dir, epochs=5), tmp_path / "stopped"
    train(2, config, tmp_path / "whole", tmp_path)
    for _ in range(2):
        finished = train(2, config, run_dir, tmp_path, *STOP)
        assert [rank.code for rank in finished] == [0, 0], finished[0].stderr
        assert "stopped early at epoch 3: train.loss has not fallen by more than 9 for 2 epochs" in finished[0].stdout
        status = json.loads((run_dir / "status.json").read_text())
        assert (status["phase"], status["epoch"], status["step"]) == ("done", 3, 15)
        assert status["reason"].startswith("stopped early at epoch 3: ")
        assert measured(run_dir) == measured(tmp_path / "whole")[:3]
        assert json.loads((run_dir / "checkpoints" / "last.json").read_text())["step"] == 15
    finished = train(2, config, run_dir, tmp_path, *STOP, "stopping.patience_epochs=9")
    assert [rank.code for rank in finished] == [0, 0], finished[0].stderr
    assert measured(run_dir) == measured(tmp_path / "whole")


def measured(run_dir: Path) -> list[dict[str, Any]]:
    """A run's rows but for the digest of its config."""
    return [{**row, "digests": None} for row in rows_of(run_dir)]


def test_patience_is_exact_after_a_resume(dataset_dir: Path, tmp_path: Path) -> None:
    """Cut back to the middle of epoch 2, the run stops where it would have stopped, with the same weights."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=5, every_steps=2)
    overrides = (*STOP, "checkpoint.keep_last=100")
    train(1, config, tmp_path / "whole", tmp_path, *overrides)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    cut_back(tmp_path / "broken", step=8)
    (finished,) = train(1, config, tmp_path / "broken", tmp_path, *overrides)
    assert "going on from step 8" in finished.stdout
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "broken")
    assert len(rows_of(tmp_path / "broken")) == 3
    weights = [
        np.fromfile(tmp_path / run / "checkpoints" / "step_00000015" / "model.safetensors", dtype=np.uint8)
        for run in ("whole", "broken")
    ]
    assert np.array_equal(*weights)


def test_an_unknown_metric_is_told_at_the_first_row_and_loses_nothing(dataset_dir: Path, tmp_path: Path) -> None:
    """Every rank ends, one line names what there is, and with another name the run goes on after that row."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2)
    finished = train(2, config, tmp_path / "run", tmp_path, "checkpoint.best_metric=val.rare_top1")
    assert [rank.code for rank in finished] == [2, 2]
    (line,) = [line for rank in finished for line in rank.stderr.splitlines()]
    assert "'val.rare_top1'" in line
    assert "val.macro_top1" in line
    finished = train(2, config, tmp_path / "run", tmp_path, "checkpoint.best_metric=val.macro_top1")
    assert [rank.code for rank in finished] == [0, 0], finished[0].stderr
    assert "going on from step 5" in finished[0].stdout
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == [1, 2]
