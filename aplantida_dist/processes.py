"""Processes: what Linux tells of the others on this machine."""

from __future__ import annotations

import os
from pathlib import Path

STOPPED, DEAD = "T", ("", "Z", "X")
"""States of a process; one that is dead may not be buried yet."""


def pid_space() -> str:
    """What gives pids their meaning; empty elsewhere than on Linux, where nothing is known of other processes."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def state_of(pid: int) -> str:
    """The letter that the kernel gives a process's state; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
