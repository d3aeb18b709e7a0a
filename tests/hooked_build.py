"""Builds in processes of their own to which something happens at a chosen call of the system: `python hooked_build.py …`.

Python tells an audit hook of every file that is opened, made, renamed or removed, just before it happens.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from pictures import build, draw

from aplantida_dist.shards.audit import audit_picture

EVENTS = frozenset(
    {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.listdir", "os.scandir"}
)


def kill_everywhere(source: Path, home: Path, earlier: Path) -> None:
    """Build into home/000/set, home/001/set, … and kill each build one call later than the one before, until one ends.

    Where the folder `earlier` exists, each is a replacement of a copy of it.
    """
    audit_picture(draw(0), with_looks=True)  # imports here, once, what each child would import
    for number in count():
        dataset_dir = home / f"{number:03d}" / "set"
        dataset_dir.parent.mkdir(parents=True)
        if earlier.exists():
            shutil.copytree(earlier, dataset_dir)
        child = os.fork()
        if child == 0:
            _at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL), below=dataset_dir.parent)
            build(source, dataset_dir, replace=earlier.exists())
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return


def change_between_the_passes(source: Path, dataset_dir: Path, kind: str) -> None:
    """Build, and as the folder for the shards is made, every second picture changes, vanishes or becomes a folder."""

    def change() -> None:
        for path in sorted(source.rglob("*.jpg"))[::2]:
            if kind == "changes":
                path.write_bytes(path.read_bytes() + b"x")
                continue
            path.unlink()
            if kind == "becomes a folder":
                path.mkdir()

    _at_call(0, change, below=dataset_dir.parent, containing=".partial-")
    build(source, dataset_dir)


def _at_call(number: int, act: Callable[[], None], *, below: Path, containing: str = "") -> None:
    """Act once, before the call of this number that names a path below a folder."""
    numbers = count()
    prefix = f"{below}/"

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS and args and isinstance(args[0], str | os.PathLike):
            path = os.fspath(args[0])
            if isinstance(path, str) and path.startswith(prefix) and containing in path and next(numbers) == number:
                act()

    sys.addaudithook(hook)


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill_everywhere(*map(Path, sys.argv[2:5]))
    else:
        change_between_the_passes(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
