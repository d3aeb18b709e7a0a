"""A run of the real train command under `accelerate launch`, to be broken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.forked import children_of, is_free
from tests.ranks import free_port
from tests.test_resume import processes_of


@dataclass
class LaunchedRun:
    """A launcher with its ranks; all processes of the run name its folder in their command line."""

    launcher: subprocess.Popen[bytes]
    run_dir: Path
    output: Path
    port: int
    start_up_s = 9.0
    """About what it takes to the first step: two interpreters import torch."""

    def ranks(self) -> list[int]:
        """The pids of the ranks, in the order of their start, which is the order of ranks."""
        return sorted(children_of(self.launcher.pid))

    def codes(self) -> list[int | None]:
        return [self.launcher.poll()]

    def is_alive(self) -> bool:
        return self.launcher.poll() is None

    def said(self) -> str:
        """What launcher and ranks printed."""
        return self.output.read_text()

    def ask_to_stop(self) -> None:
        """The launcher does it."""

    def wait_until_gone(self, limit_s: float) -> float:
        """Wait for every process to end and the port to be free; returns the seconds that it took, or fails after the limit."""
        started_s = time.monotonic()
        while time.monotonic() - started_s < limit_s:
            if not self.is_alive() and not processes_of(self.run_dir) and is_free(self.port):
                return time.monotonic() - started_s
            time.sleep(0.02)
        left = processes_of(self.run_dir)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        raise AssertionError(
            f"{len(left)} processes live on, or port {self.port} is held, after {limit_s} s; {self.said()}"
        )


def launch(world_size: int, arguments: Sequence[str | Path], output: Path) -> LaunchedRun:
    """Start `accelerate launch -m aplantida_dist.train arguments` in a group of its own and return at once."""
    port = free_port()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(world_size)]
    command += ["--main_process_port", str(port), "-m", "aplantida_dist.train", *(str(word) for word in arguments)]
    run_dir = Path(arguments[list(arguments).index("--run-dir") + 1])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with output.open("wb") as file:
        launcher = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return LaunchedRun(launcher, run_dir, output, port)
