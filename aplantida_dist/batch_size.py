"""`train.micro_batch_size: auto`: the largest micro-batch that fits into the memory of every GPU, found by trying."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from aplantida_dist.config import Config
from aplantida_dist.errors import UserError
from aplantida_dist.ground import Request
from aplantida_dist.loss import cross_entropy
from aplantida_dist.model import pixel_convention
from aplantida_dist.optimizer import set_learning_rate
from aplantida_dist.recipe import dataset_of, model_of, normalize_of, optimizer_of
from aplantida_dist.run_folder import find_checkpoint
from aplantida_dist.world import World, is_out_of_memory

RESERVED_SHARE = 0.1
"""Share of a GPU's memory that stays free in a trial: for the buffers of DDP and NCCL, other programs, and fragments."""


class BatchSizeError(UserError):
    """No micro-batch size can be found by trying."""


def decide_micro_batch_size_across_ranks(config: Config, *, world: World, request: Request) -> Config:
    """Collective. The config with a number for `auto`: that of the checkpoint the run goes on from, or the one that is found.

    A resumed run never searches, since the number decides which samples are forwarded together. BatchSizeError on every
    rank where there is no GPU: the memory of a host has no end at which a trial would stop.
    """
    if config.train.micro_batch_size != "auto":
        return config
    size = world.agree_across_ranks(lambda: _size_of_checkpoint(request))
    if size is None:
        size = _found_across_ranks(config, world=world)
        if world.is_main:
            print(f"train.micro_batch_size: {size} is the largest that fits, and config.yaml will say so", flush=True)
    return config.with_micro_batch_size(size)


def sizes_to_try(global_batch_size: int, world_size: int, *, num_lanes: int = 1) -> list[int]:
    """The divisors of a lane's share of a step that leave every rank a micro-batch, ascending; 1 at least."""
    most = max(1, global_batch_size // world_size)
    return [size for size in range(1, most + 1) if global_batch_size % (size * num_lanes) == 0]


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest of the ascending sizes that fits, where every one smaller than one that fits does too.

    The sizes are doubled up to the first that does not fit, so that a machine whose memory is full is asked for little more than
    it has; those between that one and the last that fitted are then halved. BatchSizeError where the smallest does not fit.
    """
    low, step, high = -1, 1, len(sizes)
    while low + step < high:
        if fits(sizes[low + step]):
            low, step = low + step, step * 2
        else:
            high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle
        else:
            high = middle
    if low < 0:
        raise BatchSizeError(
            f"train.micro_batch_size auto: not even {sizes[0]} fits into the memory; choose a smaller model or data.image_size, or bf16"
        )
    return sizes[low]


def fits_in_memory(size: int, *, make_trial: Callable[[], Callable[[int], Any]]) -> bool:
    """Make a trial and run it with this many samples: whether the memory was enough. What the trial held is free again."""
    try:
        make_trial()(size)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def _size_of_checkpoint(request: Request) -> int | None:
    checkpoint = find_checkpoint(request.run_dir, request.resume, warn=lambda text: None)
    return None if checkpoint is None else int(checkpoint.position.law_fields["train.micro_batch_size"])


def _found_across_ranks(config: Config, *, world: World) -> int:
    """Collective. The largest size that fits on each rank, agreed: the smallest of them, which fits on all."""
    sizes = sizes_to_try(config.train.global_batch_size, world.world_size, num_lanes=config.data.lanes)
    found = world.agree_across_ranks(lambda: _found_here(config, sizes, world=world))
    smallest: int = min(world.gather_across_ranks(found))
    return smallest


def _found_here(config: Config, sizes: Sequence[int], *, world: World) -> int:
    if world.device.type != "cuda":
        raise BatchSizeError(
            f"train.micro_batch_size auto: finds what fits into a GPU, this process runs on {world.device.type}; write a "
            f"number, a divisor of {config.train.global_batch_size} such as {sizes[len(sizes) // 2]}"
        )
    num_classes = dataset_of(config).class_map.num_classes
    return largest_that_fits(
        sizes,
        lambda size: fits_in_memory(size, make_trial=lambda: Trial(config, num_classes=num_classes, world=world)),
    )


class Trial:
    """What a run holds in memory, as far as it grows with the micro-batch: model, gradients, optimizer's state, activations.

    A tenth of the GPU is kept from it. The weights are random, and thrown away.
    """

    def __init__(self, config: Config, *, num_classes: int, world: World) -> None:
        _, total_bytes = torch.cuda.mem_get_info(world.device)
        self._reserve = torch.empty(int(RESERVED_SHARE * total_bytes), dtype=torch.uint8, device=world.device)
        model = model_of(config, num_classes=num_classes, pretrained=False)
        self._normalize = normalize_of(config, pixel_convention(model), world)
        self._model: nn.Module = model.to(world.device).train()
        self._optimizer = optimizer_of(config, self._model)
        set_learning_rate(self._optimizer, 0.0)
        self._image_size, self._world = config.data.image_size, world

    def __call__(self, size: int) -> None:
        """Two steps of two micro-batches: from the second on, activations stand beside gradients and the optimizer's state."""
        images = torch.zeros(
            (size, 3, self._image_size, self._image_size), dtype=torch.uint8, device=self._world.device
        )
        labels = torch.zeros(size, dtype=torch.int64, device=self._world.device)
        for _ in range(2):
            for _ in range(2):
                with self._world.accelerator.autocast():
                    logits = self._model(self._normalize(images))
                cross_entropy(logits, labels, label_smoothing=0.0).sum().backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
