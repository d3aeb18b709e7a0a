"""Stopped on request: SIGTERM, SIGUSR1 and Ctrl-C at any moment, on any rank; the same command again ends as the unbroken run."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from aplantida_dist.checkpoint import newest_sound_checkpoint
from aplantida_dist.signals import INTERRUPTED_CODE, SAME_REQUEST_S, STOPPED_CODE
from tests.faults.conftest import Fired
from tests.faults.stops import NEVER, Stop, command_until, replace, train_until
from tests.ranks import FORK, become_rank, free_port, run_module
from tests.runs import write_config
from tests.test_resume import assert_same_run, processes_of, settle, wait_for_step
from tests.test_wandb import runs_of

STEP, EVALUATION = "aplantida_dist.trainer:run_step", "aplantida_dist.evaluation:cross_entropy"
CHECKPOINT, STARTUP = "aplantida_dist.checkpoint:save_file", "aplantida_dist.compose:transforms_of"
OVERRIDES = ("evaluation.micro_batch_size=1", "model.kwargs.drop_rate=0.1")
"""Nine samples of val on two ranks are five rounds."""
FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What the scripts of launch/ tell a launcher to pass on; by itself it would die of SIGUSR1."""


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
            # Asked at one round and answered at the next; the signal itself falls anywhere in a round.
            assert max(rank.calls_after for rank in ranks) <= 2, "the evaluation went on"
            assert status["step"] % 5 == 0
    ranks = train_until(NEVER, world_size=2, config=config, run_dir=tmp_path / "run", overrides=OVERRIDES)
    assert [rank.finished.code for rank in ranks] == [0, 0]
    assert_same_run(whole, tmp_path / "run")
    fired(f"2 stops, {min(seconds):.1f} to {max(seconds):.1f} s from signal to exit")


@pytest.mark.fault(
    what="a mutant: the flag is not polled in evaluation",
    how="the trainer's evaluation is given an empty function in place of the poll",
    holds="the tests above see it: the evaluation goes on to its end",
)
@pytest.mark.slow
def test_an_evaluation_that_does_not_poll_is_seen(config: Path, tmp_path: Path, fired: Fired) -> None:
    stop = Stop(EVALUATION, 1, signal.SIGTERM, (0, 1))
    mutants = [("aplantida_dist.epoch:evaluate_across_ranks", without_poll)]
    ranks = train_until(
        stop, world_size=2, config=config, run_dir=tmp_path / "run", overrides=OVERRIDES, mutants=mutants
    )
    assert [rank.finished.code for rank in ranks] == [STOPPED_CODE] * 2
    assert min(rank.calls_after for rank in ranks) == 4, "all five rounds"
    assert (tmp_path / "run" / "history.jsonl").read_text().count("\n") == 1, "and the row"
    fired("5 of 5 rounds, where at most 3 may be")


def without_poll(evaluate: Any) -> Any:
    return lambda model, **named: evaluate(model, **{**named, "between_rounds": lambda: None})


@pytest.mark.fault(
    what="a second signal, while a rank cannot reach a step boundary",
    how="SIGTERM, again 1 s later, again 1.2 s later, to a rank that stands in C code in the middle of a step",
    holds="those within 2 s are one request; the next ends it at once, with code 130; the last checkpoint is untouched",
)
def test_a_second_signal_leaves_at_once(config: Path, tmp_path: Path, fired: Fired) -> None:
    receiver, sender = os.pipe()
    process = FORK.Process(target=train_and_stand_still, args=(config, tmp_path, receiver, sender))
    process.start()
    os.close(sender)
    assert os.read(receiver, 1) == b"."
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(SAME_REQUEST_S / 2)
    os.kill(process.pid, signal.SIGTERM)
    process.join(SAME_REQUEST_S / 2 + 0.2)
    assert process.exitcode is None, "signals that close are one request"
    sent_s = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    waited_ms = 1000 * (time.monotonic() - sent_s)
    assert process.exitcode == INTERRUPTED_CODE
    lines = (tmp_path / "stderr_0").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["SIGTERM", "SIGTERM, for the second time"]
    assert newest_sound_checkpoint(tmp_path / "run" / "checkpoints", warn=pytest.fail).position.step == 2
    fired(f"{waited_ms:.0f} ms")


def train_and_stand_still(config: Path, folder: Path, receiver: int, sender: int) -> None:
    """In a process of its own: train, and in the fourth step stand in C code that no Python handler can interrupt."""
    os.close(receiver)
    become_rank(0, 1, free_port())
    calls = []

    def stand(run_step: Any) -> Any:
        def call(*given: Any) -> None:
            calls.append(given)
            if len(calls) == 4:
                os.write(sender, b".")
                library = ctypes.CDLL(None)
                while True:
                    library.sleep(60)
            run_step(*given)

        return call

    replace(STEP, stand)
    arguments = ["--config", str(config), "--run-dir", str(folder / "run")]
    run_module("aplantida_dist.train", arguments, [(folder / "stdout_0", folder / "stderr_0")])


@pytest.mark.fault(
    what="SIGTERM or Ctrl-C to the commands that have nothing to save: evaluate, soft_labels",
    how="two forked ranks signal themselves in the second micro-batch",
    holds="they leave with code 130 and one line, with no traceback and no file half written",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("module", ["evaluate", "soft_labels"])
def test_the_other_commands_end_at_once(
    dataset_dir: Path, whole: Path, tmp_path: Path, fired: Fired, module: str, number: signal.Signals
) -> None:
    wanted = ["--predictions" if module == "evaluate" else "--out", tmp_path / "out" / "file"]
    (tmp_path / "out").mkdir()
    place = EVALUATION if module == "evaluate" else "aplantida_dist.soft_labelling:records_of"
    ranks = command_until(
        Stop(place, 2, number, (0, 1)),
        f"aplantida_dist.{module}",
        [
            "--run",
            whole,
            "--checkpoint",
            "last",
            "--data",
            dataset_dir,
            "--split",
            "val",
            *wanted,
            "data.num_workers=1",
        ],
        world_size=2,
        folder=tmp_path,
    )
    assert [rank.finished.code for rank in ranks] == [INTERRUPTED_CODE] * 2
    assert [rank.finished.stderr for rank in ranks] == ["interrupted\n", ""]
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".partial")] == []
    fired(f"{max(rank.seconds for rank in ranks):.1f} s")


@pytest.mark.fault(
    what="SIGTERM, SIGUSR1 and Ctrl-C to the launcher, and to every process at once (Slurm), loader workers too",
    how="a real launcher over two ranks, or one on each of two nodes of which one is told; stops at random moments of one run, the same command after each",
    holds="each ends within the grace period of 30 s with status.json saying stopped; no process is left; no page of traceback from a rank; the end is the unbroken run's",
)
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("launcher", "numbers"),
    [
        ("accelerate", (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)),
        ("torchrun", (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)),
        ("two nodes", (signal.SIGTERM,)),
    ],
    ids=["accelerate", "torchrun", "two_nodes"],
)
def test_a_launcher_that_is_signalled_stops_its_ranks(
    dataset_dir: Path, tmp_path: Path, fired: Fired, launcher: str, numbers: tuple[signal.Signals, ...]
) -> None:
    epochs = 14 * len(numbers)
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=epochs, num_workers=1)
    ranks = train_until(NEVER, world_size=2, config=config, run_dir=tmp_path / "whole")
    assert [rank.finished.code for rank in ranks] == [0, 0]
    run_dir, output, random, seconds = tmp_path / "run", tmp_path / "output", Random(5), []
    step = 0
    for number, everyone in [(number, everyone) for number in numbers for everyone in (False, True)]:
        nodes = launch(launcher, config, run_dir, output)
        wait_for_step(run_dir, step + 5, nodes[0], output)
        time.sleep(random.uniform(0, 0.5))
        sent_s = time.monotonic()
        for pid in processes_of(run_dir) if everyone else [nodes[-1].pid]:
            os.kill(pid, number)
        for node in nodes:
            node.wait(timeout=60)
        seconds.append(time.monotonic() - sent_s)
        status, said = status_of(run_dir), output.read_text()
        step = status["step"]
        assert (status["phase"], status["signal"]) == ("stopped", number.name), said
        assert (run_dir / "checkpoints" / f"step_{status['checkpoint_step']:08d}").is_dir()
        assert all(node.returncode != 0 for node in nodes)
        assert "aplantida_dist/" not in said, "a rank's traceback"
        assert said.count("stopping at the next step boundary") == (len(nodes) if everyone else 1)
        settle(run_dir)
    nodes = launch(launcher, config, run_dir, output)
    assert [node.wait(timeout=900) for node in nodes] == [0] * len(nodes), output.read_text()
    assert_same_run(tmp_path / "whole", run_dir)
    fired(f"{len(seconds)} stops, {min(seconds):.1f} to {max(seconds):.1f} s from signal to the last launcher's end")


def launch(launcher: str, config: Path, run_dir: Path, output: Path) -> list[subprocess.Popen[bytes]]:
    """The command a user types, once a node, what they print in a file."""
    torchrun = "torch.distributed.run"
    meeting = [
        "--nproc-per-node",
        "1",
        "--nnodes",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port()),
    ]
    commands = {
        "accelerate": [
            ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
        ],
        # Not with port 0, of which torchrun tells its ranks as it stands.
        "torchrun": [[torchrun, "--nproc-per-node", "2", "--standalone"]],
        "two nodes": [[torchrun, *meeting, "--node-rank", str(rank)] for rank in range(2)],
    }
    told = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PET_SIGNALS_TO_HANDLE": FORWARDED}
    training = ["-m", "aplantida_dist.train", "--config", str(config), "--run-dir", str(run_dir)]
    with output.open("wb") as file:
        return [
            subprocess.Popen(
                [sys.executable, "-m", *command, *training],
                env={**os.environ, **told},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for command in commands[launcher]
        ]


def test_wandb_hears_that_the_run_will_go_on(dataset_dir: Path, tmp_path: Path) -> None:
    """The offline run is marked as preempting and ends with the command's code."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    stop = Stop(STEP, 2, signal.SIGTERM, (0,))
    ranks = train_until(stop, world_size=1, config=config, run_dir=tmp_path / "run", overrides=["report.wandb=offline"])
    assert ranks[0].finished.code == STOPPED_CODE
    (records,) = runs_of(tmp_path / "run")
    assert [record["type"] for record in records if record["type"] == "preempting"] == ["preempting"]
    assert next(record["exit"]["exit_code"] for record in records if record["type"] == "exit") == STOPPED_CODE
