"""Resume: law 5. Real launchers are killed; the same command again writes what the unbroken run wrote."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.plan import Coordinates, TrainPlan
from aplantida_dist.history import SPEED_FIELDS
from tests.ranks import command_on_ranks
from tests.runs import cut_back, rows_of, write_config

EPOCHS = 4
EPOCHS_TO_KILL_IN = 8
"""Long enough that the second kill, after step 12 of 40, comes before the end on a fast machine too."""


def train(world_size: int, config: Path, run_dir: Path, folder: Path, *arguments: str) -> str:
    """Run the command on forked ranks; its main process's output."""
    finished = command_on_ranks(
        world_size, "aplantida_dist.train", ["--config", config, "--run-dir", run_dir, *arguments], folder
    )
    assert [rank.code for rank in finished] == [0] * world_size, "\n".join(rank.stderr for rank in finished)
    return finished[0].stdout + finished[0].stderr


def weights_of(run_dir: Path) -> dict[str, np.ndarray]:
    """The weights of a run's newest checkpoint."""
    return load_file(max((run_dir / "checkpoints").glob("step_*")) / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """The histories are equal byte for byte apart from time and speed, the final weights and optimizer bit for bit."""
    assert json.dumps(rows_of(one)) == json.dumps(rows_of(other))
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    columns = [json.loads((run / "training_history.json").read_text()) for run in (one, other)]
    for column in SPEED_FIELDS:
        for content in columns:
            content.pop(column, None)
    assert columns[0] == columns[1]


@pytest.mark.parametrize(
    ("model", "precision", "stops"),
    [
        ("test_convnext", "fp32", [7, 13]),
        ("test_resnet", "fp32", [10, 12]),
        pytest.param("test_resnet", "fp32", [1, 19], marks=pytest.mark.slow),
        ("test_convnext", "bf16", [10, 19]),
    ],
)
def test_a_run_stopped_twice_is_the_unbroken_run(
    dataset_dir: Path, tmp_path: Path, model: str, precision: str, stops: list[int]
) -> None:
    """Cut back to a checkpoint, resumed, cut back again: mid-epoch, at an epoch's end, with dropout, BatchNorm, bf16."""
    overrides = ("model.kwargs.drop_rate=0.1",)
    config = write_config(
        tmp_path / "config.yaml", dataset_dir, model=model, precision=precision, epochs=EPOCHS, every_steps=1
    )
    overrides += ("checkpoint.keep_last=100",)
    train(1, config, tmp_path / "whole", tmp_path, *overrides)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for stop in stops:
        cut_back(tmp_path / "broken", step=stop)
        said = train(1, config, tmp_path / "broken", tmp_path, *overrides)
        assert f"going on from step {stop}" in said
        assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_kill_9_of_the_launchers_group_loses_nothing(dataset_dir: Path, tmp_path: Path) -> None:
    """`accelerate launch` on two ranks, SIGKILL in mid-epoch, twice; the same command again ends as the unbroken run does."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=EPOCHS_TO_KILL_IN, every_steps=2, num_workers=1)
    train(2, config, tmp_path / "whole", tmp_path)
    run_dir = tmp_path / "killed"
    for step_to_see in (3, 12):
        launcher = launch(config, run_dir, tmp_path / "output")
        wait_for_step(run_dir, step_to_see, launcher, tmp_path / "output")
        assert len(processes_of(run_dir)) >= 3, "a launcher and two ranks"
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        history = run_dir / "history.jsonl"
        num_rows = history.read_bytes().count(b"\n") if history.exists() else 0
        assert num_rows < EPOCHS_TO_KILL_IN, "killed too late to prove anything"
        settle(run_dir)
    launcher = launch(config, run_dir, tmp_path / "output")
    launcher.wait(timeout=200)
    output = (tmp_path / "output").read_text()
    assert launcher.returncode == 0, output
    assert "going on from step" in output
    assert_same_run(tmp_path / "whole", run_dir)


def launch(config: Path, run_dir: Path, output: Path) -> subprocess.Popen[bytes]:
    """The command a user types, in a process group of its own, what it prints in a file."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    command += ["-m", "aplantida_dist.train", "--config", str(config), "--run-dir", str(run_dir)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with output.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for_step(run_dir: Path, step: int, launcher: subprocess.Popen[bytes], output: Path) -> None:
    """Return as soon as a checkpoint of this step or a later one is on disk."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s and launcher.poll() is None:
        if any(int(path.name.removeprefix("step_")) >= step for path in run_dir.glob("checkpoints/step_*")):
            return
        time.sleep(0.01)
    pytest.fail(f"no checkpoint of step {step} came: {output.read_text()}")


def processes_of(run_dir: Path) -> list[int]:
    """The processes whose command line names this run: launcher, ranks and their loader workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(run_dir).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def settle(run_dir: Path) -> None:
    """Wait for every process of the run to be gone: an orphan would write into the folder of the run that resumes."""
    deadline_s = time.monotonic() + 15
    while time.monotonic() < deadline_s:
        if not processes_of(run_dir):
            return
        time.sleep(0.05)
    pytest.fail(f"the launcher was killed and {len(processes_of(run_dir))} of its processes live on after 15 s")


def test_a_resumed_stream_opens_no_skipped_sample(dataset_dir: Path, tmp_path: Path) -> None:
    """Every sample of the steps before the checkpoint is destroyed on disk: a run that read one of them would stop."""
    copy = tmp_path / "dataset"
    shutil.copytree(dataset_dir, copy)
    config = write_config(tmp_path / "config.yaml", copy, epochs=1, every_steps=3)
    train(1, config, tmp_path / "whole", tmp_path)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step_00000005")
    destroyed = destroy_samples(copy, steps=range(3))
    assert destroyed == 3 * 16
    train(1, config, tmp_path / "broken", tmp_path)
    assert json.dumps(rows_of(tmp_path / "whole")) == json.dumps(rows_of(tmp_path / "broken"))
    finished = command_on_ranks(
        1, "aplantida_dist.train", ["--config", config, "--run-dir", tmp_path / "fresh"], tmp_path
    )
    assert finished[0].code == 2, "a fresh run must stumble over them, or the test proves nothing"


def destroy_samples(dataset: Path, *, steps: range) -> int:
    """Flip a byte in every train sample of these steps of epoch 0, as the plan of the test's config names them."""
    split = open_dataset(dataset).open_split("train")
    plan = TrainPlan(split.shard_sizes, 3, 16, 4, 262144)
    count = 0
    for step in steps:
        for slot in range(plan.slots_per_step):
            micro_batch = plan.micro_batch(Coordinates(0, step, slot))
            for shard, member in zip(micro_batch.shard_indices, micro_batch.member_indices, strict=True):
                index = np.fromfile(split.index_path(int(shard)), dtype=[("offset", "<u8"), ("rest", "V12")])
                with split.shard_path(int(shard)).open("r+b") as file:
                    file.seek(int(index[member]["offset"]) + 100)
                    byte = file.read(1)[0]
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([byte ^ 0xFF]))
                count += 1
    return count


@pytest.mark.parametrize(("first", "then"), [(1, 3), (3, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(dataset_dir: Path, tmp_path: Path, first: int, then: int) -> None:
    """Stopped in mid-epoch on some ranks, finished on others: the same samples, metrics equal to the last bits of fp32."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=EPOCHS, every_steps=1)
    train(first, config, tmp_path / "whole", tmp_path, "checkpoint.keep_last=100")
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    cut_back(tmp_path / "moved", step=8)
    train(then, config, tmp_path / "moved", tmp_path, "checkpoint.keep_last=100")
    for ours, theirs in zip(rows_of(tmp_path / "whole"), rows_of(tmp_path / "moved"), strict=True):
        assert ours["train"]["identity_digest"] == theirs["train"]["identity_digest"]
        assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=1e-4)
        assert ours["val"]["loss"] == pytest.approx(theirs["val"]["loss"], rel=1e-3)


@pytest.fixture(scope="module")
def whole(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run on one rank, beside its config."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(1, write_config(folder / "config.yaml", dataset_dir, epochs=EPOCHS), folder / "whole", folder)
    return folder / "whole"


@pytest.mark.parametrize("damage", ["cut", "flip", "lose"])
def test_a_broken_newest_checkpoint_falls_back_and_says_so(whole: Path, tmp_path: Path, damage: str) -> None:
    """Found by digest, named, and the one before is taken; the run ends as it would have."""
    config = whole.parent / "config.yaml"
    shutil.copytree(whole, tmp_path / "broken")
    newest = tmp_path / "broken" / "checkpoints" / "step_00000020" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    if damage == "lose":
        newest.unlink()
    else:
        content[-50] ^= 1
        newest.write_bytes(content[:-100] if damage == "cut" else content)
    said = train(1, config, tmp_path / "broken", tmp_path)
    assert "optimizer.safetensors" in said
    assert "falling back to the checkpoint before it" in said
    assert "going on from step 15" in said
    assert_same_run(whole, tmp_path / "broken")


def test_a_finished_run_says_so_and_changes_nothing(dataset_dir: Path, tmp_path: Path) -> None:
    """The same command once more is harmless."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    train(1, config, tmp_path / "run", tmp_path)
    before = (tmp_path / "run" / "history.jsonl").read_bytes()
    said = train(1, config, tmp_path / "run", tmp_path)
    assert "0 to go" in said
    assert (tmp_path / "run" / "history.jsonl").read_bytes() == before


def test_best_last_and_retention(dataset_dir: Path, tmp_path: Path) -> None:
    """last names the newest, best the best row's, and only so many others stay."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=EPOCHS, every_steps=2)
    train(
        1,
        config,
        tmp_path / "run",
        tmp_path,
        "checkpoint.keep_last=1",
        "checkpoint.best_metric=val.loss",
        "checkpoint.best_mode=min",
    )
    folder = tmp_path / "run" / "checkpoints"
    rows = rows_of(tmp_path / "run")
    best = min(rows, key=lambda row: row["val"]["loss"])
    assert json.loads((folder / "last.json").read_text())["step"] == 20
    pointed = json.loads((folder / "best.json").read_text())
    assert (pointed["step"], pointed["value"]) == (best["step"], best["val"]["loss"])
    assert {path.name for path in folder.glob("step_*")} == {"step_00000020", f"step_{best['step']:08d}"}
    assert json.loads((tmp_path / "run" / "status.json").read_text())["phase"] == "done"


def test_a_checkpoint_from_before_a_field_goes_on_under_its_default(dataset_dir: Path, tmp_path: Path) -> None:
    """A younger version's field is no change of the law where it has its default, which is what was done before; else it is."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2)
    constant = "schedule.kind=constant"
    train(1, config, tmp_path / "whole", tmp_path, constant)
    train(1, config, tmp_path / "run", tmp_path, constant, "train.epochs=1")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    position = json.loads((checkpoint / "position.json").read_text())
    del position["law_fields"]["data.horizontal_flip"], position["history"], position["digest"]
    (checkpoint / "position.json").write_text(json.dumps({**position, "format": 2}))
    command = ["--config", config, "--run-dir", tmp_path / "run", constant, "data.horizontal_flip=0.25"]
    (refused,) = command_on_ranks(1, "aplantida_dist.train", command, tmp_path)
    assert refused.code == 2
    assert "data.horizontal_flip was 0.5, is 0.25" in refused.stderr
    train(1, config, tmp_path / "run", tmp_path, constant)
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == [1, 2]
    assert rows_of(tmp_path / "run")[1]["train"] == rows_of(tmp_path / "whole")[1]["train"]
