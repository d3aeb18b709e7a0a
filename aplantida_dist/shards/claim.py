"""The claim of a dataset's name: one build at a time holds it, and clears up what a killed one left there."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from aplantida_dist.errors import UserError
from aplantida_dist.lock import take_lock


class ClaimError(UserError):
    """The name cannot be claimed for a dataset."""


@contextmanager
def claimed(dataset_dir: Path) -> Iterator[None]:
    """Hold a dataset's name while it is built. LockError where another process holds it, ClaimError where no file can be made beside it.

    All that lies beside the name once it is held was left by builds that were killed. A dataset that was being replaced gets
    its name back; what was half built is removed.
    """
    with ExitStack() as held:
        try:
            dataset_dir.parent.mkdir(parents=True, exist_ok=True)
            lock = take_lock(
                dataset_dir.with_name(f".{dataset_dir.name}.lock"),
                doing="builds this dataset",
                remedy="wait until it has ended, or choose another --out",
            )
            held.enter_context(lock)
            if lock.left is not None:
                _tell(f"{dataset_dir}: {lock.left} was killed while it built this dataset; starting clean")
            _restore_replaced(dataset_dir)
            _remove_unfinished(dataset_dir)
        except OSError as error:
            raise ClaimError(
                f"{dataset_dir}: nothing can be written beside it: {error.strerror}; choose another --out"
            ) from error
        yield


def partial_dir_of(dataset_dir: Path) -> Path:
    """Where this process builds a dataset: beside it, hidden."""
    return dataset_dir.with_name(f".{dataset_dir.name}.partial-{os.getpid()}")


def replaced_dir_of(dataset_dir: Path) -> Path:
    """Where this process puts a dataset that it replaces, for the moment between two renames."""
    return dataset_dir.with_name(f".{dataset_dir.name}.replaced-{os.getpid()}")


def find_replaced(dataset_dir: Path) -> Path | None:
    """The dataset that a killed replacement left without its name; None where the name is taken or there is none."""
    left = _left_beside(dataset_dir, "replaced")
    return None if os.path.lexists(dataset_dir) or not left else left[0]


def _restore_replaced(dataset_dir: Path) -> None:
    """Between the two renames of a replacement the old dataset has no name; after them it only waits to be deleted."""
    left = find_replaced(dataset_dir)
    if left is not None:
        left.rename(dataset_dir)
        _tell(f"{dataset_dir}: a build was killed while it replaced this dataset; the old one has its name again")
    for old_dir in _left_beside(dataset_dir, "replaced"):
        discard(old_dir, dataset_dir)


def discard(old_dir: Path, dataset_dir: Path) -> None:
    """Delete a dataset that was replaced. It is renamed first, so that what is called `replaced` is always whole.

    What cannot be deleted stays hidden, and the next build of the dataset tries again.
    """
    partial_dir = partial_dir_of(dataset_dir)
    with suppress(OSError):
        old_dir.rename(partial_dir)
        shutil.rmtree(partial_dir)


def _remove_unfinished(dataset_dir: Path) -> None:
    for partial_dir in _left_beside(dataset_dir, "partial"):
        shutil.rmtree(partial_dir)
        _tell(f"{partial_dir}: left by a build that was killed; removed")


def _left_beside(dataset_dir: Path, kind: str) -> list[Path]:
    if not dataset_dir.parent.is_dir():
        return []
    pattern = re.compile(rf"\.{re.escape(dataset_dir.name)}\.{kind}-[0-9]+")
    return sorted(path for path in dataset_dir.parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir())


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
