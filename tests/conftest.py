"""Datasets that many tests read, built once: noise pictures, uneven classes, several small shards."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from aplantida_dist.shards.writer import ShardLimits
from tests.pictures import build, fill

torch.set_num_threads(1)

COUNTS = {
    "Acer campestre": 31,
    "Betula pendula": 12,
    "Cornus mas": 7,
    "Daphne mezereum": 23,
    "Euonymus": 4,
    "Ficus": 10,
}


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """87 pictures of 6 classes: 69 train in shards of 13, the rest in val and test."""
    folder = tmp_path_factory.mktemp("pictures")
    fill(folder, COUNTS)
    out = tmp_path_factory.mktemp("datasets") / "small"
    build(folder, out, limits=ShardLimits(num_samples=13))
    return out
