"""A training of timm's parts, put together as its train script does: reader, loader, task, optimizer, schedule, clipping."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask
from timm.utils import dispatch_clip_grad, random_seed
from torch import Tensor

from aplantida_dist.data.dataset import Dataset, Split
from aplantida_dist.model import PixelConvention, build_model, pixel_convention
from bench.loader import CROP_RATIO, CROP_SCALE, FLIP

OPTIMIZER = "adamw"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Recipe:
    """What both sides are told to do. The rate rises over `warmup_epochs`, then falls along a cosine to 0."""

    model_name: str
    image_size: int
    batch_size: int
    epochs: int
    warmup_epochs: int
    peak_lr: float
    weight_decay: float
    label_smoothing: float
    clip_norm: float


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to: the mean train loss, label smoothing included; plain val loss; top-1 as a fraction."""

    train_loss: float
    val_loss: float
    val_top1: float


@dataclass(frozen=True)
class TimmTraining:
    """timm's task with its optimizer and its schedule; `step` is one update."""

    recipe: Recipe
    pixels: PixelConvention
    task: ClassificationTask
    optimizer: torch.optim.Optimizer
    scheduler: CosineLRScheduler

    def step(self, images: Tensor, labels: Tensor, *, step: int) -> float:
        """Update with normalised pictures, after `step` updates; returns the mean loss before it."""
        result = self.task(images, labels)
        result["loss"].backward()
        dispatch_clip_grad(self.task.get_clip_parameters(), self.recipe.clip_norm, mode="norm")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step_update(num_updates=step + 1)
        return float(result["loss"].detach())


def make_timm_training(recipe: Recipe, *, num_classes: int, steps_per_epoch: int, seed: int) -> TimmTraining:
    """Begin with the weights that ours begins with. timm's warm-up is told where ours begins and ends: the rates are then equal."""
    model = build_model(
        recipe.model_name,
        num_classes=num_classes,
        image_size=recipe.image_size,
        pretrained=False,
        kwargs={},
        seed=seed,
    )
    model.train()
    optimizer = create_optimizer_v2(model, opt=OPTIMIZER, lr=recipe.peak_lr, weight_decay=recipe.weight_decay)
    warmup_steps = recipe.warmup_epochs * steps_per_epoch
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * steps_per_epoch - warmup_steps,
        warmup_t=warmup_steps,
        warmup_lr_init=recipe.peak_lr / (warmup_steps + 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )
    task = ClassificationTask(model, criterion_kwargs={"smoothing": recipe.label_smoothing}, verbose=False)
    return TimmTraining(recipe, pixel_convention(model), task, optimizer, scheduler)


def train_with_timm(recipe: Recipe, dataset: Dataset, *, seed: int) -> list[Epoch]:
    """Train with timm's reader on the dataset's shards. Its last batch of an epoch is filled up with samples read twice."""
    train_split, val_split = dataset.open_split("train"), dataset.open_split("val")
    steps_per_epoch = -(-train_split.num_samples // recipe.batch_size)
    num_classes = dataset.class_map.num_classes
    training = make_timm_training(recipe, num_classes=num_classes, steps_per_epoch=steps_per_epoch, seed=seed)
    random_seed(seed)  # timm's transforms draw from the global generators
    settings: dict[str, Any] = {"image_size": recipe.image_size, "batch_size": recipe.batch_size, "seed": seed}
    read = open_timm_loader(train_split, training.pixels, is_training=True, **settings)
    val_loader = open_timm_loader(val_split, training.pixels, is_training=False, **settings)
    epochs = []
    for epoch in range(recipe.epochs):
        read.dataset.set_epoch(epoch)
        train_loss = _train_epoch(training, read, first_step=epoch * steps_per_epoch)
        epochs.append(Epoch(train_loss, *_evaluate(training, val_loader)))
    return epochs


def open_timm_loader(
    split: Split,
    pixels: PixelConvention,
    *,
    image_size: int,
    batch_size: int,
    is_training: bool,
    seed: int,
    num_workers: int = 0,
    device: torch.device = CPU,
) -> Any:
    """timm's loader over its WebDataset reader, with the pixels of our transforms: no colour jitter. A GPU normalises by itself, as in its script."""
    names = "::".join(shard.name for shard in split.manifest.shards)
    dataset = create_dataset(
        "wds/",
        root=str(split.split_dir),
        split=f"{names}|{split.num_samples}",
        is_training=is_training,
        batch_size=batch_size,
        seed=seed,
    )
    return create_loader(
        dataset,
        input_size=(3, image_size, image_size),
        batch_size=batch_size,
        is_training=is_training,
        scale=CROP_SCALE,
        ratio=CROP_RATIO,
        hflip=FLIP,
        color_jitter=0.0,
        interpolation=pixels.interpolation,
        mean=pixels.mean,
        std=pixels.std,
        crop_pct=pixels.crop_fraction,
        num_workers=num_workers,
        use_prefetcher=device.type != "cpu",
        device=device,
    )


def _train_epoch(training: TimmTraining, batches: Iterable[tuple[Tensor, Tensor]], *, first_step: int) -> float:
    training.task.train()
    loss_sum, num_samples = 0.0, 0
    for step, (images, labels) in enumerate(batches, start=first_step):
        loss_sum += training.step(images, labels, step=step) * len(labels)
        num_samples += len(labels)
    return loss_sum / num_samples


@torch.no_grad()
def _evaluate(training: TimmTraining, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[float]:
    """Yield loss and top-1."""
    training.task.eval()
    model = training.task.get_eval_model()
    scored = [(model(images), labels) for images, labels in batches]
    logits, labels = (torch.cat(parts) for parts in zip(*scored, strict=True))
    yield float(torch.nn.functional.cross_entropy(logits, labels))
    yield float((logits.argmax(1) == labels).float().mean())
