"""Processes: what Linux tells of the others on this machine, and of the cores that they share."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of CPU time in a period, and the period; "max" is no quota. What a container's limit is written to."""

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


def usable_cores() -> int:
    """The cores that this process may use: those that it is bound to, or what a container's quota leaves of them; 1 at least."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return num_cores
    return num_cores if quota == "max" else max(1, min(num_cores, int(quota) // int(period)))
