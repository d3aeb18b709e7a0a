"""A training fed from shards, beside the same steps on batches that lie on the device, and beside timm's parts fed by timm's reader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from typing import Any

import torch
from torch import Tensor, nn

from aplantida_dist.data.dataset import Split
from aplantida_dist.model import pixel_convention
from aplantida_dist.trainer import read_ahead
from aplantida_dist.world import World
from bench.finding import Finding, Goal, compare, interleave
from bench.loader import PREFETCH
from bench.loop import SEED, Load, bare_loop, build, make_job, our_loop, resident_batches
from bench.timm_training import open_timm_loader

TIMED_STEPS = 40
PRECISIONS = {"no": "fp32", "bf16": "bf16"}
RESIDENT_GOAL, TIMM_GOAL = Goal("at least", 0.98), Goal("at least", 1.0)


@dataclass(frozen=True)
class Read:
    """A batch of timm's loader, on the device: images float32 [b, 3, h, w], normalised; labels int64 [b]."""

    images: Tensor
    labels: Tensor


def bench_feed(split: Split, load: Load, *, world: World, num_workers: int, repeats: int) -> list[Finding]:
    """Compare images/s of whole steps, in turn, with mixup, clipping and EMA on all sides.

    While one waits for its turn its workers read ahead as far as they may, so as many steps and more are not counted first.
    """
    job = make_job(load, world=world, split=split, num_workers=num_workers)
    read = open_timm_loader(
        split,
        pixel_convention(build(load)),
        image_size=load.image_size,
        batch_size=load.batch_size,
        is_training=True,
        seed=SEED,
        num_workers=num_workers,
        device=world.device,
    )
    ours = our_loop(job, read_ahead(job, 0))
    resident = our_loop(make_job(load, world=world), cycle(resident_batches(load, world=world)))
    timms = bare_loop(load, _epochs_of(read, world), normalize=nn.Identity(), world=world)
    steps = {"ours": ours.step, "resident batches": resident.step, "timm's reader and parts": timms.step}
    num_ahead = num_workers * PREFETCH + 2
    measures = [
        partial(_images_per_s, step=step, load=load, world=world, num_ahead=num_ahead) for step in steps.values()
    ]
    speeds = dict(zip(steps, interleave(measures, repeats=repeats), strict=True))
    what = f"feed: {load.model_name} at {load.image_size}, {PRECISIONS[world.accelerator.mixed_precision]}, {_name_of(world.device)}, {num_workers} workers"
    goals = {"resident batches": RESIDENT_GOAL, "timm's reader and parts": TIMM_GOAL}
    return [
        compare(what, "images/s", speeds["ours"], speeds[peer], peer_name=peer, goal=goal)
        for peer, goal in goals.items()
    ]


def _images_per_s(repeat: int, *, step: Callable[[], None], load: Load, world: World, num_ahead: int) -> float:
    for _ in range(num_ahead):
        step()
    _wait_for(world.device)
    started_s = time.perf_counter()
    for _ in range(TIMED_STEPS):
        step()
    _wait_for(world.device)
    return TIMED_STEPS * load.batch_size / (time.perf_counter() - started_s)


def _epochs_of(read: Any, world: World) -> Iterator[Read]:
    for epoch in count():
        read.dataset.set_epoch(epoch)
        for images, labels in read:
            yield Read(images.to(world.device, non_blocking=True), labels.to(world.device, non_blocking=True))


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
