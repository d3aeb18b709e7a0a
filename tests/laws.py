"""The laws that every switch keeps, each run with it on: ranks do not matter, and neither does being stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.ranks import command_on_ranks
from tests.runs import cut_back, rows_of

Weights = dict[str, np.ndarray]


def train(world_size: int, config: Path, run_dir: Path, *overrides: str) -> str:
    """Run the command on forked ranks; its main process's output."""
    arguments = ["--config", config, "--run-dir", run_dir, *overrides]
    finished = command_on_ranks(world_size, "aplantida_dist.train", arguments, config.parent)
    assert [rank.code for rank in finished] == [0] * world_size, "\n".join(rank.stderr for rank in finished)
    return finished[0].stdout + finished[0].stderr


def weights_at(run_dir: Path, step: int) -> Weights:
    """The weights of a run's checkpoint."""
    return load_file(run_dir / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def last_step(run_dir: Path) -> int:
    """The step of a run's newest checkpoint."""
    return max(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))


def run_whole(config: Path, overrides: Sequence[str] = ()) -> Path:
    """Train on one rank with a checkpoint of every step; the run folder."""
    run_dir = config.parent / "whole"
    train(1, config, run_dir, *overrides, "checkpoint.every_steps=1", "checkpoint.keep_last=100")
    return run_dir


def require_exact_resume(whole: Path, config: Path, overrides: Sequence[str], *, stop: int) -> None:
    """Cut back to a checkpoint and resumed, a run of `run_whole` has the same history, weights and optimizer, bit for bit."""
    broken = whole.with_name(f"broken_{stop}")
    shutil.copytree(whole, broken)
    cut_back(broken, step=stop)
    said = train(1, config, broken, *overrides, "checkpoint.every_steps=1", "checkpoint.keep_last=100")
    assert f"going on from step {stop}" in said
    assert json.dumps(rows_of(whole)) == json.dumps(rows_of(broken))
    for name in ("model", "optimizer"):
        files = (
            run / "checkpoints" / f"step_{last_step(whole):08d}" / f"{name}.safetensors" for run in (whole, broken)
        )
        ours, theirs = (load_file(file) for file in files)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not np.array_equal(ours[key], theirs[key])] == []


def require_same_on_two_ranks(whole: Path, config: Path, overrides: Sequence[str], *, rel: float = 1e-5) -> None:
    """Two ranks read the same samples as the one of `run_whole` and lose the same in training, to `rel` of it."""
    other = whole.with_name("two_ranks")
    train(2, config, other, *overrides)
    for ours, theirs in zip(rows_of(whole), rows_of(other), strict=True):
        assert ours["train"]["identity_digest"] == theirs["train"]["identity_digest"]
        assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=rel)
