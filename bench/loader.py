"""Our loader beside webdataset's pipeline, ImageFolder and timm's, beside its own transform, and in threads, on the same pictures."""

from __future__ import annotations

import functools
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import webdataset
from timm.data import create_dataset, create_loader
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from aplantida_dist.data.batch import Batch
from aplantida_dist.data.images import TrainTransform
from aplantida_dist.data.plan import Coordinates, TrainPlan
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from aplantida_dist.model import Normalize, PixelConvention
from bench.finding import Finding, Goal, compare, interleave
from bench.pictures import Pictures
from tests.ranks import FORK

IMAGE_SIZE = 224
MICRO_BATCH_SIZE = 64
NUM_WORKERS = 2
PREFETCH = 2
CROP_SCALE = (0.35, 1.0)
CROP_RATIO = (0.75, 1.3333)
FLIP = 0.5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEED = 0
CPU_GOALS = {
    name: Goal("at most", round(1 / times, 3))
    for name, times in (("webdataset", 3.0), ("ImageFolder", 2.6), ("timm", 2.3))
}
NORMALISED_GOALS = {
    name: Goal("at most", round(1 / times, 3))
    for name, times in (("webdataset", 2.1), ("ImageFolder", 1.9), ("timm", 1.7))
}
"""Where we normalise on the CPU too, which a GPU does for nothing: the floor."""
SPEED_GOALS = {
    name: Goal("at least", times) for name, times in (("webdataset", 3.0), ("ImageFolder", 2.6), ("timm", 2.3))
}
TRANSFORM_GOAL, THREADS_GOAL = Goal("at most", round(1 / 0.95, 3)), Goal("at most", 1.0)
NUM_EPOCHS = 3
"""How many epochs a pass has, by the same workers wherever a loader keeps them: starting them is little of a training."""


class Delivery(NamedTuple):
    """What each loader hands to the model: images [b, 3, 224, 224], float32 and normalised, or uint8; how many of them are real."""

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
"""Pictures and the number of a pass in, `NUM_EPOCHS` epochs of them out."""


def ours(pictures: Pictures, number: int) -> Iterator[Delivery]:
    """Ours: uint8 from the workers, normalised here, as the trainer does on the CPU."""
    normalize = Normalize(PixelConvention(MEAN, STD, "bilinear", 1.0), torch.device("cpu"))
    for delivery in shipped(pictures, number):
        yield Delivery(normalize(delivery.images), delivery.num_pictures)


def shipped(pictures: Pictures, number: int) -> Iterator[Delivery]:
    """Ours as a GPU is fed: uint8, because normalising is the device's work."""
    reading = Reading(NUM_WORKERS, PREFETCH, pin_memory=False)
    for batch in stream(*_plan(pictures, number), reading=reading):
        yield _delivered(batch)


def shipped_by_threads(pictures: Pictures, number: int) -> Iterator[Delivery]:
    """What `shipped` delivers, in that order, by as many threads of this process."""
    coordinates = _plan(pictures, number)[1]
    own = threading.local()

    def read(at: Coordinates) -> Batch:
        if not hasattr(own, "micro_batches"):
            own.micro_batches = _plan(pictures, number)[0]
        batch: Batch = own.micro_batches[at]
        return batch

    ahead: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        for at in coordinates:
            ahead.append(pool.submit(read, at))
            if len(ahead) > NUM_WORKERS * PREFETCH:
                yield _delivered(ahead.popleft().result())
        while ahead:
            yield _delivered(ahead.popleft().result())


def transform_alone(pictures: Pictures, number: int) -> Iterator[Delivery]:
    """The transform of each picture, in as many processes as a loader has, which share the cores as its workers do: what no loader can go below."""
    paths = sorted(pictures.folder.rglob("*.jpg"))
    processes = [
        FORK.Process(target=_transform_each, args=(paths[first::NUM_WORKERS],)) for first in range(NUM_WORKERS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    yield Delivery(torch.empty(0), NUM_EPOCHS * len(paths))


def _transform_each(paths: Sequence[Path]) -> None:
    transform = _transform()
    for _ in range(NUM_EPOCHS):
        for seed, path in enumerate(paths):
            transform(path.read_bytes(), seed)


def _delivered(batch: Batch) -> Delivery:
    return Delivery(batch.images, int(batch.weights.sum()))


def _transform() -> TrainTransform:
    return TrainTransform(IMAGE_SIZE, CROP_SCALE, CROP_RATIO, FLIP, 0.0, "bilinear")


def _plan(pictures: Pictures, number: int) -> tuple[MicroBatches, list[Coordinates]]:
    plan = TrainPlan(pictures.split.shard_sizes, SEED, MICRO_BATCH_SIZE, MICRO_BATCH_SIZE, 2**18)
    epochs = range(NUM_EPOCHS * number, NUM_EPOCHS * (number + 1))
    coordinates = [Coordinates(epoch, step, 0) for epoch in epochs for step in range(plan.steps_per_epoch)]
    return MicroBatches(pictures.split, plan, _transform(), seed=SEED), coordinates


def webdataset_pipeline(pictures: Pictures, number: int) -> Iterator[Delivery]:
    """The pipeline of webdataset's documentation, on our shards."""
    urls = [str(pictures.split.shard_path(index)) for index in range(len(pictures.split.shard_sizes))]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=number)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(_peer_transform(), _same)
        .batched(MICRO_BATCH_SIZE)
    )
    yield from _epochs_of(webdataset.WebLoader(dataset, batch_size=None, **_workers()))


def image_folder(pictures: Pictures, number: int) -> Iterator[Delivery]:
    """torchvision's ImageFolder under a shuffling DataLoader."""
    generator = torch.Generator().manual_seed(number)
    dataset = ImageFolder(str(pictures.folder), _peer_transform())
    yield from _epochs_of(
        DataLoader(dataset, batch_size=MICRO_BATCH_SIZE, shuffle=True, generator=generator, **_workers())
    )


def timm_loader(pictures: Pictures, number: int) -> Iterator[Delivery]:
    """timm's loader over the folder, with nothing but crop and flip, normalised in its workers; it drops a last batch that is short."""
    loader = create_loader(
        create_dataset("", root=str(pictures.folder), is_training=True),
        input_size=(3, IMAGE_SIZE, IMAGE_SIZE),
        batch_size=MICRO_BATCH_SIZE,
        is_training=True,
        scale=CROP_SCALE,
        ratio=CROP_RATIO,
        hflip=FLIP,
        color_jitter=0.0,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=NUM_WORKERS,
        use_prefetcher=False,
        persistent_workers=True,
    )
    loader.sampler.generator = torch.Generator().manual_seed(number)
    yield from _epochs_of(loader)


def _workers() -> dict[str, Any]:
    return {"num_workers": NUM_WORKERS, "prefetch_factor": PREFETCH, "persistent_workers": True}


def _epochs_of(loader: Any) -> Iterator[Delivery]:
    """The epochs of a peer's loader, whose workers end with it."""
    for _ in range(NUM_EPOCHS):
        for images, labels in loader:
            yield Delivery(images, len(labels))


def measure(number: int, *, loader: Loader, pictures: Pictures) -> Pass:
    """Run one pass to its end, workers included: a child's CPU time is counted once it has ended."""
    cpu_s, wall_s = _cpu_s(), time.perf_counter()
    num_pictures = sum(delivery.num_pictures for delivery in loader(pictures, number))
    return Pass(num_pictures, _cpu_s() - cpu_s, time.perf_counter() - wall_s)


def bench_loader(pictures: Pictures, *, repeats: int) -> list[Finding]:
    """Compare CPU time and speed with the peers, with the transform alone, and with threads.

    The first pass of each, which fills the page cache, is not counted.
    """
    loaders: dict[str, Loader] = {
        "ours": ours,
        "webdataset": webdataset_pipeline,
        "ImageFolder": image_folder,
        "timm": timm_loader,
        "shipped": shipped,
        "its transform alone": transform_alone,
        "threads": shipped_by_threads,
    }
    measures = [functools.partial(measure, loader=loader, pictures=pictures) for loader in loaders.values()]
    passes = dict(zip(loaders, interleave(measures, repeats=repeats + 1), strict=True))
    cpu_ms = {name: [run.cpu_ms_a_picture for run in runs[1:]] for name, runs in passes.items()}
    images_per_s = {name: [run.images_per_s for run in runs[1:]] for name, runs in passes.items()}
    own = {"its transform alone": TRANSFORM_GOAL, "threads": THREADS_GOAL}
    tables = [
        ("uint8", "shipped", CPU_GOALS | own, SPEED_GOALS | {"threads": Goal("at least", 1.0)}),
        ("normalised", "ours", NORMALISED_GOALS, {}),
    ]
    return [
        compare(f"loader, {what}: {quantity}", unit, found[name], found[peer], peer_name=peer, goal=goal)
        for what, name, cpu_goals, speed_goals in tables
        for quantity, unit, found, goals in (
            ("CPU time a picture", "ms", cpu_ms, cpu_goals),
            ("speed", "images/s", images_per_s, speed_goals),
        )
        for peer, goal in goals.items()
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
