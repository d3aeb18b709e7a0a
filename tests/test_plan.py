"""The plan: laws 1 and 2 as arithmetic."""

from __future__ import annotations

import hashlib
import time
import tracemalloc

import numpy as np
import pytest

from aplantida_dist.data.plan import Coordinates, PlanError, StoredPlan, TrainPlan

SIZES = {
    "one shard": [7],
    "even": [10, 10, 10],
    "uneven": [3, 17, 1, 8],
    "empty shards": [0, 5, 0, 0, 9, 0],
    "fewer samples than ranks": [1, 1],
    "one sample": [1],
    "many small shards": [1] * 23,
}


def make_plan(
    sizes: list[int], *, global_batch_size: int = 8, micro_batch_size: int = 2, block_samples: int = 11, seed: int = 3
) -> TrainPlan:
    return TrainPlan(np.array(sizes, dtype=np.int64), seed, global_batch_size, micro_batch_size, block_samples)


def real_samples(plan: TrainPlan, epoch: int, rank: int, world_size: int) -> list[int]:
    """The samples that a rank reads with weight 1 in an epoch."""
    found: list[int] = []
    for step in range(plan.steps_per_epoch):
        for slot in plan.slots_of(rank, world_size):
            micro_batch = plan.micro_batch(Coordinates(epoch, step, slot))
            found += micro_batch.sample_indices[micro_batch.weights > 0].tolist()
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize(("global_batch_size", "micro_batch_size"), [(1, 1), (8, 2), (6, 6), (12, 3)])
def test_ranks_together_read_every_sample_once(
    sizes: list[int], world_size: int, global_batch_size: int, micro_batch_size: int
) -> None:
    """A plan partitions the dataset, whatever the ranks, shards and batch sizes."""
    plan = make_plan(sizes, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size)
    for epoch in (0, 1):
        found = [sample for rank in range(world_size) for sample in real_samples(plan, epoch, rank, world_size)]
        assert sorted(found) == list(range(sum(sizes)))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_what_a_slot_holds_does_not_depend_on_the_world(sizes: list[int]) -> None:
    """Ranks take whole slots in order, and every rank takes equally many."""
    plan = make_plan(sizes)
    for world_size in range(1, 9):
        slots = [list(plan.slots_of(rank, world_size)) for rank in range(world_size)]
        assert [slot for part in slots for slot in part][: plan.slots_per_step] == list(range(plan.slots_per_step))
        assert len({len(part) for part in slots}) == 1


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_padding_repeats_samples_of_its_own_step_with_weight_zero(sizes: list[int]) -> None:
    """An empty place holds a real sample of the step, so that it can be decoded and pollutes nothing."""
    plan = make_plan(sizes)
    for step in range(plan.steps_per_epoch):
        slots = [plan.micro_batch(Coordinates(0, step, slot)) for slot in range(plan.slots_per_step + 2)]
        real = {s for slot in slots for s in slot.sample_indices[slot.weights > 0].tolist()}
        padding = {s for slot in slots for s in slot.sample_indices[slot.weights == 0].tolist()}
        assert len(real) == plan.samples_in_step(step)
        assert padding <= real
        assert sum(float(slot.weights.sum()) for slot in slots) == plan.samples_in_step(step)


def test_places_agree_with_the_manifest_order() -> None:
    """(shard, member) and the sample index name the same sample, and empty shards hold none."""
    sizes = [0, 5, 0, 9, 1, 0]
    plan = make_plan(sizes)
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    for step in range(plan.steps_per_epoch):
        micro_batch = plan.micro_batch(Coordinates(2, step, 0))
        assert (micro_batch.sample_indices == starts[micro_batch.shard_indices] + micro_batch.member_indices).all()
        assert (micro_batch.member_indices < np.array(sizes)[micro_batch.shard_indices]).all()


def test_epochs_and_seeds_give_other_orders_and_the_same_ones_again() -> None:
    """Order is a function of (seed, epoch)."""
    sizes = [40, 60, 28]
    orders = [real_samples(make_plan(sizes, seed=seed), epoch, 0, 1) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == real_samples(make_plan(sizes, seed=0), 0, 0, 1)


def test_the_order_is_shuffled_through_the_whole_block() -> None:
    """A block mixes the shards in it: neighbours in an epoch are seldom neighbours in a shard."""
    plan = make_plan([500] * 4, global_batch_size=50, micro_batch_size=50, block_samples=10_000)
    order = np.array(real_samples(plan, 0, 0, 1))
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.01
    assert abs(np.corrcoef(np.arange(2000), order)[0, 1]) < 0.1


def test_golden_order() -> None:
    """The order of every run ever trained: this digest changes only with a new format of the plan."""
    plan = make_plan([100, 0, 37, 263, 1], global_batch_size=32, micro_batch_size=8, block_samples=64, seed=1234)
    slots = [
        plan.micro_batch(Coordinates(epoch, step, slot))
        for epoch in range(3)
        for step in range(plan.steps_per_epoch)
        for slot in range(5)
    ]
    stream = np.concatenate([slot.sample_indices for slot in slots]).astype("<i8").tobytes()
    assert hashlib.sha256(stream).hexdigest() == "078abc519d5996b363eef7941070331923bcd9346dd35a07087aaaca0a0a1238"


def test_a_billion_samples_cost_little() -> None:
    """100,000 shards: built, and a slot in the middle found, within 100 ms of processor time and 50 MB."""
    sizes = np.full(100_000, 10_000, dtype=np.int64)

    def jump() -> float:
        started_s = time.process_time()
        plan = TrainPlan(sizes, 0, 4096, 64, 262_144)
        plan.micro_batch(Coordinates(1, plan.steps_per_epoch // 2, 17))
        return time.process_time() - started_s

    assert min(jump() for _ in range(5)) < 0.1
    tracemalloc.start()
    jump()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 50e6


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("micro_batch_size", [1, 3, 64])
def test_evaluation_reads_every_sample_once_in_stored_order(
    sizes: list[int], world_size: int, micro_batch_size: int
) -> None:
    """Rounds of all ranks, laid end to end, are the manifest's order; every rank has as many rounds."""
    plan = StoredPlan(np.array(sizes, dtype=np.int64), micro_batch_size)
    slots = [plan.slots_of(rank, world_size) for rank in range(world_size)]
    assert len({len(part) for part in slots}) == 1
    found: list[int] = []
    for round_of_slots in zip(*slots, strict=True):
        for slot in round_of_slots:
            micro_batch = plan.micro_batch(Coordinates(0, 0, slot))
            assert len(micro_batch.weights) == micro_batch_size
            found += micro_batch.sample_indices[micro_batch.weights > 0].tolist()
    assert found == list(range(sum(sizes)))


def test_what_cannot_be_planned_is_refused() -> None:
    """No samples, or micro-batches that do not fill a step."""
    with pytest.raises(PlanError, match="no samples"):
        make_plan([0, 0])
    with pytest.raises(PlanError, match="global_batch_size 10 is not a multiple of micro_batch_size 4"):
        make_plan([5], global_batch_size=10, micro_batch_size=4)
    with pytest.raises(PlanError, match="no samples"):
        StoredPlan(np.array([0]), 4)
