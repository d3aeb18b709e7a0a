"""A run of the real train command on forked ranks, to be broken: who its processes are, and how each of them ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

from tests.ranks import FORK, environment_of, free_port, run_module


@dataclass
class ForkedRun:
    """Ranks that train, each the leader of a session of its own as under a launcher, so that its loader workers are known by it."""

    ranks: list[ForkProcess]
    folder: Path

    def workers(self, rank: int) -> list[int]:
        """The pids of a rank's loader workers."""
        return children_of(self.ranks[rank].pid or 0)

    def codes(self) -> list[int | None]:
        return [rank.exitcode for rank in self.ranks]

    def is_alive(self) -> bool:
        return any(rank.is_alive() for rank in self.ranks)

    def processes(self) -> list[int]:
        """The pids of all that still runs of it: ranks and what they have started."""
        sessions = {rank.pid for rank in self.ranks}
        return [pid for pid, session, state in processes() if session in sessions and state not in "ZX"]

    def wait_until_gone(self, limit_s: float) -> float:
        """Wait for every process to end; returns the seconds that it took, or fails after the limit."""
        started_s = time.monotonic()
        while time.monotonic() - started_s < limit_s:
            self.codes()  # buries the dead
            if not self.processes():
                for rank in self.ranks:
                    rank.join()
                return time.monotonic() - started_s
            time.sleep(0.02)
        left = self.processes()
        self.kill()
        raise AssertionError(f"{len(left)} processes live on after {limit_s} s; {self.said()}")

    def said(self) -> str:
        """What all ranks printed on stderr."""
        return "".join(self.stderr(rank) for rank in range(len(self.ranks)))

    def stderr(self, rank: int) -> str:
        return (self.folder / f"stderr_{rank}").read_text()

    def stdout(self, rank: int) -> str:
        return (self.folder / f"stdout_{rank}").read_text()

    def kill(self) -> None:
        """SIGKILL every process of it."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for rank in self.ranks:
            rank.join()


def start(
    world_size: int, arguments: Sequence[str | Path], folder: Path, before: Callable[[int], None] | None = None
) -> ForkedRun:
    """Start `python -m aplantida_dist.train arguments` on every rank and return at once. `before` is called on each rank first."""
    outputs = [(folder / f"stdout_{rank}", folder / f"stderr_{rank}") for rank in range(world_size)]
    for paths in outputs:
        for path in paths:
            path.write_text("")
    port = free_port()
    told = [str(argument) for argument in arguments]
    ranks = [
        FORK.Process(target=_rank, args=(rank, world_size, port, told, outputs, before)) for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    return ForkedRun(ranks, folder)


def wait_for_checkpoint(run: ForkedRun, run_dir: Path, *, step: int = 0) -> None:
    """Return as soon as a checkpoint of this step or a later one is on disk."""
    while run.is_alive():
        if any(int(path.name.removeprefix("step_")) >= step for path in run_dir.glob("checkpoints/step_*")):
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step} came: {run.codes()} {run.said()}")


def children_of(parent: int) -> list[int]:
    """The pids of a process's living children."""
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return []


def processes() -> list[tuple[int, int, str]]:
    """Every process of this machine: pid, session and state."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            found.append((int(path.parent.name), int(fields[3]), fields[0]))
    return found


def _rank(
    rank: int,
    world_size: int,
    port: int,
    arguments: list[str],
    outputs: list[tuple[Path, Path]],
    before: Callable[[int], None] | None,
) -> None:
    os.setsid()
    os.environ.update(environment_of(rank, world_size, port))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if before is not None:
        before(rank)
    code = 1
    try:
        code = run_module("aplantida_dist.train", arguments, outputs)
    except BaseException:
        traceback.print_exc()  # as the interpreter would
    os._exit(code)
