"""Lanes: the laws of the plan with them, and that a node reads only its own shards."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from aplantida_dist.batch_size import sizes_to_try
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.images import TrainTransform
from aplantida_dist.data.plan import Coordinates, MicroBatch, PlanError, TrainPlan
from aplantida_dist.data.sampling import ClassSampling
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from aplantida_dist.shards.writer import ShardLimits
from tests.laws import require_exact_resume, require_same_on_two_ranks, run_whole
from tests.pictures import build, fill
from tests.ranks import command_on_ranks, run_ranks
from tests.runs import write_config

NUM_NODES = 4
SIZES = {
    "one shard": [7],
    "even": [10, 10, 10],
    "uneven": [3, 17, 1, 8],
    "empty shards": [0, 5, 0, 0, 9, 0],
    "fewer samples than lanes": [1, 1],
    "one sample": [1],
    "a step and one": [25],
    "many small shards": [1] * 71,
}


def make_plan(sizes: list[int], *, num_lanes: int, micro_batch_size: int = 2, block_samples: int = 11) -> TrainPlan:
    """Twelve slots a step, which 1, 2, 3, 4, 6 and 12 lanes share."""
    return TrainPlan(
        np.array(sizes, dtype=np.int64), 3, 12 * micro_batch_size, micro_batch_size, block_samples, num_lanes=num_lanes
    )


def micro_batches(plan: TrainPlan, slots: range, epoch: int = 0) -> list[MicroBatch]:
    return [plan.micro_batch(Coordinates(epoch, step, slot)) for step in range(plan.steps_per_epoch) for slot in slots]


def real_of(found: list[MicroBatch]) -> list[int]:
    return [sample for slot in found for sample in slot.sample_indices[slot.weights > 0].tolist()]


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_every_sample_is_read_once(sizes: list[int], num_lanes: int, micro_batch_size: int) -> None:
    """Whatever the lanes and the ranks, also where they do not divide each other; a step is as large as without lanes."""
    plan = make_plan(sizes, num_lanes=num_lanes, micro_batch_size=micro_batch_size)
    plain = make_plan(sizes, num_lanes=1, micro_batch_size=micro_batch_size)
    assert plan.steps_per_epoch == plain.steps_per_epoch
    for world_size in (1, 2, 4, 5, 7):
        found = [real_of(micro_batches(plan, plan.slots_of(rank, world_size), epoch=1)) for rank in range(world_size)]
        assert sorted(sample for part in found for sample in part) == list(range(sum(sizes)))
    for step in range(plan.steps_per_epoch):
        slots = [plan.micro_batch(Coordinates(0, step, slot)) for slot in range(plan.slots_per_step + 2)]
        assert sum(int(slot.weights.sum()) for slot in slots) == plain.samples_in_step(step)
        padding = {sample for slot in slots for sample in slot.sample_indices[slot.weights == 0].tolist()}
        assert padding <= set(real_of(slots))


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_a_lane_is_a_stretch_of_the_permuted_shards(sizes: list[int], num_lanes: int) -> None:
    """Lanes hold equally many samples, to one, and a shard is shared by neighbours alone: n lanes cut at most n - 1 shards."""
    plan = make_plan(sizes, num_lanes=num_lanes)
    per_lane = plan.slots_per_step // num_lanes
    lanes = [micro_batches(plan, range(lane * per_lane, (lane + 1) * per_lane)) for lane in range(num_lanes)]
    lengths = [len(real_of(lane)) for lane in lanes]
    assert max(lengths) - min(lengths) <= 1
    touched = [
        {shard for slot in lane for shard in slot.shard_indices[slot.weights > 0].tolist()} for lane in lanes if lane
    ]
    assert sum(map(len, touched)) <= len([size for size in sizes if size]) + num_lanes - 1


def test_lanes_go_with_sampling() -> None:
    """As often as drawn, and no showing twice."""
    labels = np.array([0] * 40 + [1] * 20 + [2] * 11, dtype=np.int64)
    sampling = ClassSampling(labels, 0.0, 3)
    for num_lanes in (1, 3, 4):
        plan = TrainPlan(np.array([30, 0, 11, 30]), 3, 24, 2, 13, sampling, num_lanes)
        found = micro_batches(plan, range(plan.slots_per_step), epoch=2)
        shown = [slot.showing(i) for slot in found for i in np.flatnonzero(slot.weights)]
        assert sorted(showing[0] for showing in shown) == sampling.draw(2).tolist()
        assert len(set(shown)) == len(shown)


def test_one_lane_is_the_plan_without_lanes_and_several_are_another() -> None:
    """The order follows from the number of lanes; it is shuffled within each, and differs from epoch to epoch."""
    orders = {n: real_of(micro_batches(make_plan([50] * 8, num_lanes=n), range(12))) for n in (1, 2, 4)}
    plain = TrainPlan(np.array([50] * 8, dtype=np.int64), 3, 24, 2, 11)
    assert orders[1] == real_of(micro_batches(plain, range(12)))
    assert orders[1] != orders[2] != orders[4]
    first, second = (real_of(micro_batches(make_plan([50] * 8, num_lanes=4), range(12), epoch)) for epoch in (0, 1))
    assert first != second


def test_golden_order() -> None:
    """The order of every run ever trained on four lanes: this digest changes only with a new format of the plan."""
    plan = TrainPlan(np.array([100, 0, 37, 263, 1], dtype=np.int64), 1234, 32, 8, 64, num_lanes=4)
    order = np.array([real_of(micro_batches(plan, range(4), epoch)) for epoch in range(3)]).astype("<i8")
    assert (
        hashlib.sha256(order.tobytes()).hexdigest()
        == "b48c1aaf729616bf335f7e01a145c2e7bbc478f6bc819d97e04739cd07e62497"
    )


def test_what_lanes_cannot_share_is_refused(tmp_path: Path, dataset_dir: Path) -> None:
    """By the plan, and by the config in its own words; a size that is found by trying fits the lanes."""
    with pytest.raises(PlanError, match=r"a step has 12 micro-batches .* which 5 lanes cannot share evenly"):
        make_plan([40], num_lanes=5)
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    command = ["--config", config, "--run-dir", tmp_path / "run", "data.lanes=3"]
    (refused,) = command_on_ranks(1, "aplantida_dist.train", command, tmp_path)
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert "data.lanes: found 3, expected a divisor of the number of micro-batches of a step, 4" in refused.stderr
    assert sizes_to_try(24, 2, num_lanes=4) == [1, 2, 3, 6]


@pytest.mark.slow
@pytest.mark.parametrize("num_lanes", [2, 4])
def test_a_training_with_lanes_is_exact_and_elastic(dataset_dir: Path, tmp_path: Path, num_lanes: int) -> None:
    """Resumed in mid-epoch and at its ragged end bit for bit; the same samples and losses on two ranks."""
    config, lanes = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2), [f"data.lanes={num_lanes}"]
    whole = run_whole(config, lanes)
    for stop in (2, 4):
        require_exact_resume(whole, config, lanes, stop=stop)
    require_same_on_two_ranks(whole, config, lanes)


@pytest.mark.parametrize(("num_lanes", "share"), [(1, 1.0), (4, 0.25), (16, 0.25)])
@pytest.mark.parametrize("ranks_a_node", [1, 2, 4])
def test_a_node_touches_the_shards_of_its_lanes(num_lanes: int, share: float, ranks_a_node: int) -> None:
    """400 shards on 4 nodes: a quarter of them each, and those that lie on a cut; the slots of a node's ranks are neighbours."""
    plan = TrainPlan(np.full(400, 100, dtype=np.int64), 0, 512, 16, 2**18, num_lanes=num_lanes)
    for epoch in (0, 1):
        for node in range(NUM_NODES):
            ranks = range(node * ranks_a_node, (node + 1) * ranks_a_node)
            slots = [slot for rank in ranks for slot in plan.slots_of(rank, NUM_NODES * ranks_a_node)]
            assert slots == list(range(slots[0], slots[-1] + 1))
            found = micro_batches(plan, range(slots[0], slots[-1] + 1), epoch)
            touched = np.unique(np.concatenate([slot.shard_indices for slot in found]))
            assert share <= len(touched) / 400 <= share + 1 / 400


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_the_plan_tells_the_shards_of_a_block(sizes: list[int], num_lanes: int) -> None:
    """For any slots: those that their samples lie in, no others, block by block, each once and in the order of the epoch."""
    plan = make_plan(sizes, num_lanes=num_lanes)
    for slots in (range(12), range(3, 6), range(11, 14)):
        read: list[set[int]] = [set() for _ in range(plan.blocks_per_epoch)]
        lanes = {plan.lane_of(slot) for slot in slots}
        # A block is whole only together with the other slots of its lanes.
        for slot in (slot for slot in range(12) if plan.lane_of(slot) in lanes):
            for step in range(plan.steps_per_epoch):
                found = plan.micro_batch(Coordinates(1, step, slot))
                within_lane = (step * plan.slots_per_lane + slot % plan.slots_per_lane) * plan.micro_batch_size
                for i in np.flatnonzero(found.weights):
                    read[(within_lane + int(i)) // plan.lane_block_samples].add(int(found.shard_indices[i]))
        blocks = range(plan.blocks_per_epoch, 2 * plan.blocks_per_epoch)
        told = [plan.shards_of_block(block, slots=slots).tolist() for block in blocks]
        assert [set(shards) for shards in told] == read
        assert all(len(set(shards)) == len(shards) for shards in told)
        assert plan.shards_of_block(blocks[0]).tolist() == plan.shards_of_block(blocks[0], slots=range(12)).tolist()


def read_as_node(dataset: Path, num_lanes: int) -> tuple[list[int], int]:
    """Read an epoch as the only rank of a node; what was read, and the bytes of the shards that were opened, which the plan told."""
    rank, split = int(os.environ["RANK"]), open_dataset(dataset).open_split("train")
    plan = TrainPlan(split.shard_sizes, 0, 32, 4, 2**18, num_lanes=num_lanes)
    source = MicroBatches(split, plan, TrainTransform(16, (0.3, 1.0), (1.0, 1.0), 0.5, 0.0, "bilinear"), seed=0)
    coordinates = [
        Coordinates(0, step, slot) for step in range(plan.steps_per_epoch) for slot in plan.slots_of(rank, NUM_NODES)
    ]
    batches = list(stream(source, coordinates, reading=Reading(0, 1, pin_memory=False)))
    identities = [int(i) for batch in batches for i in batch.identities[batch.weights > 0]]
    # The stream keeps shards open.
    opened = {path.resolve() for path in Path("/proc/self/fd").iterdir()}
    shards = {path for path in opened if path.is_relative_to(dataset.resolve())}
    slots = plan.slots_of(rank, NUM_NODES)
    told = {int(i) for block in range(plan.blocks_per_epoch) for i in plan.shards_of_block(block, slots=slots)}
    assert shards == {split.shard_path(i).resolve() for i in told} or num_lanes == 1
    return identities, sum(path.stat().st_size for path in shards)


def test_four_processes_playing_nodes_read_a_quarter_each(tmp_path: Path) -> None:
    """What the system says was opened, on 4 nodes: every shard with one lane, about a quarter of the bytes with four."""
    for split, first, count in (("train", 0, 240), ("val", 1000, 4)):
        fill(tmp_path / "pictures" / split, {"Acer": count // 2, "Betula": count // 2}, first=first)
    dataset = tmp_path / "dataset"
    build(tmp_path / "pictures", dataset, limits=ShardLimits(num_samples=6))
    split = open_dataset(dataset).open_split("train")
    whole_bytes = sum(shard.bytes for shard in split.manifest.shards)
    for num_lanes, least, most in ((1, 0.7, 1.0), (4, 0.2, 0.28)):
        nodes = run_ranks(NUM_NODES, read_as_node, dataset, num_lanes)
        assert sorted(i for identities, _ in nodes for i in identities) == sorted(split.identities.tolist())
        shares = [num_bytes / whole_bytes for _, num_bytes in nodes]
        assert all(least <= share <= most for share in shares), shares
