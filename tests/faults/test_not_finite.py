"""Steps that are not finite, as rows of the matrix; what they rest on is in tests/test_nonfinite.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from aplantida_dist.files import sha256_of_file
from aplantida_dist.nonfinite import NonFiniteError
from aplantida_dist.trainer import train
from tests.faults.conftest import Fired
from tests.ranks import command_on_ranks, run_ranks
from tests.runs import compose, rows_of, write_config
from tests.test_nonfinite import Overflowing, train_poisoned


def checkpoints_in(run_dir: Path) -> dict[str, str]:
    """Every file of every checkpoint with its sha256."""
    return {str(path): sha256_of_file(path) for path in sorted((run_dir / "checkpoints").rglob("*")) if path.is_file()}


def is_finite(run_dir: Path) -> bool:
    """Whether the history has no NaN, nor has any checkpoint."""
    history = run_dir / "history.jsonl"
    text = history.read_text() if history.exists() else ""
    files = (run_dir / "checkpoints").glob("step_*/*.safetensors")
    tensors = [tensor for path in files for tensor in load_file(path).values()]
    assert tensors
    return not {"NaN", "Infinity"} & set(text.replace(",", " ").split()) and all(np.isfinite(t).all() for t in tensors)


def overflow_at(config: Path, run_dir: Path, overrides: Sequence[str], step: int) -> str:
    """Train with a gradient, not a loss, that is infinite at a step (from 0)."""
    training = compose(config, run_dir, overrides)
    slots = training.job.plan.slots_of(training.job.world.rank, training.job.world.world_size)
    job = replace(training.job, objective=Overflowing(training.job.objective, call=step * len(slots)))
    try:
        train(job, start_step=training.start_step, running=training.running)
    except NonFiniteError as error:
        return str(error)
    return ""


@pytest.mark.fault(
    what="NaN or Inf loss, or Inf gradient, at a chosen step",
    how="one sample's loss replaced, or the gradient of one slot, in step 8 of 15, on the last of 2 ranks",
    holds="every rank stops before the update; the file names the keys of the batch; the checkpoint before is untouched; no NaN on disk",
)
@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_it_stops_before_the_weights_are_touched(dataset_dir: Path, tmp_path: Path, fired: Fired, kind: str) -> None:
    """Checkpoints of every step, so that the last good one is that of the step before."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, every_steps=1)
    run_dir = tmp_path / "run"
    if kind == "gradient":
        errors = run_ranks(2, overflow_at, config, run_dir, [], 7)
    else:
        ranks = run_ranks(2, lambda: train_poisoned(config, run_dir, [], steps=[7], loss=float(kind)))
        assert all(rank["finite"] for rank in ranks)
        errors = [rank["error"] for rank in ranks]
    assert all(error.startswith("step 8: ") for error in errors)
    account = json.loads((run_dir / "nonfinite_step_00000008.json").read_text())
    assert len({sample["sample_key"] for sample in account["samples"]}) == 16
    assert json.loads((run_dir / "checkpoints" / "last.json").read_text())["step"] == 7
    assert [row["epoch"] for row in rows_of(run_dir)] == [1]
    assert is_finite(run_dir)
    fired(f"stopped at step 8, {len(account['samples'])} keys written")


@pytest.mark.fault(
    what="an exploding learning rate",
    how="`optimizer.peak_lr=1e30`, by the command",
    holds="exit code 2 and one line; nothing not finite is on disk; lowered from the checkpoint on is refused as another law, and says so",
)
def test_an_exploding_learning_rate_ends_the_run(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """The weights of the last checkpoint are finite, and stay the bytes that they were."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, every_steps=1)
    arguments: list[Any] = ["--config", config, "--run-dir", tmp_path / "run"]
    exploding = ["optimizer.peak_lr=1.0e+30", "train.clip_norm=null"]
    (finished,) = command_on_ranks(1, "aplantida_dist.train", [*arguments, *exploding], tmp_path)
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert "the last" in line
    assert "checkpoint is untouched: lower optimizer.peak_lr" in line
    assert is_finite(tmp_path / "run")
    before = checkpoints_in(tmp_path / "run")
    (again,) = command_on_ranks(1, "aplantida_dist.train", [*arguments, "train.clip_norm=null"], tmp_path)
    assert again.code == 2
    assert "optimizer.peak_lr was 1.0e+30, is 0.003" in again.stderr
    assert checkpoints_in(tmp_path / "run") == before
    fired(line.partition("error: ")[2].partition(":")[0])


@pytest.mark.slow
@pytest.mark.fault(
    what="NaN loss under `skip`",
    how="one sample's loss replaced in steps 3 and 8; the run cut back between them and resumed",
    holds="the steps are left out and their samples void; the history is finite; the resumed run is the unbroken one to the bit",
)
def test_it_voids_by_policy(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """Samples counted and void are those expected, in each row."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2, every_steps=1)
    overrides = ["train.on_nonfinite=skip", "checkpoint.keep_last=100"]
    (whole,) = run_ranks(1, lambda: train_poisoned(config, tmp_path / "whole", overrides, steps=[2, 7]))
    assert [row["train"]["void_samples"] for row in rows_of(tmp_path / "whole")] == [16, 16]
    assert is_finite(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for step in range(6, 11):
        shutil.rmtree(tmp_path / "broken" / "checkpoints" / f"step_{step:08d}")
    (again,) = run_ranks(1, lambda: train_poisoned(config, tmp_path / "broken", overrides, steps=[7]))
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "broken")
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(whole["weights"], again["weights"], strict=True))
    fired("2 steps left out, 32 samples void")
