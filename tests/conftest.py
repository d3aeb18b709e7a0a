"""Datasets that many tests read, built once: noise pictures, uneven classes, several small shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from aplantida_dist.shards.writer import ShardLimits
from tests.disks import can_mount, mounted
from tests.pictures import build, fill
from tests.whole_files import write_whole_files

torch.set_num_threads(1)

CLASSES = ("Acer campestre", "Betula pendula", "Cornus mas", "Daphne mezereum", "Euonymus", "Ficus")
COUNTS = {"train": (25, 10, 5, 19, 2, 8), "val": (3, 1, 1, 2, 1, 1), "test": (3, 1, 1, 2, 1, 1)}


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """87 pictures of 6 classes in given splits: 69 train in shards of 13, 9 val, 9 test."""
    folder = tmp_path_factory.mktemp("pictures")
    first = 0
    for split, counts in COUNTS.items():
        first = fill(folder / split, dict(zip(CLASSES, counts, strict=True)), first=first)
    out = tmp_path_factory.mktemp("datasets") / "small"
    build(folder, out, limits=ShardLimits(num_samples=13))
    return out


@pytest.fixture(scope="session")
def whole_files(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the fuzzers damage: whole files of every reader, in a folder of its name."""
    return write_whole_files(tmp_path_factory.mktemp("whole_files"), dataset_dir=dataset_dir)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory, of 64 MiB; `tests.disks.remount` changes it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not can_mount(folder):
        pytest.skip("no file system can be mounted here: run as root to test full and read-only disks")
    with mounted(folder):
        yield folder
