"""A disk that is full or read-only, at whatever a run writes: it is told with its bytes, and the run goes on once there is room."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aplantida_dist.checkpoint import CheckpointError, save_checkpoint
from aplantida_dist.errors import UserError
from aplantida_dist.lineage import Lineage
from aplantida_dist.objective import Objective, Targets
from aplantida_dist.trainer import train as run_the_loop
from tests.disks import remount
from tests.faults.conftest import Fired
from tests.laws import last_step, train
from tests.ranks import command_on_ranks, run_ranks
from tests.runs import compose, position_at, rows_of, write_config

PAGE_BYTES = 4096
TOLD = re.compile(
    r"error: (?P<path>/[^ ]*): .*No space left on device \((?P<needed>[\d,]+) bytes (more )?needed, (?P<free>[\d,]+) bytes free\); "
)
CHECKPOINT_PAGES = 2_000
"""What one checkpoint of the small model may take, generously."""


def run(config: Path, run_dir: Path, *overrides: str) -> tuple[int, str]:
    """The command on one rank: its exit code, and its one line on stderr."""
    arguments = ["--config", config, "--run-dir", run_dir, *overrides]
    (finished,) = command_on_ranks(1, "aplantida_dist.train", arguments, config.parent)
    assert finished.stderr.count("\n") <= 1, finished.stderr
    return finished.code, finished.stderr.strip()


def number(text: str) -> int:
    return int(text.replace(",", ""))


def used_bytes(disk: Path) -> int:
    return shutil.disk_usage(disk).used


def same_run(one: Path, other: Path) -> bool:
    """The same rows, weights and optimizer, bit for bit."""
    files = [
        [np.frombuffer((run_dir / "checkpoints" / f"step_{last_step(run_dir):08d}" / name).read_bytes(), np.uint8)
         for run_dir in (one, other)]
        for name in ("model.safetensors", "optimizer.safetensors")
    ]  # fmt: skip
    return rows_of(one) == rows_of(other) and all(np.array_equal(ours, theirs) for ours, theirs in files)


class Acts:
    """The run's own objective, which does something to the disk in one of its calls."""

    def __init__(self, objective: Objective, *, call: int, act: Any) -> None:
        self.objective, self.call, self.act, self.num_calls = objective, call, act, 0

    def __call__(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        if self.num_calls == self.call:
            self.act()
        self.num_calls += 1
        return self.objective(logits, targets)


def train_and_act(config: Path, run_dir: Path, step: int, act: Any) -> str:
    """Train on this rank; at a step (from 0) `act` is done. The text of the UserError that ends it, as the command tells it."""
    training = compose(config, run_dir)
    job = replace(training.job, objective=Acts(training.job.objective, call=4 * step, act=act))
    try:
        run_the_loop(job, start_step=training.start_step, running=training.running)
    except UserError as error:
        job.record.fail(str(error))
        return f"error: {error}"
    return "nothing"


def shrink_to(disk: Path, free_bytes: int) -> None:
    """Leave so many bytes free."""
    remount(disk, f"size={-(-(used_bytes(disk) + free_bytes) // PAGE_BYTES) * PAGE_BYTES}")


@pytest.fixture(scope="module")
def whole(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config with a checkpoint of every second step, and the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "config.yaml", dataset_dir, epochs=2, every_steps=2)
    train(1, config, folder / "whole")
    return config, folder / "whole"


@pytest.mark.fault(
    what="disk full at a checkpoint",
    how="a file system in memory, shrunk at step 3 to less than a checkpoint",
    holds="refused before a byte is written: path, bytes needed and free; no part is left; with room the same command ends as the unbroken run",
)
def test_a_checkpoint_that_does_not_fit(whole: tuple[Path, Path], disk: Path, fired: Fired) -> None:
    """The run stops at the checkpoint of step 4; those before it are whole."""
    config, unbroken = whole
    run_dir = disk / "run"
    (line,) = run_ranks(1, train_and_act, config, run_dir, 3, lambda: shrink_to(disk, 400_000))
    told = TOLD.match(line)
    assert told is not None, line
    assert told["path"] == str(run_dir / "checkpoints" / "step_00000004")
    assert number(told["free"]) < number(told["needed"])
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["last.json", "step_00000002"]
    remount(disk, "size=64M")
    assert run(config, run_dir) == (0, "")
    assert same_run(unbroken, run_dir)
    fired(f"{told['needed']} bytes needed, {told['free']} free")


def test_a_checkpoint_whose_room_goes_while_it_is_written(disk: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """As beyond a quota, which free bytes do not show: safetensors' own error is told the same way, and nothing is left."""
    remount(disk, f"size={8 * PAGE_BYTES}")
    monkeypatch.setattr("aplantida_dist.checkpoint.require_room", lambda path, num_bytes: None)
    with pytest.raises(CheckpointError, match=r"No space left on device.* \([\d,]+ bytes needed, [\d,]+ bytes free\)"):
        save_checkpoint(
            disk / "checkpoints",
            position=position_at(3),
            model_state={"a": torch.zeros(1 << 16)},
            ema_state=None,
            optimizer_state={},
            totals=torch.zeros(3, dtype=torch.int64),
            lineage=Lineage(np.zeros(0, dtype=np.int64)),
        )
    assert list((disk / "checkpoints").iterdir()) == []


@pytest.mark.slow
@pytest.mark.fault(
    what="disk full at a history row, the columns, the status, a pointer",
    how="shrunk in the first epoch's last step to every number of pages from none to enough, one run each",
    holds="the file that did not fit is named with its bytes; every state is one that the same command goes on from, to the bits of the unbroken run",
)
def test_whatever_does_not_fit_at_the_end_of_an_epoch(whole: tuple[Path, Path], disk: Path, fired: Fired) -> None:
    """A page at a time: the row, training_history.json, status.json, the checkpoint, its pointers."""
    config, unbroken = whole
    named: list[str] = []
    for num_pages in (0, 1, 2, 3, 4, 5, 6, CHECKPOINT_PAGES):
        run_dir = disk / f"run_{num_pages}"
        free_bytes = num_pages * PAGE_BYTES
        (line,) = run_ranks(1, train_and_act, config, run_dir, 4, lambda free=free_bytes: shrink_to(disk, free))
        remount(disk, "size=64M")
        if line == "nothing":
            break
        told = TOLD.match(line)
        assert told is not None, line
        named.append(Path(told["path"]).name)
        code, warned = run(config, run_dir)
        assert code == 0, warned
        assert same_run(unbroken, run_dir), num_pages
        shutil.rmtree(run_dir)
    assert {"status.json", "step_00000005"} <= set(named), named
    fired(f"{len(named)} sizes: {', '.join(dict.fromkeys(named))}")


@pytest.mark.fault(
    what="disk read-only in mid-run",
    how="remounted read-only at step 3",
    holds="the first file that cannot be written is named; writable again, the same command ends as the unbroken run",
)
def test_a_disk_that_becomes_read_only(whole: tuple[Path, Path], disk: Path, fired: Fired) -> None:
    """The first cause is told, although status.json cannot be written either."""
    config, unbroken = whole
    run_dir = disk / "run"
    (line,) = run_ranks(1, train_and_act, config, run_dir, 3, lambda: remount(disk, "ro"))
    assert re.match(rf"error: {run_dir}/.*Read-only file system", line), line
    code, again = run(config, run_dir)
    assert code == 2
    assert "Read-only file system" in again
    remount(disk, "rw")
    assert run(config, run_dir) == (0, "")
    assert same_run(unbroken, run_dir)
    fired(line.partition(": ")[2].partition(":")[0].rpartition("/")[2])


@pytest.mark.fault(
    what="disk full or read-only at the start",
    how="a file system of one page, or read-only, below the run folder",
    holds="one line that names the path, before a step is taken",
)
def test_a_run_that_cannot_begin(dataset_dir: Path, tmp_path: Path, disk: Path, fired: Fired) -> None:
    """config.yaml, or the folder itself."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    remount(disk, f"size={PAGE_BYTES}")
    code, line = run(config, disk / "run")
    assert (code, TOLD.match(line) is not None) == (2, True), line
    remount(disk, "size=64M,ro")
    code, read_only = run(config, disk / "other")
    assert code == 2
    assert f"{disk}/other: the run folder cannot be made or locked: Read-only file system" in read_only
    remount(disk, "rw")
    fired("2 of 2 refused")


def test_a_history_row_that_does_not_fit(whole: tuple[Path, Path], disk: Path) -> None:
    """The row is half written, or not at all: the resumed run drops it and writes it again."""
    config, unbroken = whole
    run_dir = disk / "run"
    train(1, config, run_dir, "train.epochs=2")
    history = run_dir / "history.jsonl"
    rows = history.read_bytes().splitlines(keepends=True)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000010")
    history.write_bytes(rows[0] + rows[1][: len(rows[1]) // 2])
    (run_dir / "training_history.json").unlink()
    assert run(config, run_dir) == (0, "")
    assert same_run(unbroken, run_dir)
