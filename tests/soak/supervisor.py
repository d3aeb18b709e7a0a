"""The supervisor: repeats one command until its run is done, and looks at the processes meanwhile. It knows of no fault."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from tests.ranks import FORK
from tests.soak.launcher import WORLD_SIZE, Launcher, be_launcher
from tests.soak.measuring import EVERY_S, Lives
from tests.soak.processes import Tree, below, living, reap_adopted, tree_of

LOOK_EVERY_S = 0.05
ORPHAN_AFTER_S = 60.0
"""Beyond the 30 s that torchrun leaves to ranks when one has failed."""
MAX_UNPROVOKED = 3


class SoakError(Exception):
    """The run does not go on as it must, so there is nothing more to be learned."""


class Supervisor:
    """One run and the command that is repeated for it. `beside`: a process below this one that is no part of the run.

    longest_gone_s: the longest time from the call of `wait_for_the_end` to the last process gone.
    orphans: what lived on for longer than it was given, and was killed then; one text for each such end.
    """

    def __init__(self, launcher: Launcher, arguments: list[str], run_dir: Path, folder: Path, *, beside: int) -> None:
        self.run_dir, self.lives = run_dir, Lives()
        self.num_attempts, self.longest_gone_s = 0, 0.0
        self.unprovoked: list[str] = []
        self.orphans: list[str] = []
        self._launcher, self._folder, self._beside = launcher, folder, beside
        self._arguments = [*arguments, "--run-dir", str(run_dir)]
        self._process: ForkProcess | None = None
        self._sampled_s = 0.0
        self._known: set[str] = set()
        self._saved: set[str] = set()

    def start(self) -> None:
        """Give the command once more."""
        self.num_attempts += 1
        self._known, self._saved = self._checkpoints(), set()
        self._output_dir.mkdir(parents=True)
        self._process = FORK.Process(target=be_launcher, args=(self._launcher, self._arguments, self._output_dir))
        self._process.start()

    @property
    def _output_dir(self) -> Path:
        return self._folder / f"attempt_{self.num_attempts:04d}"

    @property
    def pid(self) -> int:
        """The launcher."""
        assert self._process is not None
        assert self._process.pid is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Of the launcher, negative where a signal ended it; None while it runs."""
        return None if self._process is None else self._process.exitcode

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.exitcode is None

    @property
    def is_done(self) -> bool:
        """Whether the run has reached its end and the command said so."""
        return self.exit_code == 0 and self.status().get("phase") == "done"

    @property
    def num_saved(self) -> int:
        """How many checkpoints this attempt has saved, as far as they are new."""
        self._saved |= self._checkpoints() - self._known
        return len(self._saved)

    def step(self) -> int:
        """The newest checkpoint's."""
        return max((int(name.removeprefix("step_")) for name in self._checkpoints()), default=0)

    def status(self) -> dict[str, Any]:
        """status.json, empty where there is none yet."""
        path = self.run_dir / "status.json"
        content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return content

    def said(self) -> str:
        """What this attempt has printed so far, all ranks."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self._output_dir.iterdir()))

    def tree(self) -> Tree:
        return tree_of(self.pid, world_size=WORLD_SIZE)

    def pause(self, seconds: float) -> None:
        """Let time pass, and take samples."""
        now_s = time.monotonic()
        if self.is_running and now_s - self._sampled_s >= EVERY_S:
            self._sampled_s = now_s
            self.lives.sample(self.tree(), now_s)
        time.sleep(seconds)

    def wait_until(self, is_so: Callable[[], bool], *, limit_s: float) -> bool:
        """Let time pass until something is so; False where it is not within the limit."""
        deadline_s = time.monotonic() + limit_s
        while not is_so():
            if time.monotonic() > deadline_s:
                return False
            self.pause(LOOK_EVERY_S)
        return True

    def wait_for_the_end(self, *, limit_s: float = ORPHAN_AFTER_S) -> None:
        """Wait until the launcher and everything that it started is gone; what stays beyond the limit is noted, and killed."""
        started_s = time.monotonic()
        if not self.wait_until(lambda: self._is_gone, limit_s=limit_s):
            left = ", ".join(self._left())
            self.orphans.append(
                f"attempt {self.num_attempts}: after {limit_s:.0f} s {left} lived on; it said {self.said()[-3000:]}"
            )
            self.end()
            self.wait_until(lambda: self._is_gone, limit_s=ORPHAN_AFTER_S)
        self.longest_gone_s = max(self.longest_gone_s, time.monotonic() - started_s)
        reap_adopted()

    def keep_running(self) -> None:
        """Give the command again where it has ended with nothing done to it, and note that; SoakError where it never stops ending."""
        if self.is_running or self.is_done:
            return
        if self._process is not None:
            self.wait_for_the_end()
            self.unprovoked.append(
                f"attempt {self.num_attempts} ended with code {self.exit_code}: {self.said()[-3000:]}"
            )
            if len(self.unprovoked) > MAX_UNPROVOKED:
                raise SoakError("\n".join(self.unprovoked))
        self.start()

    def end(self) -> None:
        """Leave nothing behind, whatever happened."""
        for process in below(os.getpid(), living()):
            if process.pid != self._beside:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def _checkpoints(self) -> set[str]:
        return {path.name for path in self.run_dir.glob("checkpoints/step_*")}

    @property
    def _is_gone(self) -> bool:
        """Whether the launcher and everything that it started has ended."""
        return not self.is_running and not self._left()

    def _left(self) -> list[str]:
        """Processes below this one."""
        found = below(os.getpid(), living())
        return [f"{process.name} {process.pid}" for process in found if process.pid != self._beside]
