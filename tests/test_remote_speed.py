"""How fast a link has to be: with the next block on its way, a model does not wait for one that brings half as much again as it reads."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from aplantida_dist.data.address import place_of
from aplantida_dist.data.cache import Cache
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.images import EvaluationTransform
from aplantida_dist.data.plan import Coordinates, TrainPlan
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from aplantida_dist.shards.writer import ShardLimits
from tests.pictures import build, draw, put
from tests.shard_server import serve

pytestmark = pytest.mark.slow

NUM_SAMPLES, NUM_EPOCHS, MICRO_BATCH_SIZE = 480, 2, 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """480 pictures of 15 kB in 48 shards, of which a block of 80 samples takes 8 to 9."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(NUM_SAMPLES):
        put(folder / "train" / f"class {number % 4}" / f"{number}.jpg", draw(number, width=120, height=120))
    put(folder / "val" / "class 0" / "val.jpg", draw(NUM_SAMPLES))
    build(folder, folder.parent / "speed", limits=ShardLimits(num_samples=10), near_distance=None)
    return folder.parent / "speed"


@pytest.mark.parametrize(("share", "step_s", "least", "most"), [(1.5, 0.25, 0.0, 0.05), (0.5, 0.1, 0.3, 1.0)])
def test_a_model_waits_for_a_slow_link_alone(
    share: float, step_s: float, least: float, most: float, dataset: Path, tmp_path: Path
) -> None:
    """On a cache of three eighths of the dataset, so that each epoch comes anew; counted from the second epoch on, since nobody could bring the first block ahead.

    The model sleeps for `step_s` a micro-batch, so that a busy machine changes little of what is measured.
    """
    num_bytes = sum(path.stat().st_size for path in dataset.glob("train/shard-*"))
    num_steps = NUM_SAMPLES // MICRO_BATCH_SIZE
    with serve(dataset) as server:
        cache = Cache(tmp_path / "cache", max_bytes=num_bytes * 3 // 8, patience_s=30.0)
        split = open_dataset(place_of(server.url), cache=cache).open_split("train")
        plan = TrainPlan(split.shard_sizes, 0, MICRO_BATCH_SIZE, MICRO_BATCH_SIZE, block_samples=80)
        micro_batches = MicroBatches(split, plan, EvaluationTransform(32, 1.0, "bicubic"), seed=0)
        slots = [Coordinates(epoch, step, 0) for epoch in range(NUM_EPOCHS) for step in range(num_steps)]
        server.bytes_per_s = share * num_bytes / (num_steps * step_s)
        batches = stream(micro_batches, slots, reading=Reading(1, 2, pin_memory=False), num_epochs=NUM_EPOCHS)
        waited_s: list[float] = []
        for _ in slots:
            asked_s = time.monotonic()
            next(batches)
            waited_s.append(time.monotonic() - asked_s)
            time.sleep(step_s)
        steady_s = sum(waited_s[num_steps:])
        wait_fraction = steady_s / (steady_s + (NUM_EPOCHS - 1) * num_steps * step_s)
        brought = server.num_bytes / num_bytes
    print(f"link {share} x: waits {100 * wait_fraction:.1f} %, {brought:.2f} datasets came in {NUM_EPOCHS} epochs")
    assert brought > 0.6 * NUM_EPOCHS
    assert least <= wait_fraction <= most
