"""The soak, two minutes of it: one command through every kind of fault, repeated until the run is done."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.faults.conftest import Fired
from tests.soak.faults import KINDS, plan_faults
from tests.soak.measuring import NUM_BLOCKS, Slope, slope_of
from tests.soak.verdict import same_rows

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.fault(
    what="everything at random: ranks, workers and launchers killed, stops, damage, a full disk, W&B unplugged",
    how="two minutes of `make soak`: eleven kinds of fault, one after the other, under a supervisor that repeats the command",
    holds="each epoch once, covered; history, weights and optimizer of the undisturbed run, bit for bit; W&B has every row; no orphan",
)
def test_two_minutes_of_everything(tmp_path: Path, fired: Fired) -> None:
    """Memory is told; so short a life is judged by the hour of `make soak` alone."""
    command = [
        sys.executable,
        "-m",
        "tests.soak",
        "--minutes",
        "2",
        "--seed",
        "5",
        "--json",
        str(tmp_path / "soak.json"),
    ]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    told = json.loads((tmp_path / "soak.json").read_text())
    assert sorted(told["fired"]) == sorted(KINDS)
    faults = ", ".join(f"{told['fired'][kind]} × {kind}" for kind in KINDS)
    memory = told["figures"]["memory, main process, undisturbed"]
    fired(f"{faults}; {told['starts']} starts; {told['figures']['no orphan']}; main process {memory}")


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_comes_once_a_round(seed: int) -> None:
    """Whatever the seed, and the same seed plans the same."""
    rounds = 3
    planned = plan_faults(seed, number=rounds * len(KINDS), total_steps=1000, start_s=4.0)
    for first in range(0, len(planned), len(KINDS)):
        assert Counter(fault.kind for fault in planned[first : first + len(KINDS)]) == Counter(KINDS)
    assert [fault.at_step for fault in planned] == sorted(fault.at_step for fault in planned)
    assert planned == plan_faults(seed, number=rounds * len(KINDS), total_steps=1000, start_s=4.0)
    assert len(plan_faults(seed, number=len(KINDS) + 1, total_steps=1000, start_s=4.0)) == len(KINDS) + 1


@pytest.mark.parametrize("per_min", [0.0, 0.05, 2.0])
def test_a_slope_is_found_within_its_error(per_min: float) -> None:
    """Twenty minutes, two samples a second, noise of half a MiB, and a warm-up that must not count."""
    seconds = np.arange(0, 1200, 0.5)
    noise = np.random.default_rng(0).normal(0, 0.5, len(seconds))
    values = 500 + per_min * seconds / 60 + noise - 50 * np.exp(-seconds / 10)
    slope = slope_of(seconds.tolist(), values.tolist())
    assert slope is not None
    assert abs(slope.per_min - per_min) < 4 * slope.error
    assert slope.error < 0.03
    assert slope.is_flat(0.1) == (per_min < 0.1)
    assert slope_of(seconds[:NUM_BLOCKS].tolist(), values[:NUM_BLOCKS].tolist()) is None


def write_run(run_dir: Path, losses: dict[int, float], *, config: str) -> Path:
    """A run folder with no more than a history."""
    run_dir.mkdir()
    rows = [
        {"epoch": epoch, "time_utc": config, "train": {"loss": loss}, "digests": {"config": config}}
        for epoch, loss in losses.items()
    ]
    (run_dir / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "training_history.json").write_text(json.dumps({"epoch": [row["epoch"] for row in rows]}))
    return run_dir


@pytest.mark.parametrize(
    ("losses", "holds"),
    [
        ({1: 3.0, 2: 2.0, 3: 1.0}, [True, True]),
        ({1: 3.0, 2: 2.0}, [False, False]),
        ({1: 3.0, 3: 1.0}, [False, False]),
        ({1: 3.0, 2: 2.000000001, 3: 1.0}, [True, False]),
    ],
    ids=["same", "short", "gap", "another loss"],
)
def test_the_verdict_sees_what_differs(losses: dict[int, float], holds: list[bool], tmp_path: Path) -> None:
    """The undisturbed run goes on for longer, under a config of another digest."""
    whole = write_run(tmp_path / "whole", {1: 3.0, 2: 2.0, 3: 1.0, 4: 0.5}, config="more epochs")
    run = write_run(tmp_path / "run", losses, config="three epochs")
    assert [check.holds for check in same_rows(whole, run, epochs=3)] == holds


def test_a_short_life_proves_nothing() -> None:
    """It is all warm-up."""
    assert Slope(per_min=20.0, error=0.1, last=500.0, seconds=30.0).is_flat(0.1)
    assert not Slope(per_min=20.0, error=0.1, last=500.0, seconds=600.0).is_flat(0.1)
