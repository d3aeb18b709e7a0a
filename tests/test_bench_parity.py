"""The bench of parity compares equals: the same rates, samples and steps on both sides, and a table that says what they came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.world import World, open_world
from bench.parity import Comparison, compare_epochs, differences_of_steps, to_text, train_with_ours, write_config
from bench.timm_training import Epoch, Recipe, TimmTraining, make_timm_training, open_timm_loader, train_with_timm
from tests.runs import compose

RECIPE = Recipe(
    model_name="test_vit",
    image_size=32,
    batch_size=16,
    epochs=2,
    warmup_epochs=1,
    peak_lr=3e-3,
    weight_decay=0.05,
    label_smoothing=0.1,
    clip_norm=1.0,
)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return open_world(precision="fp32", timeout_s=60)


def timm_training(recipe: Recipe = RECIPE) -> TimmTraining:
    return make_timm_training(recipe, num_classes=6, steps_per_epoch=5, seed=0)


def test_both_have_the_same_rate_at_every_step(dataset_dir: Path, tmp_path: Path, world: World) -> None:
    """timm's scheduler, as it is set up here, and our schedule are one function."""
    training = timm_training()
    config_path = write_config(tmp_path / "config.yaml", RECIPE, dataset_dir, seed=0)
    schedule = compose(config_path, tmp_path / "run").job.schedule
    assert schedule.total_steps == 10
    for step in range(schedule.total_steps):
        rates = [group["lr"] for group in training.optimizer.param_groups]
        assert rates == pytest.approx([schedule.learning_rate(step)] * len(rates), rel=1e-12)
        training.scheduler.step_update(num_updates=step + 1)


def test_fed_the_same_batches_both_have_the_same_losses(dataset_dir: Path, tmp_path: Path, world: World) -> None:
    """At each step of an epoch, its ragged last one too."""
    apart = differences_of_steps(RECIPE, dataset_dir, world=world, run_dir=tmp_path / "run", seed=0)
    assert len(apart) == 5
    assert max(apart) < 1e-5


def test_a_peer_with_another_recipe_is_told_apart(
    dataset_dir: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One percent more of the rate is a thousand times what rounding does."""

    def with_another_rate(recipe: Recipe, *, num_classes: int, steps_per_epoch: int, seed: int) -> TimmTraining:
        other = replace(recipe, peak_lr=1.01 * recipe.peak_lr)
        return make_timm_training(other, num_classes=num_classes, steps_per_epoch=steps_per_epoch, seed=seed)

    monkeypatch.setattr("bench.parity.make_timm_training", with_another_rate)
    apart = differences_of_steps(RECIPE, dataset_dir, world=world, run_dir=tmp_path / "run", seed=0)
    assert max(apart) > 1e-4


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's, when an epoch ends
def test_timm_reads_our_shards_whole(dataset_dir: Path) -> None:
    """Every val sample once; of train every one, and as many more as fill the last batch; pixels normalised alike."""
    dataset, pixels = open_dataset(dataset_dir), timm_training().pixels
    settings: dict[str, Any] = {"image_size": RECIPE.image_size, "batch_size": RECIPE.batch_size, "seed": 0}
    val = open_timm_loader(dataset.open_split("val"), pixels, is_training=False, **settings)
    labels = Counter(torch.cat([labels for _, labels in val]).tolist())
    assert [labels[index] for index in range(6)] == [3, 1, 1, 2, 1, 1]
    train = open_timm_loader(dataset.open_split("train"), pixels, is_training=True, **settings)
    batches = list(train)
    assert [images.shape for images, _ in batches] == [(16, 3, 32, 32)] * 5
    labels = Counter(torch.cat([labels for _, labels in batches]).tolist())
    assert all(labels[index] >= count for index, count in enumerate((25, 10, 5, 19, 2, 8)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's, when an epoch ends
def test_both_train_and_are_compared(dataset_dir: Path, tmp_path: Path) -> None:
    """The command and timm's parts, each for two epochs: every number of the table is there and finite."""
    ours = train_with_ours(RECIPE, dataset_dir, run_dir=tmp_path / "run", seed=1)
    theirs = train_with_timm(RECIPE, open_dataset(dataset_dir), seed=1)
    assert len(ours) == len(theirs) == 2
    for our_epoch, timm_epoch in zip(ours, theirs, strict=True):
        assert our_epoch.train_loss == pytest.approx(timm_epoch.train_loss, rel=0.3)
        assert our_epoch.val_loss == pytest.approx(timm_epoch.val_loss, rel=0.3)
        assert 0.0 <= timm_epoch.val_top1 <= 1.0


def test_the_table_tells_difference_and_standard_error() -> None:
    """Differences 0.1, 0.3 and 0.2: mean 0.2, standard deviation 0.1, standard error 0.1 / √3."""
    one = Comparison("x", [1.1, 2.3, 3.2], [1.0, 2.0, 3.0])
    assert one.difference == pytest.approx(0.2)
    assert one.standard_error == pytest.approx(0.1 / 3**0.5)
    ours, theirs = (
        [[Epoch(2.0, 1.9, 0.5), Epoch(1.0, 0.9, 0.75)]] * 2,
        [[Epoch(2.5, 1.9, 0.5), Epoch(1.5, 0.8, 0.5)]] * 2,
    )
    rows = {row.what: row.difference for row in compare_epochs(ours, theirs)}
    assert rows == {
        "train loss of epoch 1": -0.5,
        "train loss of epoch 2": -0.5,
        "val loss after epoch 2": pytest.approx(0.1),
        "val top-1 after epoch 2": 0.25,
    }
    assert "+0.2000 ± 0.0577" in to_text([one])
