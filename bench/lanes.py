"""What each of several nodes fetches in an epoch, with a lane for each and without: counted from the plan."""

from __future__ import annotations

import numpy as np

from aplantida_dist.data.plan import TrainPlan
from bench.finding import Finding, Goal, compare

NUM_NODES = 4
SHARD_SAMPLES = np.full(401, 2_500, dtype=np.int64)
SHARD_BYTES = 250_000_000
BLOCK_SAMPLES = 2**18
GLOBAL_BATCH_SIZE = 2048
MICRO_BATCH_SIZE = 64
GOAL = Goal("at most", 1.02 / NUM_NODES)


def bench_lanes(*, repeats: int) -> list[Finding]:
    """A million samples in 401 shards, in blocks of 262,144: the gigabytes of the node that fetches most, each repeat another epoch."""
    ours, peer = ([_most_fetched_gb(epoch, num_lanes=lanes) for epoch in range(repeats)] for lanes in (NUM_NODES, 1))
    what = f"lanes: fetched by each of {NUM_NODES} nodes, of {len(SHARD_SAMPLES) * SHARD_BYTES / 1e9:,.0f} GB in {len(SHARD_SAMPLES)} shards"
    return [compare(what, "GB", ours, peer, peer_name="one lane", goal=GOAL)]


def _most_fetched_gb(epoch: int, *, num_lanes: int) -> float:
    """A shard on the edge of two blocks is fetched once: they follow each other."""
    plan = TrainPlan(
        SHARD_SAMPLES, 0, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, BLOCK_SAMPLES, sampling=None, num_lanes=num_lanes
    )
    fetched = [
        {
            shard
            for block in range(plan.blocks_per_epoch)
            for shard in plan.shards_of_block(
                epoch * plan.blocks_per_epoch + block, slots=plan.slots_of(node, NUM_NODES)
            ).tolist()
        }
        for node in range(NUM_NODES)
    ]
    return max(map(len, fetched)) * SHARD_BYTES / 1e9
