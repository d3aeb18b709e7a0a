"""The placement of a dataset: it is built in a folder beside, and stands under its name whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aplantida_dist.data.classmap import CLASSES_FILE
from aplantida_dist.data.manifest import SPLITS
from aplantida_dist.errors import UserError
from aplantida_dist.files import sync_folder
from aplantida_dist.shards.account import REPORT_FILES

DATASET_ENTRIES = frozenset({CLASSES_FILE, *REPORT_FILES, *SPLITS})
"""Everything that a dataset's folder may hold."""


class PlacementError(UserError):
    """The dataset cannot stand where it was asked for."""


def require_free_place(dataset_dir: Path, *, replace: bool) -> None:
    """Raise PlacementError unless a dataset may be placed there. Only what is a dataset and nothing else is ever replaced."""
    if not dataset_dir.exists() and not dataset_dir.is_symlink():
        return
    if not replace:
        raise PlacementError(f"{dataset_dir}: exists already; choose another --out, or pass --replace to build it anew")
    entries = {entry.name for entry in dataset_dir.iterdir()} if dataset_dir.is_dir() else set()
    foreign = sorted(entries - DATASET_ENTRIES)
    if CLASSES_FILE not in entries or foreign or dataset_dir.is_symlink():
        found = f"it holds {foreign[0]}" if foreign else f"it is no folder with a {CLASSES_FILE}"
        raise PlacementError(
            f"{dataset_dir}: is not a dataset ({found}), so --replace does not delete it; choose another --out"
        )


def require_apart(source_dir: Path, dataset_dir: Path) -> None:
    """The dataset must not lie inside what it is made from, nor that inside a dataset that a replacement would delete."""
    source, out = source_dir.resolve(), dataset_dir.resolve()
    if source == out or source in out.parents or out in source.parents:
        raise PlacementError(
            f"{dataset_dir}: lies inside {source_dir}, or around it; choose an --out that is apart from it"
        )


@contextmanager
def placed(dataset_dir: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder beside `dataset_dir`; when the block ends it takes that name, when the block raises it goes.

    A process that is killed leaves the folder beside behind, and never a dataset that is half there.
    """
    require_free_place(dataset_dir, replace=replace)
    partial_dir = dataset_dir.with_name(f".{dataset_dir.name}.partial-{os.getpid()}")
    try:
        dataset_dir.parent.mkdir(parents=True, exist_ok=True)
        _tell_of_unfinished_builds(dataset_dir)
        partial_dir.mkdir()
    except OSError as error:
        raise PlacementError(
            f"{dataset_dir}: no folder can be made beside it: {error.strerror}; choose another --out"
        ) from error
    try:
        yield partial_dir
        for folder in (*(path for path in partial_dir.iterdir() if path.is_dir()), partial_dir):
            sync_folder(folder)
        _swap_in(partial_dir, dataset_dir, replace=replace)
    except BaseException:
        shutil.rmtree(partial_dir, ignore_errors=True)
        raise


def _swap_in(partial_dir: Path, dataset_dir: Path, *, replace: bool) -> None:
    """Give the new folder its name. Between the two renames of a replacement the old dataset stands beside, whole."""
    require_free_place(dataset_dir, replace=replace)
    old_dir = dataset_dir.with_name(f".{dataset_dir.name}.replaced-{os.getpid()}")
    try:
        if dataset_dir.exists():
            dataset_dir.rename(old_dir)
        try:
            partial_dir.rename(dataset_dir)
        except OSError:
            if old_dir.exists():
                old_dir.rename(dataset_dir)
            raise
    except OSError as error:
        raise PlacementError(
            f"{dataset_dir}: could not take its name: {error.strerror}; choose another --out"
        ) from error
    sync_folder(dataset_dir.parent)
    shutil.rmtree(old_dir, ignore_errors=True)


def _tell_of_unfinished_builds(dataset_dir: Path) -> None:
    """Name what killed builds left; another build of the same dataset may be running, so nothing is deleted."""
    for left in sorted(dataset_dir.parent.glob(f".{dataset_dir.name}.partial-*")):
        print(
            f"{left}: left by a build that was killed or still runs; starting clean beside it",
            file=sys.stderr,
            flush=True,
        )
