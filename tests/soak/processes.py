"""The processes below this one, as the kernel tells of them: who they are, what memory and descriptors they hold, and that they are gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
_PR_SET_CHILD_SUBREAPER = 36
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
WORKER = "pt_data_worker"
"""What torch names the processes of a DataLoader."""


@dataclass(frozen=True)
class Process:
    """A process that ran when it was looked at. `start` is the kernel's clock tick at which it began."""

    pid: int
    parent: int
    name: str
    start: int


@dataclass(frozen=True)
class Tree:
    """The processes of one attempt: its launcher, the ranks by number, each rank's workers (oldest first), and all of them."""

    launcher: int
    ranks: tuple[int, ...]
    workers: tuple[tuple[int, ...], ...]
    everyone: tuple[int, ...]

    @property
    def roles(self) -> dict[str, int]:
        """Those that live as long as the attempt does: a rank's oldest worker reads the training, younger ones an evaluation."""
        ranks = {"main process" if rank == 0 else f"rank {rank}": pid for rank, pid in enumerate(self.ranks)}
        oldest = {f"worker of rank {rank}": pids[0] for rank, pids in enumerate(self.workers) if pids}
        return ranks | oldest


def adopt_orphans() -> None:
    """Have every process that loses its parent below this one become this one's child, so that none can be overlooked."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def living() -> dict[int, Process]:
    """Every process of the machine but the dead that nobody has waited for."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            head, _, rest = (folder / "stat").read_text().rpartition(")")
            fields = rest.split()
            if fields[0] not in "ZX":
                pid = int(folder.name)
                found[pid] = Process(pid, int(fields[1]), head.partition("(")[2], int(fields[19]))
    return found


def below(pid: int, processes: dict[int, Process]) -> list[Process]:
    """The processes that one has started, and those that they have, in the order of their start."""
    children = [process for process in processes.values() if process.parent == pid]
    found = children + [process for child in children for process in below(child.pid, processes)]
    return sorted(found, key=lambda process: (process.start, process.pid))


def tree_of(launcher: int, *, world_size: int) -> Tree:
    """What an attempt consists of now. The first children of a launcher are its ranks, in their order."""
    processes = living()
    everyone = below(launcher, processes)
    ranks = [process.pid for process in everyone if process.parent == launcher][:world_size]
    workers = tuple(
        tuple(process.pid for process in everyone if process.parent == rank and process.name == WORKER)
        for rank in ranks
    )
    return Tree(launcher, tuple(ranks), workers, tuple(process.pid for process in everyone))


def reap_adopted() -> None:
    """Wait for every child that has ended. For when nobody else waits for one."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def resident_mib(pid: int) -> float:
    """The memory that a process holds, what it shares with others too, in MiB. ProcessLookupError where it is gone."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    if pages == 0:
        raise ProcessLookupError(f"{pid} has ended")
    return pages * _PAGE_BYTES / MIB


def num_descriptors(pid: int) -> int:
    """How many files, sockets and pipes a process has open. OSError where it is gone."""
    return len(os.listdir(f"/proc/{pid}/fd"))
