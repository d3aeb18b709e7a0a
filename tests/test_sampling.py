"""Class sampling: how often each class and sample is drawn, by other means; and the laws with it on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from aplantida_dist.analysis.accounts import coverage
from aplantida_dist.analysis.sources import read_sources
from aplantida_dist.data.batch import Batch
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.images import TrainTransform
from aplantida_dist.data.manifest import identity_digest, identity_of
from aplantida_dist.data.plan import Coordinates, TrainPlan
from aplantida_dist.data.sampling import ClassSampling
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from tests.laws import last_step, require_exact_resume, require_same_on_two_ranks, run_whole, train, weights_at
from tests.ranks import command_on_ranks
from tests.runs import cut_back, rows_of, write_config

ROOT = Path(__file__).parents[1]
BALANCED = ["data.sampling_exponent=0.0"]
LABELS = {
    "zipf": [label for label in range(9) for _ in range(200 // (label + 1) ** 2)],
    "empty classes": [1] * 7 + [4] * 1 + [6] * 30,
    "one class": [2] * 5,
    "even": list(range(6)) * 4,
    "one sample": [0],
}


def make_sampling(labels: list[int], exponent: float, seed: int = 5) -> ClassSampling:
    scattered = np.random.default_rng(0).permutation(np.array(labels, dtype=np.int64))
    return ClassSampling(scattered, exponent, seed)


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_a_class_has_its_share_of_every_epoch(labels: list[int], exponent: float) -> None:
    """N · n^q / Σ n^q draws to the nearest whole number below or above, N in all, the same in each epoch."""
    sampling, counts = make_sampling(labels, exponent), Counter(labels)
    whole = sum(count**exponent for count in counts.values())
    for epoch in (0, 1, 17):
        drawn = sampling.draw(epoch)
        assert (np.diff(drawn) >= 0).all()
        found = Counter(sampling.labels[drawn].tolist())
        assert found.total() == len(labels)
        assert found == {label: n for label, n in enumerate(sampling.draws_of_classes.tolist()) if n}
        for label, count in counts.items():
            assert abs(found[label] - len(labels) * count**exponent / whole) < 1.0
            assert found[label] >= 1


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_the_samples_of_a_class_take_turns(labels: list[int], exponent: float) -> None:
    """After any number of epochs those of one class have been drawn equally often, to one draw."""
    sampling = make_sampling(labels, exponent)
    drawn = np.zeros(len(labels), dtype=np.int64)
    for epoch in range(12):
        drawn += np.bincount(sampling.draw(epoch), minlength=len(labels))
        for label in set(labels):
            of_class = drawn[sampling.labels == label]
            assert of_class.max() - of_class.min() <= 1


def test_who_is_drawn_follows_from_seed_and_epoch() -> None:
    """The same again, other samples in another epoch or under another seed."""
    draws = [make_sampling(LABELS["zipf"], 0.0, seed).draw(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(draw) for draw in draws}) == 4
    assert draws[0] == make_sampling(LABELS["zipf"], 0.0, 0).draw(0).tolist()


def slots(plan: TrainPlan, epoch: int, world_size: int = 1) -> Iterator[Coordinates]:
    for step in range(plan.steps_per_epoch):
        for rank in range(world_size):
            for slot in plan.slots_of(rank, world_size):
                yield Coordinates(epoch, step, slot)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("shards", [[297], [100, 0, 97, 100], [1] * 297])
def test_the_ranks_together_read_the_draw(shards: list[int], world_size: int) -> None:
    """As often as drawn, from the right places, and no showing of a sample is told from another by nothing."""
    sampling = make_sampling(LABELS["zipf"][:297], 0.0)
    plan = TrainPlan(np.array(shards), 3, 24, 4, 50, sampling)
    starts = np.cumsum([0, *shards[:-1]])
    for epoch in (0, 3):
        found: list[tuple[int, ...]] = []
        for at in slots(plan, epoch, world_size):
            micro_batch = plan.micro_batch(at)
            assert (micro_batch.member_indices < np.array(shards)[micro_batch.shard_indices]).all()
            assert (micro_batch.sample_indices == starts[micro_batch.shard_indices] + micro_batch.member_indices).all()
            found += [micro_batch.showing(i) for i in np.flatnonzero(micro_batch.weights)]
        assert sorted(showing[0] for showing in found) == sampling.draw(epoch).tolist()
        assert len(set(found)) == len(found)


def test_an_exponent_of_one_is_the_plan_without_sampling() -> None:
    """The same samples in the same slots, no repeats."""
    sizes = np.array([100, 0, 97, 100])
    plain = TrainPlan(sizes, 3, 24, 4, 50)
    sampled = TrainPlan(sizes, 3, 24, 4, 50, make_sampling(LABELS["zipf"][:297], 1.0))
    for at in slots(plain, 1):
        ours, theirs = plain.micro_batch(at), sampled.micro_batch(at)
        assert (ours.sample_indices == theirs.sample_indices).all()
        assert not theirs.repeats.any()


def read_epoch(dataset_dir: Path, epoch: int, exponent: float) -> list[Batch]:
    split = open_dataset(dataset_dir).open_split("train")
    plan = TrainPlan(split.shard_sizes, 3, 16, 4, 262144, ClassSampling(split.labels, exponent, 3))
    transform = TrainTransform(32, (0.35, 1.0), (0.75, 1.3333), 0.5, 0.0, "bicubic")
    return list(
        stream(
            MicroBatches(split, plan, transform, seed=3), slots(plan, epoch), reading=Reading(0, 1, pin_memory=False)
        )
    )


def test_a_repeated_photograph_is_augmented_anew(dataset_dir: Path) -> None:
    """The two photographs of the rarest class fill a sixth of the epoch, and no two of these showings are alike."""
    shown: dict[str, list[torch.Tensor]] = {}
    for batch in read_epoch(dataset_dir, 0, 0.0):
        for i in torch.nonzero(batch.weights).flatten().tolist():
            if batch.labels[i] == 4:
                shown.setdefault(batch.sample_keys[i], []).append(batch.images[i])
    assert sorted(len(pictures) for pictures in shown.values()) == [5, 6]
    for pictures in shown.values():
        assert len({picture.numpy().tobytes() for picture in pictures}) == len(pictures)


@pytest.fixture(scope="module")
def whole(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = write_config(tmp_path_factory.mktemp("sampling") / "config.yaml", dataset_dir, epochs=2)
    return run_whole(config, BALANCED)


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_resume_is_exact(whole: Path, stop: int) -> None:
    """In mid-epoch, between epochs, in the next."""
    require_exact_resume(whole, whole.parent / "config.yaml", BALANCED, stop=stop)


def test_ranks_do_not_matter(whole: Path) -> None:
    """Law 3 and 4."""
    require_same_on_two_ranks(whole, whole.parent / "config.yaml", BALANCED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [BALANCED, ["data.sampling_exponent=0.5"], ["--max-samples", "40"], ["--max-samples", "40", *BALANCED], "subset"],
    ids=["class-balanced", "square-root", "limited", "limited and balanced", "subset"],
)
def test_coverage_follows_on_any_ranks_and_through_a_move(
    chosen: list[str] | str, dataset_dir: Path, tmp_path: Path
) -> None:
    """1, 2 and 3 ranks, and a run that is stopped in mid-epoch twice and goes on with other ranks, prove the same samples by the same counts."""
    if chosen == "subset":
        told = ["--from-dataset", dataset_dir, "--where", "latin_name=Acer campestre,Daphne mezereum"]
        (built,) = command_on_ranks(1, "shards.build", [*told, "--out", tmp_path / "subset"], tmp_path)
        assert built.code == 0, built.stderr
    config = write_config(tmp_path / "config.yaml", tmp_path / "subset" if chosen == "subset" else dataset_dir)
    arguments = [*([] if chosen == "subset" else chosen), "checkpoint.every_steps=1", "checkpoint.keep_last=100"]

    def coverage_of(run_dir: Path) -> list[dict[str, object]]:
        names = {"num_samples", "expected_samples", "distinct_samples", "void_samples", "identity_digest"}
        return [
            {name: row[split][name] for name in sorted(names & row[split].keys())}
            for row in rows_of(run_dir)
            for split in ("train", "val")
        ]

    for world_size in (1, 2, 3):
        train(world_size, config, tmp_path / f"on_{world_size}", *arguments)
    whole = coverage_of(tmp_path / "on_1")
    steps = last_step(tmp_path / "on_1")
    for stop, world_size in ((steps // 3 + 1, 3), (2 * steps // 3 + 1, 2)):
        cut_back(tmp_path / "on_1", step=stop)
        train(world_size, config, tmp_path / "on_1", *arguments)
    assert all(row["num_samples"] == row["expected_samples"] for row in whole)
    assert whole == coverage_of(tmp_path / "on_2") == coverage_of(tmp_path / "on_3") == coverage_of(tmp_path / "on_1")


def test_a_row_holds_whom_the_epoch_drew(whole: Path, dataset_dir: Path) -> None:
    """The digest is the sum over the keys that the plan's command prints, repeats and all; val is untouched."""
    for row in rows_of(whole):
        command = [
            sys.executable,
            ROOT / "shards" / "plan.py",
            dataset_dir,
            "--epoch",
            str(row["epoch"] - 1),
            "--seed",
            "3",
        ]
        command += ["--global-batch-size", "16", "--micro-batch-size", "4", "--sampling-exponent", "0"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        lines = [json.loads(line) for line in printed.splitlines()]
        keys = [
            key for line in lines for key, weight in zip(line["keys"], line["weights"], strict=True) if weight == 1.0
        ]
        assert len(keys) == row["train"]["num_samples"] == 69
        assert row["train"]["identity_digest"] == identity_digest(sum(identity_of(key) for key in keys))
        assert row["train"]["distinct_samples"] == len(set(keys)) < 69
        assert row["val"]["num_samples"] == 9
    first, second = (row["train"]["identity_digest"] for row in rows_of(whole))
    assert first != second


def test_the_report_knows_that_epochs_draw_others(whole: Path) -> None:
    """Different identities in each epoch are an error elsewhere, not here."""
    verdict = coverage(read_sources([whole])[0])
    assert verdict is not None
    assert verdict.severity == "good"


def test_the_exponent_acts_and_is_off_by_default(whole: Path, tmp_path: Path, dataset_dir: Path) -> None:
    """1 is the run without the key, bit for bit; 0 reads other samples from the first step on."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    train(1, config, tmp_path / "plain")
    train(1, config, tmp_path / "stated", "data.sampling_exponent=1.0")
    plain, stated, balanced = (weights_at(run, 5) for run in (tmp_path / "plain", tmp_path / "stated", whole))
    assert [name for name in plain if not np.array_equal(plain[name], stated[name])] == []
    assert [name for name in plain if not np.array_equal(plain[name], balanced[name])] != []
    assert "distinct_samples" not in rows_of(tmp_path / "plain")[0]["train"]
    assert last_step(whole) == 10


@pytest.mark.parametrize("other", ["loss.logit_adjustment=1.0", "loss.class_weights=effective_number"])
def test_classes_are_evened_out_once(tmp_path: Path, dataset_dir: Path, other: str) -> None:
    """Priors and weights from counts that the sampling has changed would count twice."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    (refused,) = command_on_ranks(
        1, "aplantida_dist.train", ["--config", config, "--run-dir", tmp_path / "run", *BALANCED, other], tmp_path
    )
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert "where data.sampling_exponent is below 1" in refused.stderr


def test_a_post_hoc_shift_of_a_sampled_run_is_refused(whole: Path, dataset_dir: Path, tmp_path: Path) -> None:
    """Its logits know nothing of the counts."""
    told = ["--run", whole, "--data", dataset_dir, "--split", "test", "--logit-adjustment", "1"]
    (refused,) = command_on_ranks(1, "aplantida_dist.evaluate", told, tmp_path)
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert "leave --logit-adjustment out" in refused.stderr
