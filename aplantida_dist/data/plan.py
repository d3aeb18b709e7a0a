"""The plan: which samples form which slot of which step, a pure function of (manifest, seed, epoch, batch sizes, lanes) alone."""

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
    Shards are permuted by a key of (seed, epoch); their concatenation is cut into `num_lanes` lanes, and the lanes, side by side,
    into blocks, each permuted by its own key, so that `block_samples` of all lanes together are shuffled at a time. A step is
    `global_batch_size` samples in `slots_per_step` slots of `micro_batch_size`; the last step of an epoch may hold fewer. Nothing
    here knows of ranks but `slots_of`.

    A lane fills its own slots, equally many and next to each other in every step, so ranks whose slots are those of some lanes
    read the shards of these alone. Lanes are cut between samples: they hold equally many, to one, and end in the same step.

    shard_sizes: int64 [shards], the samples of each shard in the manifest's order; zeros are allowed.
    """

    shard_sizes: IntArray
    seed: int
    global_batch_size: int
    micro_batch_size: int
    block_samples: int
    sampling: ClassSampling | None = None
    num_lanes: int = 1

    def __post_init__(self) -> None:
        if self.num_samples == 0:
            raise PlanError("the train split holds no samples; an epoch needs at least one")
        if self.global_batch_size % self.micro_batch_size:
            raise PlanError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}; "
                "choose one that is"
            )
        if self.slots_per_step % self.num_lanes:
            raise PlanError(
                f"a step has {self.slots_per_step} micro-batches (global_batch_size / micro_batch_size), which {self.num_lanes} lanes "
                "cannot share evenly; choose lanes that divide them"
            )

    @cached_property
    def num_samples(self) -> int:
        return int(self.shard_sizes.sum())

    @property
    def slots_per_step(self) -> int:
        return self.global_batch_size // self.micro_batch_size

    @property
    def slots_per_lane(self) -> int:
        return self.slots_per_step // self.num_lanes

    @property
    def lane_block_samples(self) -> int:
        return -(-self.block_samples // self.num_lanes)

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
        """The samples of one slot. An empty slot repeats samples of its step with weight 0: of its lane, or of the first where that has none."""
        lane = self.lane_of(at.slot)
        first = (at.slot - lane * self.slots_per_lane) * self.micro_batch_size
        within_lane = first + np.arange(self.micro_batch_size, dtype=np.int64)
        real = within_lane < self._samples_in_lane(at.step_in_epoch, lane)
        source = lane if self._samples_in_lane(at.step_in_epoch, lane) else 0
        before = at.step_in_epoch * self.slots_per_lane * self.micro_batch_size
        positions = before + within_lane % self._samples_in_lane(at.step_in_epoch, source)
        return _locate(self._shuffle(at.epoch, source, positions), _shard_order(self, at.epoch), real)

    def lane_of(self, slot: int) -> int:
        """The lane whose samples a slot holds; slots past `slots_per_step` are padded from the last."""
        return min(slot // self.slots_per_lane, self.num_lanes - 1)

    def _samples_in_lane(self, step_in_epoch: int, lane: int) -> int:
        """The samples of a step that a lane gives; the lanes share a step that is not whole evenly, the first ones a sample more."""
        whole, rest = divmod(self.samples_in_step(step_in_epoch), self.num_lanes)
        return whole + (lane < rest)

    def lane_start(self, lane: int) -> int:
        """Where a lane begins in the concatenation of the permuted shards; the number of lanes stands for the end of the last."""
        last = self.steps_per_epoch - 1
        before_last = last * self.slots_per_lane * self.micro_batch_size
        whole, rest = divmod(self.samples_in_step(last), self.num_lanes)
        return lane * (before_last + whole) + min(lane, rest)

    @property
    def blocks_per_epoch(self) -> int:
        """The blocks of an epoch, which all lanes go through side by side; the first lane is the longest."""
        return -(-self.lane_start(1) // self.lane_block_samples)

    def blocks_of(self, at: Coordinates) -> tuple[int, int]:
        """The first and the last block, counted over all epochs, that the samples of a step are drawn from."""
        first = at.step_in_epoch * self.slots_per_lane * self.micro_batch_size
        last = first + self._samples_in_lane(at.step_in_epoch, 0) - 1
        before = at.epoch * self.blocks_per_epoch
        return before + first // self.lane_block_samples, before + last // self.lane_block_samples

    def shards_of_block(self, block: int, *, slots: range | None = None) -> IntArray:
        """The shards that the samples of a block, counted over all epochs, lie in, each once, in their order in the epoch: int64.

        Those of all lanes, or of the lanes of some slots: what a node reads is told by the slots of all its ranks. Left out is the
        padding of a lane that has no sample in the last step: it comes from the first lane.
        """
        epoch, in_epoch = divmod(block, self.blocks_per_epoch)
        permutation, bounds = self.shard_bounds_of_blocks(epoch, slots=slots)
        ordinals = [np.arange(firsts[in_epoch], ends[in_epoch]) for firsts, ends in bounds]
        shards: IntArray = permutation[np.unique(np.concatenate(ordinals))]
        return shards

    def shard_bounds_of_blocks(
        self, epoch: int, *, slots: range | None = None
    ) -> tuple[IntArray, list[tuple[IntArray, IntArray]]]:
        """The epoch's order of the shards that are not empty, and where in it those of each block begin and end, for each lane of these slots."""
        order = _shard_order(self, epoch)
        sizes = np.diff(order.starts, append=self.num_samples)
        starts = order.starts[sizes > 0]
        bounds = []
        for lane in range(self.num_lanes) if slots is None else sorted({self.lane_of(slot) for slot in slots}):
            lane_end = self.lane_start(lane + 1)
            block_starts = (
                self.lane_start(lane) + np.arange(self.blocks_per_epoch, dtype=np.int64) * self.lane_block_samples
            )
            block_ends = np.minimum(block_starts + self.lane_block_samples, lane_end)
            ends = np.searchsorted(starts, block_ends, side="left")
            # A lane may be a sample shorter than the first one, and so lack the last block.
            firsts = np.where(block_starts < lane_end, np.searchsorted(starts, block_starts, side="right") - 1, ends)
            bounds.append((firsts, ends))
        return order.permutation[sizes > 0], bounds

    def _shuffle(self, epoch: int, lane: int, positions: IntArray) -> IntArray:
        """Map positions of a lane to places in the concatenation of the permuted shards, block by block."""
        places = np.empty_like(positions)
        blocks = positions // self.lane_block_samples
        for block in np.unique(blocks):
            start = int(block) * self.lane_block_samples
            permutation = _block_permutations(self, epoch, int(block))[lane]
            here = blocks == block
            places[here] = self.lane_start(lane) + start + permutation[positions[here] - start]
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
def _block_permutations(plan: TrainPlan, epoch: int, block: int) -> tuple[IntArray, ...]:
    """One for each lane: they go through their blocks side by side."""
    start, size = block * plan.lane_block_samples, plan.lane_block_samples
    return tuple(
        _keyed_permutation(
            max(0, min(size, plan.lane_start(lane + 1) - plan.lane_start(lane) - start)),
            derive(plan.seed, "block", epoch, block * plan.num_lanes + lane),
        )
        for lane in range(plan.num_lanes)
    )
