"""W&B's stand-in in a process of its own, to be unplugged and plugged in again while a run reports to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.ranks import FORK
from tests.wandb_server import Fault, UploadedRun, WandbServer, serve_wandb

KEY = 40 * "a"


@dataclass(frozen=True)
class WandbBeside:
    """The other end of that process."""

    url: str
    pid: int
    connection: Connection

    def fail(self, fault: Fault) -> None:
        """Have every request from now on fail like this, or be served again (none)."""
        self._ask(("fail", fault))

    def num_failed(self) -> int:
        """How many requests have failed."""
        return int(self._ask(("num_failed", None)))

    def run(self, run_id: str) -> UploadedRun | None:
        """What it holds of a run."""
        found: UploadedRun | None = self._ask(("run", run_id))
        return found

    def _ask(self, question: tuple[str, Any]) -> Any:
        self.connection.send(question)
        return self.connection.recv()


@contextlib.contextmanager
def wandb_beside(home: Path) -> Iterator[WandbBeside]:
    """Start it, and make of this process and its children a user who is logged in there."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    url = ours.recv()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "HOME": str(home), "WANDB_ERROR_REPORTING": "false"}
    assert process.pid is not None
    try:
        yield WandbBeside(url, process.pid, ours)
    finally:
        process.kill()
        process.join()


def _serve(connection: Connection) -> None:
    with serve_wandb() as server:
        connection.send(server.url)
        while True:
            connection.send(_answer(server, *connection.recv()))


def _answer(server: WandbServer, what: str, value: Any) -> Any:
    match what:
        case "fail":
            server.fault = value
        case "num_failed":
            return sum(server.failed.values())
        case "run":
            return server.runs.get(value)
    return None
