"""The commands as a user types them: help, debug mode, the plan, what a run leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import Finished, command_on_ranks, run_ranks
from tests.runs import compose, rows_of, write_config

ROOT = Path(__file__).parents[1]
LOADS_TORCH = ("aplantida_dist.train", "aplantida_dist.evaluate", "aplantida_dist.soft_labels")
"""What takes seconds to begin, and is forked from this process where that does not matter."""


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize(
    "command",
    [
        ["shards/build.py"],
        ["shards/verify.py"],
        ["shards/plan.py"],
        ["-m", "aplantida_dist.train"],
        ["-m", "aplantida_dist.evaluate"],
        ["-m", "aplantida_dist.soft_labels"],
        ["-m", "aplantida_dist.analyze"],
        ["-m", "aplantida_dist.herbarium"],
    ],
    ids=lambda command: command[-1],
)
def test_every_command_has_help_with_an_example_and_complains_in_one_line(command: list[str], tmp_path: Path) -> None:
    """`--help`, from a fresh interpreter, shows an example; a wrong option is one line on stderr and exit code 2."""
    told = run_script(*command, "--help")
    assert told.returncode == 0
    assert "example:" in told.stdout
    if command[-1] in LOADS_TORCH:
        (wrong,) = command_on_ranks(1, command[1], ["--no-such-option"], tmp_path)
    else:
        script = run_script(*command, "--no-such-option")
        wrong = Finished(script.returncode, script.stdout, script.stderr)
    assert wrong.code == 2
    assert wrong.stdout == ""
    assert len(wrong.stderr.splitlines()) == 1
    assert wrong.stderr.startswith("error: ")
    assert "--help" in wrong.stderr


def test_debug_mode_makes_a_teacher_small_and_says_what_it_changed(dataset_dir: Path, tmp_path: Path) -> None:
    """The shipped teacher config in seconds on one process, without network, through the same code."""
    arguments = ["--config", ROOT / "configs" / "teacher_global.yaml", "--debug", "--max-samples", "40"]
    arguments += ["--run-dir", tmp_path / "run", f"data.dataset={dataset_dir}"]
    (finished,) = command_on_ranks(1, "aplantida_dist.train", arguments, tmp_path)
    assert finished.code == 0, finished.stderr
    assert '--debug: model.name = "test_vit" (was "vit_base_patch16_384")' in finished.stdout
    rows = rows_of(tmp_path / "run")
    assert [row["train"]["num_samples"] for row in rows] == [40, 40]
    (refused, _) = command_on_ranks(2, "aplantida_dist.train", arguments, tmp_path)
    assert refused.code == 2
    assert "--debug runs on one process" in refused.stderr


def test_debug_mode_names_the_samples_whose_loss_is_no_number(dataset_dir: Path, tmp_path: Path) -> None:
    """A learning rate beyond all reason: --debug stops at the step and says which samples."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    overrides = ["optimizer.name=sgd", "optimizer.peak_lr=1.0e+30", "train.clip_norm=null", "schedule.warmup_epochs=0"]
    arguments = ["--config", config, "--run-dir", tmp_path / "run", *overrides]
    (finished,) = command_on_ranks(1, "aplantida_dist.train", [*arguments, "--debug"], tmp_path)
    assert finished.code == 2
    assert "step 1: the loss of " in finished.stderr
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_diverging_run_stops_before_it_records_or_saves_anything(
    dataset_dir: Path, tmp_path: Path, world_size: int
) -> None:
    """NaN is an error with a text that says what to do, said once; the history holds no such row."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, every_steps=2)
    overrides = ["optimizer.name=sgd", "optimizer.peak_lr=1.0e+30", "train.clip_norm=null", "schedule.warmup_epochs=0"]
    arguments = ["--config", config, "--run-dir", tmp_path / "run", *overrides]
    finished = command_on_ranks(world_size, "aplantida_dist.train", arguments, tmp_path)
    assert [rank.code for rank in finished] == [2] * world_size
    (line,) = [line for rank in finished for line in rank.stderr.splitlines()]
    assert "lower optimizer.peak_lr" in line
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["phase"] == "failed"
    assert "lower optimizer.peak_lr" in status["reason"]
    assert not (tmp_path / "run" / "history.jsonl").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def keys_by_slot(config: Path, run_dir: Path) -> dict[tuple[int, int], tuple[str, ...]]:
    from aplantida_dist.trainer import read_ahead

    job = compose(config, run_dir).job
    steps = job.plan.steps_per_epoch
    return {
        (batch.at.epoch * steps + batch.at.step_in_epoch, batch.at.slot): batch.sample_keys
        for batch in read_ahead(job, 0)
    }


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_plan_command_names_what_training_reads(dataset_dir: Path, tmp_path: Path, world_size: int) -> None:
    """`shards/plan.py` and the trainer agree on every key of every slot, also in the middle of the third epoch."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    (read,) = run_ranks(1, keys_by_slot, config, tmp_path / "run")
    options = ["--global-batch-size", "16", "--micro-batch-size", "4", "--seed", "3", "--world-size", str(world_size)]
    for steps in ("0:5", "13:15"):
        printed = run_script("shards/plan.py", dataset_dir, "--steps", steps, *options)
        assert printed.returncode == 0, printed.stderr
        lines = [json.loads(line) for line in printed.stdout.splitlines()]
        assert {line["rank"] for line in lines} == set(range(world_size))
        for line in lines:
            if (line["step"], line["slot"]) in read:
                assert tuple(line["keys"]) == read[line["step"], line["slot"]]
            else:
                assert set(line["weights"]) == {0.0}
    epoch = run_script("shards/plan.py", dataset_dir, "--epoch", "2", *options)
    assert {json.loads(line)["step"] for line in epoch.stdout.splitlines()} == {10, 11, 12, 13, 14}
    outside = run_script("shards/plan.py", dataset_dir, "--epoch", "1", "--steps", "3:6", *options)
    assert outside.returncode == 2
    assert "epoch 1 has the steps 5:10" in outside.stderr


def test_a_run_folder_holds_what_the_design_says(dataset_dir: Path, tmp_path: Path) -> None:
    """The resolved config, the class map, the record in both forms, the status, checkpoints under timm's names."""
    from safetensors import safe_open

    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    (finished,) = command_on_ranks(
        1, "aplantida_dist.train", ["--config", config, "--run-dir", tmp_path / "run"], tmp_path
    )
    assert finished.code == 0, finished.stderr
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.yaml",
        "classes.json",
        "history.jsonl",
        "training_history.json",
        "status.json",
        "checkpoints",
    }
    assert "block_samples: 262144" in (run / "config.yaml").read_text(), "every default is filled in"
    assert json.loads((run / "classes.json").read_text()) == json.loads((dataset_dir / "classes.json").read_text())
    status = json.loads((run / "status.json").read_text())
    assert (status["phase"], status["step"], status["total_steps"], status["epoch"]) == ("done", 5, 5, 1)
    with safe_open(run / "checkpoints" / "step_00000005" / "model.safetensors", framework="np") as weights:
        assert "stem.0.weight" in weights.keys()  # noqa: SIM118  (safetensors knows no `in`)
    position = json.loads((run / "checkpoints" / "step_00000005" / "position.json").read_text())
    assert (position["step"], position["epoch"], position["world_size"]) == (5, 1, 1)
    assert {"config", "class_map", "train_manifest", "val_manifest"} == position["digests"].keys()
