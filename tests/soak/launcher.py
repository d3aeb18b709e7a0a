"""How an attempt is started: by the script of launch/, as a user does, or by a fork of this warm process, which takes a second."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Literal, NoReturn

# Loaded before the forks, for all of them; the command itself is run anew by each.
import aplantida_dist.batch_size
import aplantida_dist.wandb_report  # noqa: F401
from tests.ranks import become_rank, free_port, run_module

Launcher = Literal["forks", "accelerate"]
WORLD_SIZE = 2
MODULE = "aplantida_dist.train"
GRACE_S = 30.0
"""What torchrun gives the other ranks when one has failed."""
_SCRIPT = Path(__file__).parents[2] / "launch" / "cpu_two_ranks.sh"
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def be_launcher(launcher: Launcher, arguments: list[str], output_dir: Path) -> NoReturn:
    """In a process forked for it: become the launcher of an attempt, in a group of its own, what it prints in files of a folder."""
    os.setsid()
    if launcher == "forks":
        _launch_forks(arguments, output_dir)
    descriptor = os.open(output_dir / "output", os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Where python is, accelerate is.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.execvp("sh", ["sh", str(_SCRIPT), *arguments])


def _launch_forks(arguments: list[str], output_dir: Path) -> NoReturn:
    """Start the ranks, pass signals on to them, and end them all when one fails, as torchrun does; code 1 where one failed."""
    ranks: dict[int, int] = {}
    for number in _PASSED_ON:
        signal.signal(number, lambda number, _: _signal_all(ranks, number))
    port = free_port()
    for rank in range(WORLD_SIZE):
        pid = os.fork()
        if pid == 0:
            _be_rank(rank, port, arguments, output_dir)
        ranks[pid] = rank
    deadline_s, has_failed = float("inf"), False
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in ranks:
            del ranks[pid]
            if os.WIFSIGNALED(status):
                _tell(output_dir, f"Signal {os.WTERMSIG(status)} received by PID {pid}")
            if status != 0 and not has_failed:
                has_failed, deadline_s = True, time.monotonic() + GRACE_S
                _signal_all(ranks, signal.SIGTERM)
        if time.monotonic() > deadline_s:
            _signal_all(ranks, signal.SIGKILL)
        time.sleep(0.02)
    os._exit(int(has_failed))


def _be_rank(rank: int, port: int, arguments: list[str], output_dir: Path) -> NoReturn:
    for number in _PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    os.environ["TORCHELASTIC_RUN_ID"] = "soak"  # by which a rank knows that it has a launcher to die with
    become_rank(rank, WORLD_SIZE, port)
    outputs = [(output_dir / f"stdout_{rank}", output_dir / f"stderr_{rank}") for rank in range(WORLD_SIZE)]
    try:
        code = run_module(MODULE, arguments, outputs)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def _tell(output_dir: Path, text: str) -> None:
    """In torchrun's words."""
    with (output_dir / "output").open("a") as file:
        file.write(f"{text}\n")


def _signal_all(ranks: dict[int, int], number: int) -> None:
    for pid in list(ranks):
        os.kill(pid, number)
