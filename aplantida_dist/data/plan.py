"""The plan: which samples form which slot of which step, a pure function of (manifest, seed, epoch, batch sizes) alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.data.sampling import ClassSampling, IntArray
from aplantida_dist.errors import UserError
from aplantida_dist.seeds import derive

SHARDS_TOGETHER = 8
"""Shards of the stored order that are brought before they are read, while as many are read."""


class PlanError(UserError):
    """A plan that cannot be: no samples, or batch sizes that do not fit each other."""


class Coordinates(NamedTuple):
    """Where a micro-batch stands: the epoch (from 0), the step within it, the slot within the step."""

    epoch: int
    step_in_epoch: int
    slot: int


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one slot, in order; every array has one entry a sample, padding included.

    sample_indices: int64, the place in the manifest's order (0 … num_samples − 1). shard_indices and member_indices: int64,
    the shard and the place within it. repeats: int64, which of its showings in the epoch this one is, from 0 (and
    always 0 unless classes are sampled). weights: float32, 1 for a sample, 0 for
    padding (a real sample of the same step that is repeated, because pictures of zeros would pollute BatchNorm).
    """

    sample_indices: IntArray
    shard_indices: IntArray
    member_indices: IntArray
    repeats: IntArray
    weights: NDArray[np.float32]

    def showing(self, i: int) -> tuple[int, ...]:
        """What tells this showing of sample i from all others of the epoch: its place and, where it is a repeat, which one."""
        sample_index, repeat = int(self.sample_indices[i]), int(self.repeats[i])
        return (sample_index, repeat) if repeat else (sample_index,)


@dataclass(frozen=True, eq=False)
class TrainPlan:
    """The shuffled order of training.

    In an epoch every sample stands in exactly one slot with weight 1; where there is a `sampling`, as often as its draw says.
    Shards are permuted by a key of (seed, epoch); their concatenation is cut into blocks of `block_samples`, each permuted by
    its own key. A step is `global_batch_size` samples in `slots_per_step` slots of `micro_batch_size`; the last step of an
    epoch may hold fewer. Nothing here knows of ranks but `slots_of`.

    shard_sizes: int64 [shards], the samples of each shard in the manifest's order; zeros are allowed.
    """

    shard_sizes: IntArray
    seed: int
    global_batch_size: int
    micro_batch_size: int
    block_samples: int
    sampling: ClassSampling | None = None

    def __post_init__(self) -> None:
        if self.num_samples == 0:
            raise PlanError("the train split holds no samples; an epoch needs at least one")
        if self.global_batch_size % self.micro_batch_size:
            raise PlanError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}; "
                "choose one that is"
            )

    @cached_property
    def num_samples(self) -> int:
        return int(self.shard_sizes.sum())

    @property
    def slots_per_step(self) -> int:
        return self.global_batch_size // self.micro_batch_size

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    def samples_in_step(self, step_in_epoch: int) -> int:
        """The number of samples of a step, which every rank knows without talking: the divisor of the step's loss."""
        return min(self.global_batch_size, self.num_samples - step_in_epoch * self.global_batch_size)

    def slots_of(self, rank: int, world_size: int) -> range:
        """The slots that a rank computes in every step: equally many on each rank; those past `slots_per_step` are empty."""
        slots_per_rank = -(-self.slots_per_step // world_size)
        return range(rank * slots_per_rank, (rank + 1) * slots_per_rank)

    def micro_batch(self, at: Coordinates) -> MicroBatch:
        """The samples of one slot. An empty slot repeats samples of its step with weight 0."""
        num_real = self.samples_in_step(at.step_in_epoch)
        within_step = at.slot * self.micro_batch_size + np.arange(self.micro_batch_size, dtype=np.int64)
        positions = at.step_in_epoch * self.global_batch_size + within_step % num_real
        order = _shard_order(self, at.epoch)
        return _locate(self._shuffle(at.epoch, positions), order, within_step < num_real)

    @property
    def blocks_per_epoch(self) -> int:
        return -(-self.num_samples // self.block_samples)

    def blocks_of(self, at: Coordinates) -> tuple[int, int]:
        """The first and the last block, counted over all epochs, that the samples of a step are drawn from."""
        first = at.step_in_epoch * self.global_batch_size
        last = first + self.samples_in_step(at.step_in_epoch) - 1
        before = at.epoch * self.blocks_per_epoch
        return before + first // self.block_samples, before + last // self.block_samples

    def shards_of_block(self, block: int) -> IntArray:
        """The shards that the samples of a block, counted over all epochs, lie in, each once."""
        epoch, in_epoch = divmod(block, self.blocks_per_epoch)
        firsts, ends, permutation = self.shard_bounds_of_blocks(epoch)
        return permutation[firsts[in_epoch] : ends[in_epoch]]

    def shard_bounds_of_blocks(self, epoch: int) -> tuple[IntArray, IntArray, IntArray]:
        """Where the shards of each block of an epoch begin and end in the epoch's order of those that are not empty, and that order."""
        order = _shard_order(self, epoch)
        sizes = np.diff(order.starts, append=self.num_samples)
        starts = order.starts[sizes > 0]
        bounds = np.arange(self.blocks_per_epoch, dtype=np.int64) * self.block_samples
        firsts = np.searchsorted(starts, bounds, side="right") - 1
        ends = np.searchsorted(starts, bounds + self.block_samples, side="left")
        return firsts, ends, order.permutation[sizes > 0]

    def _shuffle(self, epoch: int, positions: IntArray) -> IntArray:
        """Map positions of the epoch to places in the concatenation of the permuted shards, block by block."""
        places = np.empty_like(positions)
        blocks = positions // self.block_samples
        for block in np.unique(blocks):
            start = int(block) * self.block_samples
            permutation = _block_permutation(self, epoch, int(block))
            here = blocks == block
            places[here] = start + permutation[positions[here] - start]
        return places


@dataclass(frozen=True, eq=False)
class StoredPlan:
    """The stored order, for evaluation: slot s holds the samples s·b … s·b + b − 1 of the manifest, the last slot padded.

    A slot has the same content and shape on any number of ranks, so the forward pass cannot tell how many there are.
    """

    shard_sizes: IntArray
    micro_batch_size: int

    def __post_init__(self) -> None:
        if self.num_samples == 0:
            raise PlanError("the split holds no samples; there is nothing to evaluate")

    @cached_property
    def num_samples(self) -> int:
        return int(self.shard_sizes.sum())

    @property
    def num_slots(self) -> int:
        return -(-self.num_samples // self.micro_batch_size)

    def slots_of(self, rank: int, world_size: int) -> range:
        """The slots that a rank evaluates: equally many on each rank, so that round i of all ranks is a stretch of the order.

        Those at or past `num_slots` are empty: padding alone, with weight 0.
        """
        rounds = -(-self.num_slots // world_size)
        return range(rank, rounds * world_size, world_size)

    @property
    def blocks_per_epoch(self) -> int:
        """Stretches of SHARDS_TOGETHER shards, which take the place that blocks have in training."""
        return -(-len(self.shard_sizes) // SHARDS_TOGETHER)

    def blocks_of(self, at: Coordinates) -> tuple[int, int]:
        """The first and the last block that the samples of a slot lie in; an empty slot counts as the last one that is not."""
        first = min(at.slot, self.num_slots - 1) * self.micro_batch_size
        places = np.array([first, min(first + self.micro_batch_size, self.num_samples) - 1])
        first_shard, last_shard = np.searchsorted(_starts(self.shard_sizes), places, side="right") - 1
        return int(first_shard) // SHARDS_TOGETHER, int(last_shard) // SHARDS_TOGETHER

    def shards_of_block(self, block: int) -> IntArray:
        """The shards of a block that are not empty."""
        shards = np.arange(len(self.shard_sizes), dtype=np.int64)[
            block * SHARDS_TOGETHER : (block + 1) * SHARDS_TOGETHER
        ]
        return shards[self.shard_sizes[shards] > 0]

    def micro_batch(self, at: Coordinates) -> MicroBatch:
        """The samples of slot `at.slot`; epoch and step do not matter."""
        places = at.slot * self.micro_batch_size + np.arange(self.micro_batch_size, dtype=np.int64)
        starts = _starts(self.shard_sizes)
        stored = ShardOrder(np.arange(len(self.shard_sizes), dtype=np.int64), starts, starts, None, starts)
        return _locate(places % self.num_samples, stored, places < self.num_samples)


@dataclass(frozen=True)
class ShardOrder:
    """An order of the shards: their permutation, where each begins in that order, and where each begins in the manifest.

    Under a sampling a shard is as long as what is drawn of it; `drawn` is the epoch's draw, and drawn_starts says where in it
    each shard begins.
    """

    permutation: IntArray
    starts: IntArray
    manifest_starts: IntArray
    drawn: IntArray | None
    drawn_starts: IntArray


def _locate(places: IntArray, order: ShardOrder, real: NDArray[np.bool_]) -> MicroBatch:
    """Turn places in the concatenation of ordered shards into (shard, member). Empty shards hold no place."""
    ordinal = np.searchsorted(order.starts, places, side="right") - 1
    shard_indices = order.permutation[ordinal]
    sample_indices = order.drawn_starts[shard_indices] + places - order.starts[ordinal]
    repeats = np.zeros_like(sample_indices)
    if order.drawn is not None:
        drawn_at, sample_indices = sample_indices, order.drawn[sample_indices]
        repeats = drawn_at - np.searchsorted(order.drawn, sample_indices, side="left")
    return MicroBatch(
        sample_indices=sample_indices,
        shard_indices=shard_indices,
        member_indices=sample_indices - order.manifest_starts[shard_indices],
        repeats=repeats,
        weights=real.astype(np.float32),
    )


def _starts(sizes: IntArray) -> IntArray:
    """Where each shard begins when they are laid end to end."""
    starts = np.zeros(len(sizes), dtype=np.int64)
    np.cumsum(sizes[:-1], out=starts[1:])
    return starts


def _keyed_permutation(length: int, key: int) -> IntArray:
    """A permutation of 0 … length − 1 that depends on the key alone.

    The raw output of Philox is promised to stay the same across numpy versions; `Generator.permutation` is not.
    """
    return np.argsort(np.random.Philox(key=key).random_raw(length), kind="stable").astype(np.int64, copy=False)


# A memo of two pure functions: neighbouring slots share an epoch and a block, and 2 MB of permutation take 20 ms to make.
@lru_cache(maxsize=4)
def _shard_order(plan: TrainPlan, epoch: int) -> ShardOrder:
    permutation = _keyed_permutation(len(plan.shard_sizes), derive(plan.seed, "shards", epoch))
    manifest_starts = drawn_starts = _starts(plan.shard_sizes)
    sizes, drawn = plan.shard_sizes, None
    if plan.sampling is not None:
        drawn = plan.sampling.draw(epoch)
        bounds = np.searchsorted(drawn, [*manifest_starts, plan.num_samples])
        drawn_starts, sizes = bounds[:-1], np.diff(bounds)
    return ShardOrder(permutation, _starts(sizes[permutation]), manifest_starts, drawn, drawn_starts)


@lru_cache(maxsize=4)
def _block_permutation(plan: TrainPlan, epoch: int, block: int) -> IntArray:
    length = min(plan.block_samples, plan.num_samples - block * plan.block_samples)
    return _keyed_permutation(length, derive(plan.seed, "block", epoch, block))
