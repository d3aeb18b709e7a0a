"""The most memory that a process has held at once."""

from __future__ import annotations

from pathlib import Path


def peak_mib(process: str) -> float:
    """The high-water mark of a process's own memory. The system's `ru_maxrss` begins with that of the process which started it."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0  # it has ended, and not been waited for
