"""Our loader beside the canonical webdataset pipeline and torchvision's ImageFolder, on the same pictures."""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from aplantida_dist.data.images import TrainTransform
from aplantida_dist.data.plan import Coordinates, TrainPlan
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from aplantida_dist.model import Normalize, PixelConvention
from bench.finding import Finding, Goal, compare, interleave
from bench.pictures import Pictures

IMAGE_SIZE = 224
MICRO_BATCH_SIZE = 64
NUM_WORKERS = 2
PREFETCH = 2
CROP_SCALE = (0.35, 1.0)
CROP_RATIO = (0.75, 1.3333)
FLIP = 0.5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEED = 0
CPU_GOAL, SPEED_GOAL = Goal("at most", 1.0), Goal("at least", 1.0)


class Delivery(NamedTuple):
    """What each loader hands to the model: images float32 [b, 3, 224, 224], normalised; how many of them are real."""

    images: Tensor
    num_pictures: int


@dataclass(frozen=True)
class Pass:
    """One pass over the pictures. CPU time is user + system of this process and its workers."""

    num_pictures: int
    cpu_s: float
    wall_s: float

    @property
    def cpu_ms_a_picture(self) -> float:
        return 1000.0 * self.cpu_s / self.num_pictures

    @property
    def images_per_s(self) -> float:
        return self.num_pictures / self.wall_s


Loader = Callable[[Pictures, int], Iterator[Delivery]]
"""Pictures and epoch in, one pass over them out."""


def ours(pictures: Pictures, epoch: int) -> Iterator[Delivery]:
    """Ours: uint8 from the workers, normalised here, as the trainer does on the CPU."""
    plan = TrainPlan(pictures.split.shard_sizes, SEED, MICRO_BATCH_SIZE, MICRO_BATCH_SIZE, 2**18)
    transform = TrainTransform(IMAGE_SIZE, CROP_SCALE, CROP_RATIO, FLIP, 0.0, "bilinear")
    normalize = Normalize(PixelConvention(MEAN, STD, "bilinear", 1.0), torch.device("cpu"))
    micro_batches = MicroBatches(pictures.split, plan, transform, seed=SEED)
    coordinates = [Coordinates(epoch, step, 0) for step in range(plan.steps_per_epoch)]
    for batch in stream(micro_batches, coordinates, reading=Reading(NUM_WORKERS, PREFETCH, pin_memory=False)):
        yield Delivery(normalize(batch.images), int(batch.weights.sum()))


def webdataset_pipeline(pictures: Pictures, epoch: int) -> Iterator[Delivery]:
    """The pipeline of webdataset's documentation, on our shards."""
    urls = [str(pictures.split.shard_path(index)) for index in range(len(pictures.split.shard_sizes))]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=epoch)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(_peer_transform(), _same)
        .batched(MICRO_BATCH_SIZE)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=NUM_WORKERS, prefetch_factor=PREFETCH)
    for images, labels in loader:
        yield Delivery(images, len(labels))


def image_folder(pictures: Pictures, epoch: int) -> Iterator[Delivery]:
    """torchvision's ImageFolder under a shuffling DataLoader."""
    loader = DataLoader(
        ImageFolder(str(pictures.folder), _peer_transform()),
        batch_size=MICRO_BATCH_SIZE,
        shuffle=True,
        num_workers=NUM_WORKERS,
        prefetch_factor=PREFETCH,
        generator=torch.Generator().manual_seed(epoch),
    )
    for images, labels in loader:
        yield Delivery(images, len(labels))


def measure(epoch: int, *, loader: Loader, pictures: Pictures) -> Pass:
    """Run one pass to its end, workers included: a child's CPU time is counted once it has ended."""
    cpu_s, wall_s = _cpu_s(), time.perf_counter()
    num_pictures = sum(delivery.num_pictures for delivery in loader(pictures, epoch))
    return Pass(num_pictures, _cpu_s() - cpu_s, time.perf_counter() - wall_s)


def bench_loader(pictures: Pictures, *, repeats: int) -> list[Finding]:
    """Compare CPU time and speed with both peers; the first pass of each, which fills the page cache, is not counted."""
    loaders = {"ours": ours, "webdataset": webdataset_pipeline, "ImageFolder": image_folder}
    measures = [functools.partial(measure, loader=loader, pictures=pictures) for loader in loaders.values()]
    passes = dict(zip(loaders, interleave(measures, repeats=repeats + 1), strict=True))
    cpu_ms = {name: [run.cpu_ms_a_picture for run in runs[1:]] for name, runs in passes.items()}
    images_per_s = {name: [run.images_per_s for run in runs[1:]] for name, runs in passes.items()}
    peers = [name for name in loaders if name != "ours"]
    return [
        compare("loader: CPU time a picture", "ms", cpu_ms["ours"], cpu_ms[peer], peer_name=peer, goal=CPU_GOAL)
        for peer in peers
    ] + [
        compare("loader: speed", "images/s", images_per_s["ours"], images_per_s[peer], peer_name=peer, goal=SPEED_GOAL)
        for peer in peers
    ]


def _peer_transform() -> Any:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(IMAGE_SIZE, scale=CROP_SCALE, ratio=CROP_RATIO),
            transforms.RandomHorizontalFlip(FLIP),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def _same(label: int) -> int:
    return label


def _cpu_s() -> float:
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
