"""The replay: `shards/plan.py --run RUN --extract DIR` writes what the model saw, and nothing else anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aplantida_dist.data.batch import Batch
from aplantida_dist.data.plan import Coordinates
from aplantida_dist.replay import ReplayError, write_pictures
from tests.laws import train
from tests.ranks import Finished, command_on_ranks, run_ranks
from tests.runs import compose, write_config

EVERYTHING = [
    "data.augment=randaugment",
    "data.color_jitter=0.4",
    "data.rotation=20.0",
    "data.blur=0.5",
    "data.vertical_flip=0.5",
    "data.random_erasing=0.5",
]
Seen = dict[tuple[int, int], tuple[tuple[str, ...], list[int], list[float], np.ndarray]]


def plan(folder: Path, *options: str | Path) -> Finished:
    """Run `shards/plan.py` in a process that is forked from this warm one."""
    (finished,) = command_on_ranks(1, "shards.plan", options, folder)
    return finished


def seen_by_the_model(config: Path, run_dir: Path, overrides: list[str]) -> Seen:
    """What the loader of the training hands over in the whole run, by step and slot."""
    from aplantida_dist.trainer import read_ahead

    job = compose(config, run_dir, overrides).job
    return {
        (batch.at.epoch * job.plan.steps_per_epoch + batch.at.step_in_epoch, batch.at.slot): (
            batch.sample_keys,
            batch.labels.tolist(),
            batch.weights.tolist(),
            batch.images.permute(0, 2, 3, 1).numpy().copy(),
        )
        for batch in read_ahead(job, 0)
    }


@pytest.fixture(scope="module")
def run_dir(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = write_config(tmp_path_factory.mktemp("replay") / "config.yaml", dataset_dir, epochs=2)
    train(1, config, config.parent / "run", *EVERYTHING)
    return config.parent / "run"


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], id="plain", marks=pytest.mark.slow),
        pytest.param(["data.sampling_exponent=0.0", "data.num_workers=1"], id="sampled"),
    ],
)
def test_the_pictures_are_those_that_the_model_saw(dataset_dir: Path, tmp_path: Path, extra: list[str]) -> None:
    """Pixel for pixel, with every augmentation on, across an epoch's ragged end; the lines name step, slot, key, label, shard and file."""
    overrides = [*EVERYTHING, *extra]
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2)
    (seen,) = run_ranks(1, seen_by_the_model, config, tmp_path / "other", overrides)
    train(1, config, tmp_path / "run", *overrides)
    told = plan(tmp_path, "--run", tmp_path / "run", "--steps", "3:7", "--extract", tmp_path / "out")
    assert (told.code, told.stderr) == (0, "")
    named = set()
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert [(line["step"], line["slot"]) for line in lines] == [
        (step, slot) for step in range(3, 7) for slot in range(4)
    ]
    for line in lines:
        keys, labels, weights, images = seen[line["step"], line["slot"]]
        assert (tuple(line["keys"]), line["labels"], line["weights"]) == (keys, labels, weights)
        assert all((dataset_dir / "train" / shard).is_file() for shard in line["shards"])
        for place, (name, weight) in enumerate(zip(line["files"], weights, strict=True)):
            assert (name is None) == (weight == 0.0)
            if name is not None:
                assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / name)), images[place])
                assert name.endswith(f"_{keys[place]}.png")
                named.add(name)
    assert {path.name for path in (tmp_path / "out").iterdir()} == named
    assert len(named) == 16 + 5 + 16 + 16


@pytest.mark.parametrize(
    "key", ["../../outside", "/etc/passwd", "a\\b:c", "nul\0inside", "\udcff\udc80", "é" * 100, "ab" * 200, ".."]
)
def test_no_key_leads_out_of_the_folder(key: str, tmp_path: Path) -> None:
    """Tars that others wrote may name a sample anything; a name that is taken is an error, not another picture."""
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    zeros = torch.zeros(2, dtype=torch.int64)
    batch = Batch(Coordinates(0, 1, 7), pixels, zeros, torch.tensor([1.0, 0.0]), zeros, (key, key))
    (name, none) = write_pictures(batch, tmp_path / "out", step=1234)
    assert none is None
    assert name is not None
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert name.startswith("00001234_0007_0000_")
    assert name.isascii()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / name)), pixels[0].permute(1, 2, 0).numpy())
    with pytest.raises(ReplayError, match="cannot be written: File exists; choose another folder"):
        write_pictures(batch, tmp_path / "out", step=1234)


def test_a_bad_picture_has_no_file(dataset_dir: Path, tmp_path: Path) -> None:
    """Where the run went on without it, so does its replay."""
    copy = tmp_path / "dataset"
    shutil.copytree(dataset_dir, copy)
    config = write_config(tmp_path / "config.yaml", copy, epochs=1)
    void = ["data.on_bad_sample=void", "data.bad_sample_budget=5"]
    train(1, config, tmp_path / "run", *void)
    shard = copy / "train" / "shard-000000.tar"
    offset = int(np.fromfile(shard.with_suffix(".idx"), dtype=[("offset", "<u8"), ("rest", "V12")])[0]["offset"])
    with shard.open("r+b") as file:
        file.seek(offset + 300)
        file.write(b"\xff\x00\xff")
    told = plan(tmp_path, "--run", tmp_path / "run", "--steps", "0:5", "--extract", tmp_path / "out")
    assert told.code == 0, told.stderr
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    missing = [
        (line["shards"][place], weight)
        for line in lines
        for place, weight in enumerate(line["weights"])
        if weight and line["files"][place] is None
    ]
    assert missing == [("shard-000000.tar", 1.0)]
    assert len(list((tmp_path / "out").iterdir())) == 68


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--extract", "out", "--steps", "0:1"], "DATASET is missing"),
        (["{dataset}", "--global-batch-size", "4"], "--micro-batch-size is missing; give it, or --run"),
        (
            ["{dataset}", "--global-batch-size", "4", "--micro-batch-size", "4", "--extract", "out"],
            "--extract needs --run",
        ),
        (["--run", "{run}", "--extract", "out"], "--extract needs --steps"),
        (["--run", "{run}", "--seed", "3"], "--seed does not go with --run"),
        (["--run", "{run}", "--split", "val"], "--split val does not go with --run"),
        (["--run", "{run}", "{other}", "--steps", "0:1", "--extract", "out"], "is not the split that"),
        (["--run", "{changed}", "--steps", "0:1"], "trained with: data.rotation was 20.0, is 10.0; restore the file"),
        (["--run", "{run}", "--steps", "0:1", "--extract", "{run}/config.yaml"], "cannot be written"),
    ],
)
def test_what_does_not_fit_is_one_line(
    options: list[str], said: str, run_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    """Options that contradict each other, another dataset, an edited config: no picture that the model did not see."""
    places = {"dataset": dataset_dir, "run": run_dir, "other": tmp_path / "other", "changed": tmp_path / "changed"}
    shutil.copytree(run_dir, tmp_path / "changed")
    text = (run_dir / "config.yaml").read_text()
    (tmp_path / "changed" / "config.yaml").write_text(text.replace("rotation: 20.0", "rotation: 10.0"))
    shutil.copytree(dataset_dir, tmp_path / "other")
    shutil.copytree(dataset_dir / "val", tmp_path / "other" / "train", dirs_exist_ok=True)
    refused = plan(tmp_path, *(option.format(**places) for option in options))
    assert (refused.code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert said in refused.stderr


def test_a_limited_run_is_replayed_on_its_part_and_one_without_checkpoints_says_so(
    run_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    """--max-samples is read from the checkpoint. Before the first one nothing can be compared, and that is told."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    train(1, config, tmp_path / "run", "--max-samples", "20")
    told = plan(tmp_path, "--run", tmp_path / "run")
    assert told.code == 0, told.stderr
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert sum(sum(line["weights"]) for line in lines) == 20
    shutil.copytree(run_dir, tmp_path / "young", ignore=shutil.ignore_patterns("checkpoints"))
    told = plan(tmp_path, "--run", tmp_path / "young", "--steps", "0:1")
    assert told.code == 0
    assert told.stderr.startswith("warning: ")
    assert "has no checkpoint" in told.stderr
