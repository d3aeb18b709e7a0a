"""Stopped on request: SIGTERM, SIGUSR1 and Ctrl-C at any moment, on any rank; the same command again ends as the unbroken run."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from aplantida_dist.signals import STOPPED_CODE
from tests.faults.conftest import Fired
from tests.faults.stops import NEVER, Stop, train_until
from tests.runs import write_config
from tests.test_resume import assert_same_run

STEP, EVALUATION = "aplantida_dist.trainer:run_step", "aplantida_dist.evaluation:cross_entropy"
CHECKPOINT, STARTUP = "aplantida_dist.checkpoint:save_file", "aplantida_dist.compose:transforms_of"
OVERRIDES = ("evaluation.micro_batch_size=1", "model.kwargs.drop_rate=0.1")
"""Nine samples of val on two ranks are five rounds."""


@pytest.fixture(scope="module")
def config(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(
        tmp_path_factory.mktemp("stop") / "config.yaml", dataset_dir, model="test_resnet", epochs=3, every_steps=2
    )


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """The unbroken run on two ranks: 15 steps."""
    run_dir = config.parent / "whole"
    ranks = train_until(NEVER, world_size=2, config=config, run_dir=run_dir, overrides=OVERRIDES)
    assert [rank.finished.code for rank in ranks] == [0, 0]
    return run_dir


def status_of(run_dir: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return status


@pytest.mark.fault(
    what="SIGTERM, SIGUSR1, Ctrl-C on one rank or all: starting, in a step, in an evaluation, while a checkpoint is written",
    how="two forked ranks signal themselves there; the same command again; twice in a row",
    holds="both ranks leave with code 75 at the same step, with its checkpoint; the end is the unbroken run's, bit for bit",
)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Stop(STEP, 3, signal.SIGTERM, (1,)), Stop(EVALUATION, 1, signal.SIGUSR1, (0,))),
        (Stop(EVALUATION, 2, signal.SIGTERM, (0, 1)), Stop(EVALUATION, 1, signal.SIGINT, (1,))),
        (Stop(CHECKPOINT, 2, signal.SIGUSR1, (0,)), Stop(STEP, 9, signal.SIGINT, (0, 1))),
        (Stop(STARTUP, 1, signal.SIGINT, (0, 1)), Stop(STARTUP, 1, signal.SIGTERM, (1,))),
    ],
    ids=["step_evaluation", "evaluation_twice", "checkpoint_step", "startup_twice"],
)
def test_a_run_stopped_twice_is_the_unbroken_run(
    config: Path, whole: Path, tmp_path: Path, fired: Fired, first: Stop, second: Stop
) -> None:
    seconds = []
    for stop in (first, second):
        ranks = train_until(stop, world_size=2, config=config, run_dir=tmp_path / "run", overrides=OVERRIDES)
        assert [rank.finished.code for rank in ranks] == [STOPPED_CODE] * 2, ranks[0].finished.stderr
        seconds.append(max(ranks[rank].seconds for rank in stop.ranks))
        status = status_of(tmp_path / "run")
        assert (status["phase"], status["signal"]) == ("stopped", stop.number.name)
        saved = [int(path.name.removeprefix("step_")) for path in (tmp_path / "run" / "checkpoints").glob("step_*")]
        assert status["checkpoint_step"] == max(saved, default=None)
        assert status["step"] == max(saved, default=0)
        assert f"stopped by {stop.number.name}" in ranks[0].finished.stdout
        assert "Traceback" not in "".join(rank.finished.stderr for rank in ranks)
        if stop.place == EVALUATION:
            assert max(rank.calls_after for rank in ranks) <= 1, "the evaluation went on"
            assert status["step"] % 5 == 0
    ranks = train_until(NEVER, world_size=2, config=config, run_dir=tmp_path / "run", overrides=OVERRIDES)
    assert [rank.finished.code for rank in ranks] == [0, 0]
    assert_same_run(whole, tmp_path / "run")
    fired(f"2 stops, {min(seconds):.1f} to {max(seconds):.1f} s from signal to exit")
