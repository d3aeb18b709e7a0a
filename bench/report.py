"""The cost of W&B online beside the steps of a training: with a server that answers, and with one that falls silent."""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from aplantida_dist.report import NullReport, Report, open_report
from aplantida_dist.wandb_report import Limits, WandbRun
from aplantida_dist.world import open_world
from bench.finding import Finding, Goal, compare, interleave
from bench.loop import SMALL, STEPS_A_BLOCK, Load, OurLoop, make_loops
from tests.ranks import run_ranks
from tests.wandb_beside import wandb_beside
from tests.wandb_process import row_of
from tests.wandb_server import Fault

LIMITS = Limits(init_s=15.0, finish_s=5.0, grace_s=15.0)
SERVERS: tuple[tuple[str, Fault], ...] = (("answers", "none"), ("falls silent", "hang"))
WORK_GOAL, SPEED_GOAL = Goal("at most", 0.01), Goal("at most", 1.01)


@dataclass(frozen=True)
class Block:
    """A row handed over, or none, and STEPS_A_BLOCK steps; milliseconds.

    steps_wall_ms: of each step; steps_cpu_ms: of all, in their thread; threads_cpu_ms: of the process's other threads, the
    report's and W&B's; service_cpu_ms: of W&B's own process.
    """

    steps_wall_ms: list[float]
    steps_cpu_ms: float
    threads_cpu_ms: float
    service_cpu_ms: float


def bench_report(load: Load = SMALL, *, repeats: int) -> list[Finding]:
    """Compare what a row costs with the steps around it, and the time of steps right after one with that of others, in turns.

    A row every 2 · STEPS_A_BLOCK steps is far more often than one an epoch, so its share is larger here. What takes the
    interpreter's lock from the training is the CPU time of the threads beside it; W&B's own process takes a core, if all are busy.
    """
    findings = []
    for how, fault in SERVERS:
        with tempfile.TemporaryDirectory() as folder:
            ((shown, alone),) = run_ranks(1, _measure, load, fault, Path(folder), 5 * repeats)
        blocks = [*shown, *alone]
        steps_ms = sum(block.steps_cpu_ms for block in blocks) / len(shown)
        for what, name in (("threads", "threads_cpu_ms"), ("process", "service_cpu_ms")):
            work_ms = sum(getattr(block, name) for block in blocks) / len(shown)
            findings.append(
                compare(
                    f"report: W&B's {what} for a row, its server {how}",
                    "CPU ms",
                    [work_ms],
                    [steps_ms],
                    peer_name=f"{2 * STEPS_A_BLOCK} steps",
                    goal=WORK_GOAL,
                )
            )
        after_row, other = ([step for block in series for step in block.steps_wall_ms] for series in (shown, alone))
        what = f"report: a step after a row to W&B, its server {how}"
        findings.append(compare(what, "wall ms", after_row, other, peer_name="other steps", goal=SPEED_GOAL))
    return findings


def _measure(load: Load, fault: Fault, folder: Path, repeats: int) -> list[list[Block]]:
    """The blocks after a row, and those without, beside a server that begins to fail when the run is open."""
    world = open_world(precision="fp32", timeout_s=60)
    loop, _ = make_loops(load, world=world)
    loop.step()  # the first one makes the optimizer's state
    with wandb_beside(folder) as server:
        report = _open(folder)
        server.fail(fault)
        services, epochs = _services(), count(1)
        blocks = interleave(
            [
                lambda _: _run_block(loop, report, next(epochs), services),
                lambda _: _run_block(loop, NullReport(), 1, services),
            ],
            repeats=repeats,
        )
        report.finish(exit_code=0)
    return blocks


def _run_block(loop: OurLoop, report: Report, epoch: int, services: list[int]) -> Block:
    row = row_of(epoch)
    all_ms, service_ms = 1e3 * time.process_time(), _cpu_ms_of(services)
    report.show(row, best=row)
    steps_cpu_ms, steps_wall_ms = 0.0, []
    for _ in range(STEPS_A_BLOCK):
        thread_s, started_s = time.thread_time(), time.perf_counter()
        loop.step()
        steps_wall_ms.append(1e3 * (time.perf_counter() - started_s))
        steps_cpu_ms += 1e3 * (time.thread_time() - thread_s)
    # On the CPU one thread does all of a step.
    threads_cpu_ms = 1e3 * time.process_time() - all_ms - steps_cpu_ms
    return Block(steps_wall_ms, steps_cpu_ms, threads_cpu_ms, _cpu_ms_of(services) - service_ms)


def _open(folder: Path) -> Report:
    run = WandbRun("bench", "bench", [], "bench", folder, {})
    warn = partial(print, "bench: report:", file=sys.stderr)
    return open_report(run, mode="online", rows=(), best=None, warn=warn, limits=LIMITS)


def _services() -> list[int]:
    """W&B's own processes below this one."""
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    pids = [int(pid) for text in lists for pid in text.split()]
    return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == "wandb-core"]


def _cpu_ms_of(pids: list[int]) -> float:
    """The CPU time of other processes so far, by the clock that clock_getcpuclockid(3) makes of each id."""
    return sum(1e3 * time.clock_gettime((~pid << 3) | 2) for pid in pids)
