"""Laws of `evaluate --other-classes`: a dataset with a part of a run's classes is measured by class name, as a hand would do it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aplantida_dist.data.classmap import ClassMap, ClassMapError
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.history import EvaluationMetrics
from aplantida_dist.other_classes import labels_in_run, without_others
from aplantida_dist.shards.subset import SubsetOptions, build_subset
from aplantida_dist.shards.writer import ShardLimits
from tests.pictures import build, fill
from tests.ranks import Finished, command_on_ranks
from tests.runs import write_config

TRAIN = {"Acer": 25, "Betula": 5, "Cornus": 7, "Daphne": 21, "Ficus": 8}
PART = ("Betula", "Daphne", "Ficus")
"""Labels 1, 3, 4 of the run and 0, 1, 2 of the part; few, medium, few, where the run's first three are medium, few, few."""
KEPT = [1, 3, 4]


@dataclass(frozen=True)
class World:
    """A run on five classes, its dataset, a part of it, and what `evaluate` says of the whole: every sample's five probabilities."""

    run: Path
    whole: Path
    part: Path
    lines: dict[str, dict[str, Any]]

    def log_probabilities(self) -> dict[str, np.ndarray]:
        """By key, over the run's five classes: five are all there are, so the predictions file holds them all."""
        found = {}
        for key, line in self.lines.items():
            by_class = np.zeros(5)
            by_class[line["top5"]] = np.log(line["top5_probabilities"])
            found[key] = by_class
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("other_classes")
    first = fill(folder / "pictures" / "train", TRAIN)
    first = fill(folder / "pictures" / "val", dict.fromkeys(TRAIN, 2), first=first)
    fill(folder / "pictures" / "test", dict.fromkeys(TRAIN, 9), first=first)
    build(folder / "pictures", folder / "whole", limits=ShardLimits(num_samples=13))
    part_of(folder / "whole", folder / "part", PART)
    config = write_config(folder / "config.yaml", folder / "whole", model="test_resnet", epochs=2)
    (finished,) = command_on_ranks(1, "aplantida_dist.train", ["--config", config, "--run-dir", folder / "run"], folder)
    assert finished.code == 0, finished.stderr
    _, lines = evaluate(folder / "run", folder / "whole", folder)
    return World(folder / "run", folder / "whole", folder / "part", lines)


def part_of(whole: Path, out: Path, names: tuple[str, ...]) -> Path:
    """A dataset of these classes of another."""
    classes = out.with_suffix(".txt")
    classes.write_text("".join(f"{name}\n" for name in names))
    build_subset(whole, out, options=SubsetOptions((), ShardLimits(num_samples=5), False, classes_path=classes))
    return out


def command(run: Path, data: Path, folder: Path, *options: str, world_size: int = 1) -> list[Finished]:
    files = ["--json", folder / "metrics.json", "--predictions", folder / "predictions.jsonl"]
    return command_on_ranks(
        world_size, "aplantida_dist.evaluate", ["--run", run, "--data", data, *files, *options], folder
    )


def evaluate(
    run: Path, data: Path, folder: Path, *options: str, world_size: int = 1
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    finished = command(run, data, folder, *options, world_size=world_size)
    assert [rank.code for rank in finished] == [0] * world_size, "\n".join(rank.stderr for rank in finished)
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return json.loads((folder / "metrics.json").read_text())["test"], {line["key"]: line for line in lines}


def by_hand(world: World, lines: dict[str, dict[str, Any]], scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """The metrics of these samples by numpy alone, from scores over the run's classes."""
    labels = np.array([world.lines[key]["label"] for key in lines])
    table = np.array([scores[key] for key in lines])
    losses = np.log(np.exp(table).sum(1)) - table[np.arange(len(labels)), labels]
    hits = table.argmax(1) == labels
    recalls = {name: hits[labels == label].mean() for label, name in zip(KEPT, PART, strict=True)}
    return {
        "loss": losses.mean(),
        "top1": hits.mean(),
        "macro_top1": np.mean(list(recalls.values())),
        "medium_top1": recalls["Daphne"],
        "few_top1": np.mean([recalls["Betula"], recalls["Ficus"]]),
    }


def require_equal(metrics: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=2e-6)
    assert "many_top1" not in metrics
    assert metrics["num_samples"] == metrics["expected_samples"] == 27


def test_count_is_the_whole_evaluation_over_these_samples(world: World, tmp_path: Path) -> None:
    """Each photograph has the prediction that it has among all classes, under the run's labels."""
    metrics, lines = evaluate(world.run, world.part, tmp_path, "--other-classes", "count")
    assert metrics["other_classes"] == "count"
    assert {line["metadata"]["latin_name"] for line in lines.values()} == set(PART)
    for key, line in lines.items():
        known = world.lines[key]
        assert (line["label"], line["top5"]) == (known["label"], known["top5"])
        assert line["loss"] == pytest.approx(known["loss"], abs=1e-5)
    require_equal(metrics, by_hand(world, lines, world.log_probabilities()))


def test_leave_out_lets_the_datasets_classes_compete_alone(world: World, tmp_path: Path) -> None:
    """The probabilities are those of the whole, renormalised over the part; no class that it lacks is ever the first."""
    metrics, lines = evaluate(world.run, world.part, tmp_path, "--other-classes", "leave-out")
    assert metrics["other_classes"] == "leave-out"
    others = np.array([0.0 if label in KEPT else -np.inf for label in range(5)])
    scores = {key: row + others for key, row in world.log_probabilities().items()}
    require_equal(metrics, by_hand(world, lines, scores))
    for key, line in lines.items():
        assert sorted(line["top5"][:3]) == KEPT
        assert line["top5_probabilities"][3:] == [0.0, 0.0]
        renormalised = np.exp(scores[key]) / np.exp(scores[key]).sum()
        assert line["top5_probabilities"][:3] == pytest.approx(renormalised[line["top5"][:3]], abs=1e-5)
    count, _ = evaluate(world.run, world.part, tmp_path, "--other-classes", "count")
    assert metrics["top1"] >= count["top1"]
    assert metrics["loss"] < count["loss"]


def test_it_goes_with_logit_adjustment(world: World, tmp_path: Path) -> None:
    """The priors are those of the run's own train split, by class name."""
    options = ("--other-classes", "leave-out", "--logit-adjustment", "1")
    metrics, lines = evaluate(world.run, world.part, tmp_path, *options)
    counts = np.array(list(TRAIN.values()))
    shift = np.array([0.0 if label in KEPT else -np.inf for label in range(5)]) - np.log(counts / counts.sum())
    require_equal(metrics, by_hand(world, lines, {key: row + shift for key, row in world.log_probabilities().items()}))


@pytest.mark.parametrize("choice", ["count", "leave-out"])
def test_ranks_do_not_matter(world: World, tmp_path: Path, choice: str) -> None:
    """1 and 2 ranks: one metrics block, one predictions file."""
    outcomes = [
        evaluate(world.run, world.part, tmp_path, "--other-classes", choice, world_size=world_size)
        for world_size in (1, 2)
    ]
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("choice", ["count", "leave-out"])
def test_with_all_classes_there_it_changes_nothing(world: World, tmp_path: Path, choice: str) -> None:
    """Where no class is another, the option has nothing to do, and the result does not name it."""
    plain, lines = evaluate(world.run, world.whole, tmp_path)
    assert (plain, lines) == evaluate(world.run, world.whole, tmp_path, "--other-classes", choice)
    assert "other_classes" not in plain


def test_without_the_option_a_part_is_an_error_that_names_it(world: World, tmp_path: Path) -> None:
    """Never a silent match."""
    (finished,) = command(world.run, world.part, tmp_path)
    assert finished.code == 2
    assert "has 3 of the 5 classes of" in finished.stderr
    assert "--other-classes count" in finished.stderr
    assert "--other-classes leave-out" in finished.stderr
    assert not (tmp_path / "metrics.json").exists()


RUN = ClassMap(("a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("names", "labels"), [("bd", (1, 3)), ("db", (3, 1)), ("abcd", (0, 1, 2, 3)), ("dcba", (3, 2, 1, 0))]
)
def test_labels_follow_the_names(names: str, labels: tuple[int, ...]) -> None:
    """Also where the order is another, with all classes there."""
    assert labels_in_run(ClassMap(tuple(names)), RUN, other_classes="count", ours="run", theirs="data") == labels


@pytest.mark.parametrize("choice", ["count", "leave-out", None])
def test_a_class_that_the_run_lacks_is_an_error(choice: Any) -> None:
    """With the option and without; without it in the words of every other place where class maps must be the same."""
    said = "1 classes that run was never taught, such as 'x'" if choice else "labels would change their meaning"
    with pytest.raises(ClassMapError, match=said):
        labels_in_run(ClassMap(("b", "x")), RUN, other_classes=choice, ours="run", theirs="data")


def test_others_cannot_win() -> None:
    """They lose to any finite logit, and the kept ones keep theirs to the last bit."""
    logits = torch.tensor([9.0, -5.0, 7.0, -1e30]) + without_others((3, 1), num_classes=4)
    assert logits.tolist() == [-torch.inf, -5.0, -torch.inf, torch.tensor(-1e30).item()]


def test_a_relabelled_split_is_another_with_the_same_samples(world: World) -> None:
    """Counts and indexes speak the new labels, whole or limited; identities and sizes stay."""
    split = open_dataset(world.part).open_split("test")
    relabelled = split.relabelled(KEPT)
    assert split.counts_of_classes(3) == [9, 9, 9]
    assert relabelled.counts_of_classes(5) == [0, 9, 0, 9, 9]
    assert relabelled.digest != split.digest
    assert relabelled.identity_digest == split.identity_digest
    assert relabelled.shard_sizes.tolist() == split.shard_sizes.tolist()
    for shard_index in range(len(split.shard_sizes)):
        before, after = split.read_index(shard_index), relabelled.read_index(shard_index)
        assert [KEPT[label] for label in before["label"]] == after["label"].tolist()
        assert before["offset"].tolist() == after["offset"].tolist()
    limited = open_dataset(world.part).open_split("test", max_samples=7)
    assert sum(limited.relabelled(KEPT).counts_of_classes(5)) == 7


def test_metrics_know_no_third_choice() -> None:
    """The record is validated before it is written."""
    with pytest.raises(ValueError, match="other_classes"):
        EvaluationMetrics.model_validate({"other_classes": "guess"})
