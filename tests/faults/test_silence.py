"""Silence: a rank that is stopped, stuck, broken or without its worker is named once, on one line, and all ranks end."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from torch import Tensor

import aplantida_dist.compose  # noqa: F401 (forked ranks begin with all of it in memory)
from aplantida_dist import trainer
from aplantida_dist.data.plan import Coordinates
from aplantida_dist.job import Job
from tests.faults.conftest import Fired
from tests.faults.forked import ForkedRun, start, wait_for_checkpoint
from tests.faults.launched import launch
from tests.runs import rows_of, write_config

BUDGET_S = 8
ENDS_WITHIN_S = 15
BREAKS_AT = 4


def break_down(rank: int) -> None:
    """Rank 1 meets a bug of its own at a step."""
    inject(rank, sick_rank=1, act=lambda: {}["a bug"])


def fall_asleep(rank: int) -> None:
    """Rank 1 never comes back from a step, and its other threads go on."""
    inject(rank, sick_rank=1, act=lambda: time.sleep(1000))


def sleep_while_saving(rank: int) -> None:
    """The main process never comes back from writing a checkpoint."""
    from aplantida_dist import record

    def save_checkpoint(*arguments: object, **named: object) -> None:
        time.sleep(1000)

    record.save_checkpoint = save_checkpoint  # type: ignore[assignment]


def break_while_saving(rank: int) -> None:
    """The main process meets a bug of its own while it writes a checkpoint, which the others wait for."""
    from aplantida_dist import record

    def save_checkpoint(*arguments: object, **named: object) -> None:
        raise KeyError("a bug")

    record.save_checkpoint = save_checkpoint  # type: ignore[assignment]


def break_workers(rank: int) -> None:
    """A worker of rank 1 meets a bug at its fourth micro-batch of training."""
    from aplantida_dist.data.stream import MicroBatches

    read = MicroBatches.read

    def sick(self: MicroBatches, at: Coordinates, *, pixels: Tensor) -> object:
        if rank == 1 and at.step_in_epoch == BREAKS_AT - 1:
            raise KeyError("a bug")
        return read(self, at, pixels=pixels)

    MicroBatches.read = sick  # type: ignore[method-assign, assignment]


def inject(rank: int, *, sick_rank: int, act: object) -> None:
    """Have a rank do something else at the beginning of a step."""
    run_step = trainer.run_step

    def sick(job: Job, batches: object, running: object, step: int) -> None:
        if rank == sick_rank and step == BREAKS_AT:
            assert callable(act)
            act()
        run_step(job, batches, running, step)  # type: ignore[arg-type]

    trainer.run_step = sick


def begin(dataset: Path, folder: Path, *overrides: str, before: object = None, epochs: int = 300) -> ForkedRun:
    """Two ranks, a worker each, in a run that would take minutes."""
    config = write_config(folder / "config.yaml", dataset, epochs=epochs, every_steps=2, num_workers=1)
    arguments = ["--config", config, "--run-dir", folder / "run", *overrides]
    return start(2, arguments, folder, before)  # type: ignore[arg-type]


def told_once(run: ForkedRun, folder: Path) -> str:
    """The one line that all ranks together have said, which status.json repeats."""
    lines = [line for line in run.said().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, run.said()
    assert "Traceback" not in run.said()
    status = json.loads((folder / "run" / "status.json").read_text())
    if status["phase"] == "failed":
        assert lines[0] == f"error: {status['reason']}"
    return lines[0]


@pytest.mark.fault(
    what="one rank dead silent",
    how="SIGSTOP of rank 1, for ever; train.timeout_s 8",
    holds="one line names rank, pid, stage and last step; the stopped process is killed",
)
def test_a_stopped_rank_is_named(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """Its heartbeat has stopped: that is told, in the time of one time-out, and no process stays."""
    run = begin(dataset_dir, tmp_path, f"train.timeout_s={BUDGET_S}")
    wait_for_checkpoint(run, tmp_path / "run")
    os.kill(run.ranks[1].pid or 0, signal.SIGSTOP)
    seconds = run.wait_until_gone(BUDGET_S + ENDS_WITHIN_S)
    said = told_once(run, tmp_path)
    assert f"rank 1 (pid {run.ranks[1].pid} on " in said
    assert "has given no sign of life for" in said
    assert "after step" in said
    assert run.codes() == [2, -signal.SIGKILL]
    fired(f"gone in {seconds:.0f} s")


@pytest.mark.parametrize(
    ("injury", "guilty", "stage"),
    [
        (fall_asleep, 1, "saving, after step 4"),
        pytest.param(sleep_while_saving, 0, "saving, after step 2", marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault(
    what="one rank stuck, alive",
    how="a step, or the writing of a checkpoint on the main process, that never ends; train.timeout_s 8",
    holds="one line names the rank that all wait for, its stage and its last step",
)
def test_a_stuck_rank_is_named(
    dataset_dir: Path, tmp_path: Path, fired: Fired, injury: object, guilty: int, stage: str
) -> None:
    """Its heart beats and its work stands still: that is told apart from a stopped one."""
    run = begin(dataset_dir, tmp_path, f"train.timeout_s={BUDGET_S}", before=injury)
    while run.is_alive() and not (tmp_path / "run" / "status.json").exists():
        time.sleep(0.02)
    started_s = time.monotonic()
    run.wait_until_gone(3 * BUDGET_S + ENDS_WITHIN_S)
    seconds = time.monotonic() - started_s
    said = told_once(run, tmp_path)
    assert f"rank {guilty} (pid {run.ranks[guilty].pid} on " in said
    assert "is alive and has not moved for" in said
    assert f"last seen {stage}" in said
    assert f"what each rank was in: {tmp_path}/run/stacks_rank_*.txt" in said
    for rank in range(2):
        assert "in _run_steps" in (tmp_path / "run" / f"stacks_rank_{rank}.txt").read_text()
    assert 2 in run.codes()
    fired(f"gone {seconds:.0f} s after the start of the run")


@pytest.mark.slow
@pytest.mark.fault(
    what="one rank slow",
    how="SIGSTOP of rank 0, then of rank 1, for 20 s each; train.timeout_s 60",
    holds="the run goes on and ends as one that nobody stopped",
)
def test_a_slow_rank_is_waited_for(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """Silence within the budget is no fault, also of the rank that keeps the board."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "whole").mkdir()
    run = begin(dataset_dir, tmp_path / "slow", "train.timeout_s=60", epochs=4)
    for rank, step in ((0, 2), (1, 7)):
        wait_for_checkpoint(run, tmp_path / "slow" / "run", step=step)
        pid = run.ranks[rank].pid or 0
        os.kill(pid, signal.SIGSTOP)
        time.sleep(20)
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        os.kill(pid, signal.SIGCONT)
    run.wait_until_gone(60)
    assert run.codes() == [0, 0], run.said()
    whole = begin(dataset_dir, tmp_path / "whole", "train.timeout_s=60", epochs=4)
    whole.wait_until_gone(60)
    assert json.dumps(rows_of(tmp_path / "slow" / "run")) == json.dumps(rows_of(tmp_path / "whole" / "run"))
    fired("2 of 2 waited for")


@pytest.mark.fault(
    what="an exception in one rank",
    how="a KeyError in a step of rank 1",
    holds="its traceback once, with rank, stage and step; the other rank ends without a word; status.json says it",
)
def test_a_bug_on_one_rank_is_told_once(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """The first cause alone is on stderr, not what it does to the others."""
    run = begin(dataset_dir, tmp_path, before=break_down)
    wait_for_checkpoint(run, tmp_path / "run", step=BREAKS_AT)
    seconds = run.wait_until_gone(ENDS_WITHIN_S)
    assert run.stderr(0).strip() == ""
    assert run.stderr(1).count("Traceback") == 1
    assert "KeyError: 'a bug'\non rank 1: " in run.stderr(1)
    assert run.codes() == [2, 1]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["phase"] == "failed"
    assert "KeyError: 'a bug'" in status["reason"]
    fired(f"gone in {seconds:.1f} s")


@pytest.mark.fault(
    what="an exception in the main process alone",
    how="a KeyError while it writes a checkpoint",
    holds="its traceback once, with rank, stage and step; the other rank, which waits for it, ends and tells no error",
)
def test_a_bug_on_the_main_process_is_told_once(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """Nobody waits for the main process where it alone has failed."""
    run = begin(dataset_dir, tmp_path, before=break_while_saving)
    seconds = run.wait_until_gone(2 * ENDS_WITHIN_S)
    assert "Traceback" not in run.stderr(1)
    assert "error: " not in run.stderr(1)
    assert run.stderr(0).count("Traceback") == 1
    assert "KeyError: 'a bug'\non rank 0: saving, after step 2, working" in run.stderr(0)
    assert run.codes() == [1, 2]
    fired(f"gone in {seconds:.1f} s, start-up included")


@pytest.mark.fault(
    what="an exception in a loader worker",
    how="a KeyError in a worker of rank 1",
    holds="the worker's traceback once, with rank, stage and step; the other rank ends without a word",
)
def test_a_bug_in_a_worker_is_told_once(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """What a worker meets is its rank's own failure."""
    run = begin(dataset_dir, tmp_path, before=break_workers)
    seconds = run.wait_until_gone(2 * ENDS_WITHIN_S)
    assert run.stderr(0).strip() == ""
    assert run.stderr(1).count("KeyError: 'a bug'") == 1
    assert "in DataLoader worker process 0" in run.stderr(1)
    assert "\non rank 1: training, after step 3, " in run.stderr(1)
    assert run.codes() == [2, 1]
    fired(f"gone in {seconds:.1f} s, start-up included")


@pytest.mark.fault(
    what="a loader worker killed",
    how="SIGKILL of the worker of rank 1",
    holds="one line names the rank, the worker's pid, stage and step; code 2 on both ranks",
)
def test_a_killed_worker_is_named(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """The rank that has lost its worker says so, and the other ends with it."""
    run = begin(dataset_dir, tmp_path)
    wait_for_checkpoint(run, tmp_path / "run")
    (worker,) = run.workers(1)
    os.kill(worker, signal.SIGKILL)
    seconds = run.wait_until_gone(ENDS_WITHIN_S)
    said = told_once(run, tmp_path)
    assert f"rank 1 (pid {run.ranks[1].pid} on " in said
    assert f"DataLoader worker (pid {worker}) is killed by signal: Killed" in said
    assert run.codes() == [2, 2]
    fired(f"gone in {seconds:.1f} s")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.fault(
    what="a rank killed under its launcher",
    how="SIGKILL of one of two ranks of `accelerate launch`, which sends the other the SIGTERM that it would stop at gracefully",
    holds="all gone within 15 s, the dead rank named by the launcher and by the other; the port is free",
)
def test_a_rank_killed_under_a_launcher_is_named(dataset_dir: Path, tmp_path: Path, fired: Fired, rank: int) -> None:
    """A rank that was asked to stop, and cannot reach the next step with a dead one, does not wait for the launcher's SIGKILL."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=300, every_steps=2, num_workers=1)
    run = launch(2, ["--config", config, "--run-dir", tmp_path / "run"], tmp_path / "output")
    wait_for_checkpoint(run, tmp_path / "run")
    time.sleep(1.5)  # a beat tells where it was
    pid = run.ranks()[rank]
    os.kill(pid, signal.SIGKILL)
    seconds = run.wait_until_gone(ENDS_WITHIN_S)
    said = run.said()
    assert said.count("error: rank ") == 1, said
    assert f"error: rank {rank} (pid {pid} on " in said
    assert f"Signal 9 (SIGKILL) received by PID {pid}" in said
    fired(f"gone in {seconds:.1f} s (rank {rank})")


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.fault(
    what="a rank killed",
    how="SIGKILL of one of two ranks, without a launcher to notice it",
    holds="one line of the other names rank, pid, stage and last step",
)
def test_a_killed_rank_is_named(dataset_dir: Path, tmp_path: Path, fired: Fired, rank: int) -> None:
    """Whoever lives says who died."""
    run = begin(dataset_dir, tmp_path)
    wait_for_checkpoint(run, tmp_path / "run")
    time.sleep(1.5)  # a beat tells where it was
    os.kill(run.ranks[rank].pid or 0, signal.SIGKILL)
    seconds = run.wait_until_gone(ENDS_WITHIN_S)
    said = told_once(run, tmp_path)
    assert f"rank {rank} (pid {run.ranks[rank].pid} on " in said
    assert "is gone: it was killed, or it crashed; last seen" in said
    assert run.codes()[rank] == -signal.SIGKILL
    assert run.codes()[1 - rank] == 2
    fired(f"gone in {seconds:.1f} s")
