"""What only a GPU can show. Without one these tests are skipped and say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aplantida_dist.metrics import Totals, compute
from aplantida_dist.trainer import Running, read_ahead, run_step
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
