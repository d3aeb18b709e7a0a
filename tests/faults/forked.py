"""A run of the real train command on forked ranks, to be broken: who its processes are, and how each of them ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

from tests.ranks import FORK, _run_module, environment_of, free_port

POLL_S = 0.002


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


def start(world_size: int, arguments: Sequence[str | Path], folder: Path, before: object = None) -> ForkedRun:
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
    before: object,
) -> None:
    os.setsid()
    os.environ.update(environment_of(rank, world_size, port))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if callable(before):
        before(rank)
    code = 1
    try:
        code = _run_module("aplantida_dist.train", arguments, outputs)
    except BaseException:
        # As the interpreter would: into the rank's stderr, which `_run_module` has put in place.
        import traceback

        traceback.print_exc()
    os._exit(code)
