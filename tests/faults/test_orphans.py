"""Orphans: ranks whose launcher is killed while they load torch, before they have met."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Fired
from tests.faults.launched import launch
from tests.runs import write_config

ENDS_WITHIN_S = 15.0


def is_loading_torch(pid: int) -> bool:
    """Whether a process has the first of torch's libraries in memory."""
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


@pytest.mark.fault(
    what="SIGKILL of the launcher's group while its ranks load torch",
    how="`accelerate launch` over two ranks, killed when both have the first of torch's libraries in memory",
    holds="both ranks are gone within 15 s and the port is free; they waited for a launcher that was gone",
)
def test_ranks_that_were_starting_end(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """They have asked to end with it before anything slow."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    run = launch(2, ["--config", config, "--run-dir", tmp_path / "run"], tmp_path / "output")
    while len([rank for rank in run.ranks() if is_loading_torch(rank)]) < 2:
        assert run.is_alive(), run.said()
        time.sleep(0.01)
    os.killpg(run.launcher.pid, signal.SIGKILL)
    seconds = run.wait_until_gone(ENDS_WITHIN_S)
    assert not (tmp_path / "run").exists(), "they had met: this is no start-up"
    fired(f"gone in {seconds:.1f} s")
