"""Bad input: one clear line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from aplantida_dist.errors import UserError
from aplantida_dist.shards.writer import ShardLimits
from aplantida_dist.world import open_world
from tests.pictures import build, fill
from tests.ranks import command_on_ranks, run_ranks
from tests.runs import write_config


def complaint(module: str, arguments: Sequence[str | Path], folder: Path, *, world_size: int = 1) -> str:
    """The one line that a command says before it exits with 2; on several ranks it is said once."""
    finished = command_on_ranks(world_size, module, arguments, folder)
    assert [rank.code for rank in finished] == [2] * world_size, finished[0].stderr
    lines = [line for rank in finished for line in rank.stderr.splitlines()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def train_complaint(config: Path, folder: Path, *arguments: str | Path, world_size: int = 1) -> str:
    return complaint(
        "aplantida_dist.train",
        ["--config", config, "--run-dir", folder / "run", *arguments],
        folder,
        world_size=world_size,
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_missing_dataset(tmp_path: Path, world_size: int) -> None:
    """It says how to build one, once, however many ranks find it missing."""
    config = write_config(tmp_path / "config.yaml", tmp_path / "nowhere")
    said = train_complaint(config, tmp_path, world_size=world_size)
    assert "nowhere: no dataset here" in said
    assert "python shards/build.py --from-folder" in said


def test_unknown_model_names_its_neighbours(dataset_dir: Path, tmp_path: Path) -> None:
    """The nearest names of timm."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    assert "did you mean resnet18" in train_complaint(config, tmp_path, "model.name=resnet18x")


def test_wrong_types_and_unknown_keys(dataset_dir: Path, tmp_path: Path) -> None:
    """A config's faults are told with their place; so is a key that nothing reads."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    assert "train.epochs" in train_complaint(config, tmp_path, "train.epochs=many")
    assert "did you mean" in train_complaint(config, tmp_path, "train.epoch=3")
    unread = train_complaint(config, tmp_path, "schedule.kind=constant", "schedule.final_lr=0.001")
    assert "schedule.final_lr: is set to 0.001, but nothing reads it" in unread
    assert "absent.yaml" in train_complaint(tmp_path / "absent.yaml", tmp_path)
    assert "train.epochs" in train_complaint(config, tmp_path, "train.epochs=many", world_size=2)


def test_optimizer_arguments_that_it_does_not_take(dataset_dir: Path, tmp_path: Path) -> None:
    """timm's own complaint, on one line, with where to look."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    assert "optimizer 'adamx' cannot be made" in train_complaint(config, tmp_path, "optimizer.name=adamx")
    assert "cannot be made" in train_complaint(config, tmp_path, "model.kwargs.no_such_argument=1")


def test_truncated_shard(dataset_dir: Path, tmp_path: Path) -> None:
    """Found before the first step."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset_dir, copy)
    shard = copy / "val" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1000])
    config = write_config(tmp_path / "config.yaml", copy)
    assert "shard-000000.tar: the shard has" in train_complaint(config, tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_changed_byte_in_a_member(dataset_dir: Path, tmp_path: Path, num_workers: int) -> None:
    """The crc32 finds it while training, and the message names shard, key and offset."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset_dir, copy)
    index = np.fromfile(copy / "train" / "shard-000001.idx", dtype=[("offset", "<u8"), ("rest", "V12")])
    content = bytearray((copy / "train" / "shard-000001.tar").read_bytes())
    content[int(index[5]["offset"]) + 200] ^= 4
    (copy / "train" / "shard-000001.tar").write_bytes(content)
    config = write_config(tmp_path / "config.yaml", copy, num_workers=num_workers)
    said = train_complaint(config, tmp_path)
    assert "shard-000001.tar: sample " in said
    assert f"at offset {index[5]['offset']} has changed" in said


def test_unwritable_run_folder(dataset_dir: Path, tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    (tmp_path / "run").write_text("in the way")
    assert "the run folder cannot be made" in train_complaint(config, tmp_path)


def test_zero_samples(dataset_dir: Path, tmp_path: Path) -> None:
    """Zero samples is an error, not a loss of 0.0."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    assert "expected a positive whole number" in train_complaint(config, tmp_path, "--max-samples", "0")


def test_a_val_class_that_train_does_not_know(tmp_path: Path) -> None:
    """The builder refuses it: its label could not be learnt."""
    for split, classes in (("train", {"a": 3, "b": 3}), ("val", {"a": 2, "c": 2})):
        fill(tmp_path / "pictures" / split, classes, first=100 * (split == "val"))
    module = str(Path(__file__).parents[1] / "shards" / "build.py")
    finished = subprocess.run(
        [sys.executable, module, "--from-folder", tmp_path / "pictures", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert "c" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def run(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder / "config.yaml", dataset_dir, epochs=1)
    arguments = ["--config", config, "--run-dir", folder / "run"]
    assert command_on_ranks(1, "aplantida_dist.train", arguments, folder)[0].code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def other_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many classes as the small dataset has, one of them another."""
    folder = tmp_path_factory.mktemp("other")
    names = ["Acer campestre", "Betula pendula", "Cornus mas", "Daphne mezereum", "Euonymus", "Quercus"]
    fill(folder / "pictures", dict.fromkeys(names, 6), first=5000)
    build(folder / "pictures", folder / "dataset", limits=ShardLimits(num_samples=13))
    return folder / "dataset"


def test_a_checkpoint_of_another_class_map(run: Path, other_dataset: Path, tmp_path: Path) -> None:
    """A head of the same shape with another class order is refused, on resume and on evaluation."""
    config = write_config(tmp_path / "config.yaml", other_dataset, epochs=1)
    shutil.copytree(run, tmp_path / "run")
    said = train_complaint(config, tmp_path)
    assert "the first difference is class 5: 'Ficus' against 'Quercus'" in said
    said = complaint("aplantida_dist.evaluate", ["--run", run, "--data", other_dataset], tmp_path)
    assert "labels would change their meaning" in said


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=4", "seed was 3, is 4"),
        ("train.global_batch_size=32", "train.global_batch_size was 16, is 32"),
        ("optimizer.peak_lr=0.5", "optimizer.peak_lr was 0.003, is 0.5"),
        ("data.crop_scale=[0.5, 1.0]", "data.crop_scale was [0.35, 1.0], is [0.5, 1.0]"),
    ],
)
def test_a_resume_that_would_break_the_law(
    run: Path, dataset_dir: Path, tmp_path: Path, override: str, named: str
) -> None:
    """What decides the numbers is named with both values."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    shutil.copytree(run, tmp_path / "run")
    assert named in train_complaint(config, tmp_path, override)


def test_a_resume_on_other_samples_or_from_nowhere(run: Path, dataset_dir: Path, tmp_path: Path) -> None:
    """Another manifest, a checkpoint that is not there, and a run folder that is taken."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    shutil.copytree(run, tmp_path / "run")
    assert "train_manifest was" in train_complaint(config, tmp_path, "--max-samples", "20")
    assert "no checkpoint here" in train_complaint(config, tmp_path, "--resume", "step_00000099")
    assert "holds a run already and --resume is never" in train_complaint(config, tmp_path, "--resume", "never")
    assert "is not one of the checkpoints of" in train_complaint(
        config, tmp_path, "--resume", run / "checkpoints" / "step_00000005"
    )


def test_evaluating_what_is_not_there(run: Path, dataset_dir: Path, tmp_path: Path) -> None:
    """No run, no split, no place for the predictions, a flipped bit in the weights."""
    assert "absent" in complaint(
        "aplantida_dist.evaluate", ["--run", tmp_path / "absent", "--data", dataset_dir], tmp_path
    )
    said = complaint("aplantida_dist.evaluate", ["--run", run, "--data", dataset_dir, "--split", "tset"], tmp_path)
    assert "has no split 'tset', only train, val, test" in said
    predictions = ["--predictions", tmp_path / "no" / "folder" / "p.jsonl"]
    assert "predictions cannot be written here" in complaint(
        "aplantida_dist.evaluate", ["--run", run, "--data", dataset_dir, *predictions], tmp_path
    )
    shutil.copytree(run, tmp_path / "flipped")
    weights = next((tmp_path / "flipped" / "checkpoints").glob("step_*/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    said = complaint("aplantida_dist.evaluate", ["--run", tmp_path / "flipped", "--data", dataset_dir], tmp_path)
    assert "model.safetensors has changed since it was written" in said


def test_one_rank_alone_meets_the_error() -> None:
    """A fault that only one node can see ends every rank with the same one line, which names the rank."""
    assert run_ranks(2, meet_a_fault_on_rank_1) == ["rank 1: the disk of this node is missing"] * 2


def meet_a_fault_on_rank_1() -> str:
    world = open_world(precision="fp32", timeout_s=60)

    def look() -> None:
        if world.rank == 1:
            raise UserError("the disk of this node is missing")

    with pytest.raises(UserError) as caught:
        world.agree_across_ranks(look)
    return str(caught.value)


def test_a_precision_that_the_device_or_the_launcher_contradicts(
    dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate trains fp16 on a CPU in fp32, in silence: refused. So is a launcher that asks for another precision or accumulation than the config."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    assert "fp16 needs a GPU" in train_complaint(config, tmp_path, "train.precision=fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "launched with mixed precision bf16, the config says train.precision fp32" in train_complaint(
        config, tmp_path
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert "4 gradient accumulation steps" in train_complaint(config, tmp_path)
