"""Small disks for the tests: file systems in memory that can be filled, resized and made read-only."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def can_mount(folder: Path) -> bool:
    """Mount a file system of 64 MiB there; False where this process may not."""
    if shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", folder]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """Take what `can_mount` has mounted away again."""
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(disk: Path, options: str) -> None:
    """Change a disk's size (`size=64M`), or whether it can be written (`ro`, `rw`)."""
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)
