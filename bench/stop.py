"""The cost of asking all ranks at every step whether one was told to stop, beside the step itself."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from aplantida_dist.world import open_world
from bench.finding import Finding, Goal, compare, cpu_ms_of
from bench.loop import SMALL, Load, OurLoop, make_loops
from tests.ranks import run_ranks

STEPS_A_REPEAT = 6
NUM_POLLS = 200
"""In a row, for the CPU time that a poll takes with what gloo's threads do for it."""
GOAL = Goal("at most", 0.002)


@dataclass(frozen=True)
class Cost:
    """What rank 0 spent, in milliseconds: wall time on each poll and on the step after it, CPU time on each step and on a poll."""

    polls_wall_ms: list[float]
    steps_wall_ms: list[float]
    steps_cpu_ms: list[float]
    polls_cpu_ms: list[float]


def bench_stop(load: Load = SMALL, *, repeats: int) -> list[Finding]:
    """Poll before every step, as the trainer does, on one process and on two ranks over gloo.

    Nobody waits at a poll as long as the question of the one before was answered in the step between them: the wall time shows it.
    """
    findings = []
    for world_size, what in ((1, "1 process"), (2, "2 gloo ranks")):
        cost, *_ = run_ranks(world_size, _measure, load, STEPS_A_REPEAT * repeats)
        name = f"stop: the poll of a step, {what}"
        findings += [
            compare(name, "CPU ms", cost.polls_cpu_ms, cost.steps_cpu_ms, peer_name="the step", goal=GOAL),
            compare(name, "wall ms", cost.polls_wall_ms, cost.steps_wall_ms, peer_name="the step", goal=GOAL),
        ]
    return findings


def _measure(load: Load, num_steps: int) -> Cost:
    """Collective. The cost on this rank."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    world = open_world(precision="fp32", timeout_s=60)
    loop, _ = make_loops(load, world=world)
    poll_across_ranks = loop.job.interruption.poll_across_ranks
    poll_across_ranks()
    loop.step()  # the first one makes the optimizer's state
    cost = Cost([], [], [], [])
    for _ in range(num_steps):
        _poll_and_step(loop, cost)
    cost.polls_cpu_ms.extend(cpu_ms_of(lambda: _poll_often(loop))(0) / NUM_POLLS for _ in range(num_steps))
    world.close()
    return cost


def _poll_and_step(loop: OurLoop, cost: Cost) -> None:
    started_s = time.perf_counter()
    loop.job.interruption.poll_across_ranks()
    polled_s, polled_cpu_s = time.perf_counter(), time.process_time()
    loop.step()
    cost.polls_wall_ms.append(1e3 * (polled_s - started_s))
    cost.steps_wall_ms.append(1e3 * (time.perf_counter() - polled_s))
    cost.steps_cpu_ms.append(1e3 * (time.process_time() - polled_cpu_s))


def _poll_often(loop: OurLoop) -> None:
    for _ in range(NUM_POLLS):
        loop.job.interruption.poll_across_ranks()
