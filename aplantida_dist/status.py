"""status.json: what the run is doing now, for scripts that would otherwise guess."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from aplantida_dist.errors import UserError
from aplantida_dist.files import write_json

STATUS_FILE = "status.json"
WRITE_EVERY_S = 5.0

Phase = Literal["training", "evaluating", "saving", "done", "stopped", "failed"]


class Status:
    """The main process's heartbeat. A change of phase is written at once, progress within a phase every few seconds."""

    def __init__(self, run_dir: Path, *, total_steps: int) -> None:
        self._path = run_dir / STATUS_FILE
        self._total_steps = total_steps
        self._phase: Phase | None = None
        self._written_s = 0.0
        self._epoch, self._step = 0, 0

    def fail(self, reason: str) -> None:
        """Say that the run has ended with an error, and where it stood. Where that cannot be written, the error itself is told."""
        with contextlib.suppress(UserError):
            self.tell("failed", epoch=self._epoch, step=self._step, reason=reason)

    def tell(self, phase: Phase, *, epoch: int, step: int, **facts: Any) -> None:
        """Say where the run is: epoch from 1, completed steps; facts such as images_per_s and eta_s."""
        self._epoch, self._step = epoch, step
        now_s = time.monotonic()
        if phase == self._phase and now_s - self._written_s < WRITE_EVERY_S:
            return
        self._phase, self._written_s = phase, now_s
        content = {
            "phase": phase,
            "epoch": epoch,
            "step": step,
            "total_steps": self._total_steps,
            **facts,
            "heartbeat_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        write_json(self._path, content)
