"""What only a GPU can show. Without one these tests are skipped and say so."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from aplantida_dist.device_clock import DeviceClock
from aplantida_dist.job import Running
from aplantida_dist.metrics import Totals, compute
from aplantida_dist.step import run_step
from aplantida_dist.trainer import read_ahead
from tests.runs import compose, write_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_device(dataset_dir: Path, tmp_path: Path, precision: str) -> None:
    """Under sync_debug_mode "error" any host–device synchronisation in a step raises; the first step may still build things."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, precision=precision, num_workers=2)
    job = compose(config, tmp_path / "run").job
    job.model.train()
    running = Running(Totals(job.num_classes, job.world.device))
    batches = read_ahead(job, 0)
    run_step(job, batches, running, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2, 3):
            run_step(job, batches, running, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compute(running.totals.vector).num_samples == 4 * 16
    running.device_clock.catch_up()
    assert 0 < running.device_clock.busy_ns < 1.1 * running.spent_ns


def test_the_clock_of_a_device_counts_what_it_has_to_do() -> None:
    """Its stretches are as long as the work queued within them, also where the host was long gone; pauses do not count."""
    clock, device = DeviceClock(torch.device("cuda")), torch.device("cuda", 0)
    matrix = torch.randn(4096, 4096, device=device)
    matrix @ matrix
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(20):
        clock.begin()
        matrix @ matrix
        clock.end()
    worked_ns = clock.catch_up()
    spent_ns = 1e9 * (time.perf_counter() - started_s)
    assert 0.5 * worked_ns < clock.busy_ns < 1.1 * spent_ns
    time.sleep(0.2)
    clock.begin()
    matrix @ matrix
    clock.end()
    clock.catch_up()
    assert clock.busy_ns < 1.2 * spent_ns
