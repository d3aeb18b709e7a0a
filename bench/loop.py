"""Our training loop beside a bare PyTorch loop of the same parts: model, mixup, optimizer, clipping, EMA; batches are resident, there is no loader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from statistics import fmean
from typing import Protocol

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from aplantida_dist.data.batch import Batch
from aplantida_dist.data.dataset import Split
from aplantida_dist.data.images import EvaluationTransform, TrainTransform
from aplantida_dist.data.manifest import make_manifest
from aplantida_dist.data.plan import Coordinates, TrainPlan
from aplantida_dist.data.stream import Reading
from aplantida_dist.ema import build_ema
from aplantida_dist.freezing import make_freezing
from aplantida_dist.interruption import Interruption
from aplantida_dist.job import Job, Running
from aplantida_dist.metrics import Totals, compute
from aplantida_dist.mixing import MixupCutmix
from aplantida_dist.model import Normalize, build_model, pixel_convention
from aplantida_dist.nonfinite import NonFinitePolicy
from aplantida_dist.objective import CrossEntropy
from aplantida_dist.optimizer import build_optimizer
from aplantida_dist.record import Record
from aplantida_dist.schedule import Schedule
from aplantida_dist.signals import Listener
from aplantida_dist.step import run_step
from aplantida_dist.teachers import Teachers
from aplantida_dist.world import World
from bench.finding import Finding, Goal, compare, cpu_ms_of, interleave
from bench.loader import CROP_RATIO, CROP_SCALE, FLIP, PREFETCH

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
CLIP_NORM = 1.0
MIXUP_ALPHA = 0.8
EMA_DECAY = 0.999
NUM_BATCHES = 4
STEPS_A_BLOCK = 10
"""As many as the config's default `train.log_every_steps`, so that each block computes the totals once."""
GOAL = Goal("at most", 1.03)
SEED = 0


@dataclass(frozen=True)
class Load:
    """What both loops train: a timm model by name, and the size of a step. Chosen so that a step takes 0.1 to 0.2 s."""

    model_name: str
    image_size: int
    num_classes: int
    batch_size: int


SMALL = Load("test_vit", image_size=160, num_classes=1000, batch_size=32)


class Labelled(Protocol):
    """What the bare loop needs of a batch: images [b, 3, h, w] and labels int64 [b], on its device."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True)
class OurLoop:
    """Ours: `run_step` of the trainer, and now and then the totals so far, which its progress shows."""

    job: Job
    running: Running
    batches: Iterator[Batch]
    steps: Iterator[int]

    def step(self) -> None:
        done = next(self.steps) + 1
        run_step(self.job, self.batches, self.running, done - 1)
        if done % self.job.log_every_steps == 0:
            compute(self.job.world.sum_across_ranks(self.running.totals.vector))


@dataclass(frozen=True)
class BareLoop:
    """The loop that one writes first, of timm's parts: mixup, forward, loss, backward, clip, update, EMA. It counts nothing and logs nothing."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    normalize: nn.Module
    mixup: Mixup
    criterion: nn.Module
    ema: ModelEmaV3
    batches: Iterator[Labelled]
    steps: Iterator[int]

    def step(self) -> None:
        batch = next(self.batches)
        images, targets = self.mixup(self.normalize(batch.images), batch.labels)
        loss = self.criterion(self.model(images), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model, step=next(self.steps) + 1)


def make_loops(load: Load, *, world: World) -> tuple[OurLoop, BareLoop]:
    """Both loops, from the same weights, over the same batches, which are resident."""
    job = make_job(load, world=world)
    batches = resident_batches(load, world=world)
    return our_loop(job, cycle(batches)), bare_loop(load, cycle(batches), normalize=job.normalize, world=world)


def our_loop(job: Job, batches: Iterator[Batch]) -> OurLoop:
    """Our loop over the batches of a job's rank."""
    return OurLoop(job, Running(Totals(job.num_classes, job.world.device)), batches, count())


def bare_loop(load: Load, batches: Iterator[Labelled], *, normalize: nn.Module, world: World) -> BareLoop:
    """The bare loop, on the world's device and in its precision."""
    model = build(load)
    ema = ModelEmaV3(model, decay=EMA_DECAY, use_warmup=True, device=world.device)
    model = world.prepare_for_evaluation(model)  # no DDP
    model.train()
    return BareLoop(
        model=model,
        optimizer=_optimizer(model),
        normalize=normalize,
        mixup=Mixup(MIXUP_ALPHA, label_smoothing=0.0, num_classes=load.num_classes),
        criterion=SoftTargetCrossEntropy(),
        ema=ema,
        batches=batches,
        steps=count(),
    )


def build(load: Load) -> nn.Module:
    """The model, with the same weights each time."""
    return build_model(
        load.model_name,
        num_classes=load.num_classes,
        image_size=load.image_size,
        pretrained=False,
        kwargs={},
        seed=SEED,
    )


def bench_loop(*, world: World, repeats: int) -> list[Finding]:
    """Compare the CPU time of single steps that take turns, summed over blocks, so that the totals' share is in each."""
    ours, bare = make_loops(SMALL, world=world)
    for loop in (ours, bare):
        loop.step()  # the first one makes the optimizer's state
    steps_ms = interleave([cpu_ms_of(ours.step), cpu_ms_of(bare.step)], repeats=STEPS_A_BLOCK * 2 * repeats)
    our_ms, bare_ms = (_means_of_blocks(series) for series in steps_ms)
    what = f"loop: a step of {SMALL.model_name} with mixup, clipping, EMA; {SMALL.batch_size} pictures, {SMALL.num_classes:,} classes"
    return [compare(what, "CPU ms", our_ms, bare_ms, peer_name="bare, timm's parts", goal=GOAL)]


def _means_of_blocks(steps_ms: list[float]) -> list[float]:
    return [fmean(steps_ms[start : start + STEPS_A_BLOCK]) for start in range(0, len(steps_ms), STEPS_A_BLOCK)]


def resident_batches(load: Load, *, world: World) -> list[Batch]:
    """Batches of noise that lie on the world's device."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (load.batch_size, 3, load.image_size, load.image_size)
    return [
        Batch(
            at=Coordinates(0, step, 0),
            images=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            labels=torch.randint(load.num_classes, (load.batch_size,), generator=generator),
            weights=torch.ones(load.batch_size),
            identities=torch.arange(load.batch_size),
            sample_keys=tuple(f"{step}-{i}" for i in range(load.batch_size)),
        ).to(world.device)
        for step in range(NUM_BATCHES)
    ]


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(
        model, name="adamw", peak_lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, layer_decay=None, kwargs={}
    )


def make_job(load: Load, *, world: World, split: Split | None = None, num_workers: int = 0) -> Job:
    """A job of one slot a step, whose end no bench reaches; without a split nothing can be read, only resident batches trained on."""
    model = build(load)
    model.train()
    normalize = Normalize(pixel_convention(model), world.device)
    ema = build_ema(model, world=world, decay=EMA_DECAY, warmup=True)
    freezing, optimizer = make_freezing(model, head_only_steps=0), _optimizer(model)
    model, optimizer = world.prepare(model, optimizer)
    if split is None:
        split = Split(Path("resident"), make_manifest(split="train", class_map_digest="", shards=(), identity_sum=0))
        sizes = np.array([load.batch_size * 1000], dtype=np.int64)
    else:
        sizes = split.shard_sizes
    return Job(
        world=world,
        model=model,
        optimizer=optimizer,
        ema=ema,
        normalize=normalize,
        plan=TrainPlan(sizes, SEED, load.batch_size, load.batch_size, 2**18),
        schedule=Schedule("constant", LEARNING_RATE, LEARNING_RATE, 0, 10**6),
        train_split=split,
        val_split=None,
        leaked=np.zeros(0, dtype=np.int64),
        train_transform=TrainTransform(load.image_size, CROP_SCALE, CROP_RATIO, FLIP, 0.0, "bilinear"),
        evaluation_transform=EvaluationTransform(load.image_size, 1.0, "bilinear"),
        reading=Reading(num_workers, PREFETCH if num_workers else 1, pin_memory=world.device.type == "cuda"),
        record=Record(),
        digests={},
        num_classes=load.num_classes,
        train_counts=(1,) * load.num_classes,
        seed=SEED,
        mixing=MixupCutmix(
            SEED,
            mixup_alpha=MIXUP_ALPHA,
            cutmix_alpha=0.0,
            probability=1.0,
            cutmix_probability=0.0,
            end_step=10**6,
        ),
        objective=CrossEntropy(label_smoothing=0.0),
        teachers=Teachers(()),
        nonfinite=NonFinitePolicy("stop", budget=0),
        stopping=None,
        interruption=Interruption(world, Listener()),
        voids_bad_samples=False,
        metrics_to_hold=(),
        freezing=freezing,
        missing_soft_labels=0,
        clip_norm=CLIP_NORM,
        clip_agc=None,
        log_every_steps=STEPS_A_BLOCK,
        checkpoint_every_steps=None,
        evaluate_every_epochs=1,
        evaluation_micro_batch_size=load.batch_size,
        extra_checks=False,
    )
