"""Parity with timm: the same model, shards, seeds, optimizer and schedule in our trainer and in a training of timm's parts.

Two questions. Fed the same batches, do both have the same loss at each step? Each with its own reader, order and random
crops, do both come to the same losses, within the noise between seeds?
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

from aplantida_dist.compose import compose_across_ranks
from aplantida_dist.config_file import load_config
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.ground import Request
from aplantida_dist.herbarium import draw_herbarium
from aplantida_dist.history import History
from aplantida_dist.metrics import compute
from aplantida_dist.pace import with_pace
from aplantida_dist.shards.builder import BuildOptions, build_dataset
from aplantida_dist.shards.folder import read_folder
from aplantida_dist.shards.writer import ShardLimits
from aplantida_dist.signals import Listener
from aplantida_dist.step import run_step
from aplantida_dist.strict_yaml import dump_yaml
from aplantida_dist.trainer import read_ahead
from aplantida_dist.world import World
from bench.finding import Finding, Goal, alone
from bench.loader import CROP_RATIO, CROP_SCALE, FLIP
from bench.timm_training import (
    OPTIMIZER,
    Epoch,
    Recipe,
    make_timm_training,
    train_with_timm,
)

RECIPE = Recipe(
    model_name="test_vit",
    image_size=64,
    batch_size=32,
    epochs=3,
    warmup_epochs=1,
    peak_lr=2e-3,
    weight_decay=0.05,
    label_smoothing=0.1,
    clip_norm=1.0,
)
NUM_SPECIES, NUM_PICTURES, SIDE, SAMPLES_A_SHARD = 12, 2400, 96, 300
SEED = 0
STEP_GOAL = Goal("at most", 1e-5)
NOISE_GOAL = Goal("at most", 3.0)
"""Standard errors: where nothing but noise differs, a number of five seeds is beyond it once in 25 times (Student's t)."""


@dataclass(frozen=True)
class Comparison:
    """One number of both sides over the seeds, seed by seed: a seed has the same initial weights on both sides."""

    what: str
    ours: Sequence[float]
    timm: Sequence[float]

    @property
    def difference(self) -> float:
        """The mean over the seeds of ours − timm's."""
        return fmean(self._differences)

    @property
    def standard_error(self) -> float:
        """The standard error of the difference; of one seed nothing is known of it."""
        return stdev(self._differences) / sqrt(len(self.ours)) if len(self.ours) > 1 else float("nan")

    @property
    def _differences(self) -> list[float]:
        return [one - other for one, other in zip(self.ours, self.timm, strict=True)]


def bench_parity(cache_dir: Path, *, world: World, num_seeds: int) -> list[Finding]:
    """Print what both came to over `num_seeds` seeds, at least 2, and how far apart each step is when both get the same batches."""
    dataset_dir = prepare_dataset(cache_dir)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        apart = differences_of_steps(RECIPE, dataset_dir, world=world, run_dir=Path(folder) / "steps", seed=SEED)
        seeds = range(SEED, SEED + num_seeds)
        ours, theirs = [], []
        for seed in with_pace(seeds, total=num_seeds, doing="training"):
            ours.append(train_with_ours(RECIPE, dataset_dir, run_dir=Path(folder) / f"seed_{seed}", seed=seed))
            theirs.append(train_with_timm(RECIPE, open_dataset(dataset_dir), seed=seed))
    comparisons = compare_epochs(ours, theirs)
    print(f"\n{to_text(comparisons)}\n")
    what = f"parity: loss of a step, same batches, {len(apart)} steps"
    return [
        alone(what, "relative difference", [max(apart)], goal=STEP_GOAL),
        *(
            alone(
                f"parity: {comparison.what}, {num_seeds} seeds",
                "standard errors apart",
                [abs(comparison.difference) / comparison.standard_error],
                goal=NOISE_GOAL,
            )
            for comparison in comparisons
        ),
    ]


def prepare_dataset(cache_dir: Path) -> Path:
    """A small herbarium as shards, drawn where an earlier run has not."""
    home = cache_dir / f"parity-{NUM_PICTURES}-pictures-{SIDE}"
    dataset_dir = home / "dataset"
    if not dataset_dir.exists():
        shutil.rmtree(home, ignore_errors=True)
        draw_herbarium(
            home / "pictures",
            num_species=NUM_SPECIES,
            num_pictures=NUM_PICTURES,
            width=SIDE,
            height=SIDE,
            seed=SEED,
            workers=os.cpu_count() or 1,
        )
        options = BuildOptions(seed=SEED, limits=ShardLimits(num_samples=SAMPLES_A_SHARD), num_workers=0, replace=False)
        build_dataset(read_folder(home / "pictures"), dataset_dir, options=options)
    return dataset_dir


def write_config(path: Path, recipe: Recipe, dataset_dir: Path, *, seed: int) -> Path:
    """The recipe as a config of ours."""
    content = {
        "seed": seed,
        "data": {
            "dataset": str(dataset_dir),
            "image_size": recipe.image_size,
            "crop_scale": list(CROP_SCALE),
            "crop_ratio": list(CROP_RATIO),
            "horizontal_flip": FLIP,
            "num_workers": 0,
        },
        "model": {"name": recipe.model_name},
        "optimizer": {"name": OPTIMIZER, "peak_lr": recipe.peak_lr, "weight_decay": recipe.weight_decay},
        "schedule": {"kind": "cosine", "warmup_epochs": float(recipe.warmup_epochs)},
        "loss": {"label_smoothing": recipe.label_smoothing},
        "train": {
            "epochs": recipe.epochs,
            "global_batch_size": recipe.batch_size,
            "micro_batch_size": recipe.batch_size,
            "clip_norm": recipe.clip_norm,
        },
        "report": {"wandb": "disabled"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_yaml(content), encoding="utf-8")
    return path


def train_with_ours(recipe: Recipe, dataset_dir: Path, *, run_dir: Path, seed: int) -> list[Epoch]:
    """Train by the command, as a user does, and read the run's history."""
    config_path = write_config(run_dir.with_suffix(".yaml"), recipe, dataset_dir, seed=seed)
    command = [sys.executable, "-m", "aplantida_dist.train", "--config", str(config_path), "--run-dir", str(run_dir)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return [Epoch(row.train.loss, row.val.loss, row.val.top1) for row in History(run_dir).rows if row.val is not None]


def differences_of_steps(recipe: Recipe, dataset_dir: Path, *, world: World, run_dir: Path, seed: int) -> list[float]:
    """The relative difference of the loss at each step of an epoch, where both read our stream and nothing else is shared."""
    config = load_config(write_config(run_dir.with_suffix(".yaml"), recipe, dataset_dir, seed=seed), [])
    request = Request(run_dir, resume="never", max_samples=None, extra_checks=False, allow_leak=False)
    training = compose_across_ranks(config, world=world, request=request, listener=Listener())
    job, running = training.job, training.running
    job.freezing.set_modes(job.model, 0)
    peer = make_timm_training(recipe, num_classes=job.num_classes, steps_per_epoch=job.plan.steps_per_epoch, seed=seed)
    ours, same = read_ahead(job, 0), read_ahead(job, 0)
    differences = []
    for step in range(job.plan.steps_per_epoch):
        running.totals.reset()
        run_step(job, ours, running, step)
        our_loss = compute(running.totals.vector).loss
        batch = next(same)
        is_real = batch.weights > 0
        timm_loss = peer.step(job.normalize(batch.images)[is_real], batch.labels[is_real], step=step)
        differences.append(abs(our_loss - timm_loss) / timm_loss)
    return differences


def compare_epochs(ours: Sequence[Sequence[Epoch]], theirs: Sequence[Sequence[Epoch]]) -> list[Comparison]:
    """ours, theirs: the epochs of each seed. The train loss of the first and the last epoch, val after the last."""
    last = len(ours[0])
    return [
        Comparison("train loss of epoch 1", [run[0].train_loss for run in ours], [run[0].train_loss for run in theirs]),
        Comparison(
            f"train loss of epoch {last}", [run[-1].train_loss for run in ours], [run[-1].train_loss for run in theirs]
        ),
        Comparison(
            f"val loss after epoch {last}", [run[-1].val_loss for run in ours], [run[-1].val_loss for run in theirs]
        ),
        Comparison(
            f"val top-1 after epoch {last}", [run[-1].val_top1 for run in ours], [run[-1].val_top1 for run in theirs]
        ),
    ]


def to_text(comparisons: Sequence[Comparison]) -> str:
    """A line a number: mean ± standard deviation over the seeds of ours and timm's, the difference ± its standard error."""
    lines = [f"{'':24}{'ours':>18}{'timm':>18}{'difference':>20}"]
    for one in comparisons:
        ours, timm = (f"{fmean(values):.4f} ± {_spread(values):.4f}" for values in (one.ours, one.timm))
        lines.append(f"{one.what:24}{ours:>18}{timm:>18}{f'{one.difference:+.4f} ± {one.standard_error:.4f}':>20}")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else float("nan")
