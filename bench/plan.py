"""The cost of planning a billion samples: no peer does it, so the numbers stand against their own goals."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.data.plan import Coordinates, TrainPlan
from bench.finding import Finding, Goal, alone

NUM_SAMPLES = 10**9
NUM_SHARDS = 100_000
GLOBAL_BATCH_SIZE = 4096
MICRO_BATCH_SIZE = 64
BLOCK_SAMPLES = 2**18
NUM_SLOTS = 1000
SEED = 0


def bench_plan(*, repeats: int) -> list[Finding]:
    """Build and jump to the middle of an epoch; slots after that; the memory of both, measured apart from the clock."""
    sizes = np.full(NUM_SHARDS, NUM_SAMPLES // NUM_SHARDS, dtype=np.int64)
    jumps_ms, slots_us = zip(*(_timed(sizes, seed=SEED + repeat) for repeat in range(repeats)), strict=True)
    what = f"plan: {NUM_SAMPLES // 10**9} billion samples, {NUM_SHARDS:,} shards"
    return [
        alone(f"{what}: build, jump to the middle", "CPU ms", jumps_ms, goal=Goal("at most", 100.0)),
        alone(f"{what}: a slot of {MICRO_BATCH_SIZE} there", "CPU µs", slots_us, goal=Goal("at most", 55.0)),
        alone(f"{what}: peak memory", "MB", [_peak_bytes(sizes) / 1e6], goal=Goal("at most", 50.0)),
    ]


def _timed(sizes: NDArray[np.int64], *, seed: int) -> tuple[float, float]:
    """CPU milliseconds until the middle slot is known, then CPU microseconds a slot. Another seed is another plan."""
    started_s = time.process_time()
    plan = _jump_to_the_middle(sizes, seed=seed)
    jumped_s = time.process_time()
    step = plan.steps_per_epoch // 2
    for number in range(NUM_SLOTS):
        plan.micro_batch(Coordinates(0, step + number // plan.slots_per_step, number % plan.slots_per_step))
    ended_s = time.process_time()
    return 1e3 * (jumped_s - started_s), 1e6 * (ended_s - jumped_s) / NUM_SLOTS


def _jump_to_the_middle(sizes: NDArray[np.int64], *, seed: int) -> TrainPlan:
    plan = TrainPlan(sizes, seed, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, BLOCK_SAMPLES)
    plan.micro_batch(Coordinates(0, plan.steps_per_epoch // 2, 0))
    return plan


def _peak_bytes(sizes: NDArray[np.int64]) -> int:
    """The most memory that a plan and its jump hold at once, with the manifest's counts."""
    tracemalloc.start()
    try:
        _jump_to_the_middle(sizes.copy(), seed=SEED - 1)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
