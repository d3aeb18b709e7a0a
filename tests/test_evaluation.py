"""Evaluating one checkpoint on any number of ranks and workers: law 3, end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import command_on_ranks
from tests.runs import rows_of, write_config

WORLDS = [(world_size, num_workers) for world_size in (1, 2, 3, 4) for num_workers in (0, 1, 3)]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def run(request: pytest.FixtureRequest, dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with BatchNorm, so that buffers matter, trained for one epoch."""
    folder = tmp_path_factory.mktemp(f"evaluated_{request.param}")
    config = write_config(folder / "config.yaml", dataset_dir, model="test_resnet", precision=request.param, epochs=1)
    (finished,) = command_on_ranks(1, "aplantida_dist.train", ["--config", config, "--run-dir", folder / "run"], folder)
    assert finished.code == 0, finished.stderr
    return folder / "run"


def evaluate(
    run: Path,
    dataset_dir: Path,
    folder: Path,
    *,
    world_size: int,
    num_workers: int,
    split: str,
    checkpoint: str = "best",
) -> tuple[dict[str, Any], bytes]:
    arguments = [
        "--run",
        run,
        "--data",
        dataset_dir,
        "--split",
        split,
        "--checkpoint",
        checkpoint,
        "--json",
        folder / "metrics.json",
        "--allow-leak",  # the train split is evaluated, too
    ]
    arguments += ["--predictions", folder / "predictions.jsonl", f"data.num_workers={num_workers}"]
    finished = command_on_ranks(world_size, "aplantida_dist.evaluate", arguments, folder)
    assert [rank.code for rank in finished] == [0] * world_size, "\n".join(rank.stderr for rank in finished)
    return json.loads((folder / "metrics.json").read_text())[split], (folder / "predictions.jsonl").read_bytes()


def test_any_number_of_ranks_and_workers_gives_the_same_bits(run: Path, dataset_dir: Path, tmp_path: Path) -> None:
    """1, 2, 3, 4 ranks with 0, 1, 3 workers: one metrics block, one predictions file, byte for byte."""
    outcomes = {
        world: evaluate(run, dataset_dir, tmp_path, world_size=world[0], num_workers=world[1], split="train")
        for world in WORLDS
    }
    metrics, predictions = outcomes[WORLDS[0]]
    assert metrics["num_samples"] == 69
    for world, outcome in outcomes.items():
        assert outcome == (metrics, predictions), world


@pytest.mark.parametrize(("every", "evaluated"), [(1, [1, 2, 3]), (2, [2]), (3, [3])])
def test_a_row_holds_an_evaluation_where_one_is_due(
    dataset_dir: Path, tmp_path: Path, every: int, evaluated: list[int]
) -> None:
    """evaluation.every_epochs: every so many epochs and no other."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=3)
    arguments = ["--config", config, "--run-dir", tmp_path / "run", f"evaluation.every_epochs={every}"]
    (finished,) = command_on_ranks(1, "aplantida_dist.train", arguments, tmp_path)
    assert finished.code == 0, finished.stderr
    rows = rows_of(tmp_path / "run")
    assert [row["epoch"] for row in rows if "val" in row] == evaluated
    assert len(rows) == 3


@pytest.mark.parametrize("split", ["val", "test", "train"])
def test_metrics_are_those_of_the_predictions_file(run: Path, dataset_dir: Path, tmp_path: Path, split: str) -> None:
    """The loss is math.fsum over the file within 1e-9; the counts are counted from it by other means. Also 9 samples on 3 ranks."""
    metrics, predictions = evaluate(run, dataset_dir, tmp_path, world_size=3, num_workers=0, split=split)
    lines = [json.loads(line) for line in predictions.splitlines()]
    classes = json.loads((dataset_dir / "classes.json").read_text())["classes"]
    assert len({line["key"] for line in lines}) == len(lines) == metrics["num_samples"]
    assert metrics["loss"] == pytest.approx(math.fsum(line["loss"] for line in lines) / len(lines), abs=1e-9)
    assert metrics["top1"] == sum(line["top5"][0] == line["label"] for line in lines) / len(lines)
    assert metrics["top5"] == sum(line["label"] in line["top5"] for line in lines) / len(lines)
    recalls = []
    for label in {line["label"] for line in lines}:
        of_class = [line["top5"][0] == label for line in lines if line["label"] == label]
        recalls.append(sum(of_class) / len(of_class))
    assert metrics["macro_top1"] == pytest.approx(sum(recalls) / len(recalls), abs=1e-12)
    for line in lines:
        assert line["metadata"]["latin_name"] == classes[line["label"]]
        assert line["top5_probabilities"] == sorted(line["top5_probabilities"], reverse=True)
        assert sum(line["top5_probabilities"]) < 1.0
        if line["label"] == line["top5"][0]:
            assert -math.log(line["top5_probabilities"][0]) == pytest.approx(line["loss"], abs=1e-4)


def test_the_val_block_of_the_history_is_what_evaluate_finds(run: Path, dataset_dir: Path, tmp_path: Path) -> None:
    """Training's own evaluation and the command agree to the last bit."""
    metrics, _ = evaluate(run, dataset_dir, tmp_path, world_size=2, num_workers=0, split="val")
    assert metrics == json.loads((run / "history.jsonl").read_text().splitlines()[0])["val"]


def test_ranks_evaluate_with_the_main_process_s_buffers(dataset_dir: Path, tmp_path: Path) -> None:
    """After a step every rank's BatchNorm has other statistics: two ranks must evaluate the one model that is saved."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, model="test_resnet", epochs=2)
    finished = command_on_ranks(
        2, "aplantida_dist.train", ["--config", config, "--run-dir", tmp_path / "run"], tmp_path
    )
    assert [rank.code for rank in finished] == [0, 0], finished[0].stderr
    overrides = {"world_size": 1, "num_workers": 0, "split": "val"}
    metrics, _ = evaluate(tmp_path / "run", dataset_dir, tmp_path, checkpoint="last", **overrides)
    assert metrics == json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[-1])["val"]
