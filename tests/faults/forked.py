"""A run of the real train command on forked ranks, to be broken: who its processes are, and how each of them ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Protocol

from accelerate.state import AcceleratorState, GradientState

from tests.ranks import FORK, environment_of, free_port, run_module, uncollected


@dataclass
class ForkedRun:
    """Ranks that train, each the leader of a session of its own as under a launcher, so that its loader workers are known by it."""

    ranks: list[ForkProcess]
    folder: Path
    port: int
    start_up_s = 2.5
    """About what it takes to the first step; the libraries are in memory already."""

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
        """Wait for every process to end and the port to be free; returns the seconds that it took, or fails after the limit."""
        started_s = time.monotonic()
        while time.monotonic() - started_s < limit_s:
            self.codes()  # buries the dead
            if not self.processes() and is_free(self.port):
                for rank in self.ranks:
                    rank.join()
                return time.monotonic() - started_s
            time.sleep(0.02)
        left = {pid: Path(f"/proc/{pid}/cmdline").read_text()[:200] for pid in self.processes()}
        self.kill()
        raise AssertionError(f"{left} live on, or port {self.port} is held, after {limit_s} s; {self.said()}")

    def said(self) -> str:
        """What all ranks printed on stderr."""
        return "".join(self.stderr(rank) for rank in range(len(self.ranks)))

    def stderr(self, rank: int) -> str:
        return (self.folder / f"stderr_{rank}").read_text()

    def stdout(self, rank: int) -> str:
        return (self.folder / f"stdout_{rank}").read_text()

    def ask_to_stop(self) -> None:
        """SIGTERM to every rank that lives, as a launcher sends it when one has died."""
        for rank in self.ranks:
            if rank.is_alive():
                rank.terminate()

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
    with uncollected():
        for rank in ranks:
            rank.start()
    return ForkedRun(ranks, folder, port)


class Alive(Protocol):
    """A run, however it was started."""

    def is_alive(self) -> bool: ...

    def codes(self) -> Sequence[int | None]: ...

    def said(self) -> str: ...


def wait_for_checkpoint(run: Alive, run_dir: Path, *, step: int = 0) -> None:
    """Return as soon as a checkpoint of this step or a later one is on disk."""
    while run.is_alive():
        if any(int(path.name.removeprefix("step_")) >= step for path in run_dir.glob("checkpoints/step_*")):
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step} came: {run.codes()} {run.said()}")


def is_free(port: int) -> bool:
    """Whether nobody listens on a port, so that the same command can take it again."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return True
        return False


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
