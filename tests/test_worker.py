"""Loader workers are born: a fork that hangs in the interpreter, as CPython 3.11's can beside gloo's threads, is made again."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aplantida_dist.data import worker
from aplantida_dist.data.batch import Batch
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.images import EvaluationTransform
from aplantida_dist.data.plan import Coordinates, StoredPlan
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from aplantida_dist.data.worker import WorkerError
from tests.ranks import run_ranks


def test_a_worker_that_hangs_at_its_birth_is_forked_again(dataset_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four forks hang before their first line: every micro-batch comes, as if nothing had been, and no process is left."""
    monkeypatch.setattr(worker, "BORN_WITHIN_S", 0.5)
    ((num_forks, is_same, children),) = run_ranks(1, _read_where_forks_hang, dataset_dir, (1, 3))
    assert (num_forks, is_same, children) == (4, True, [])


def test_a_machine_on_which_none_is_born_is_told(dataset_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, instead of a run that waits for its first batch."""
    monkeypatch.setattr(worker, "BORN_WITHIN_S", 0.1)
    ((told, children),) = run_ranks(1, _fail_where_forks_hang, dataset_dir)
    assert told.startswith("a loader worker was forked 3 times, and none ran")
    assert children == []


def _read_where_forks_hang(dataset_dir: Path, hanging: tuple[int, ...]) -> tuple[int, bool, list[str]]:
    """How many forks two workers took, whether what they read is what this process reads, and the children that are left."""
    here = list(_batches(dataset_dir, 0))
    forks = _have_forks_hang(hanging)
    there = list(_batches(dataset_dir, 2))
    is_same = all(torch.equal(one.images, other.images) for one, other in zip(here, there, strict=True))
    return forks[0], is_same, _children()


def _fail_where_forks_hang(dataset_dir: Path) -> tuple[str, list[str]]:
    _have_forks_hang((1, 2, 3))
    with pytest.raises(WorkerError) as caught:
        list(_batches(dataset_dir, 1))
    return str(caught.value), _children()


def _have_forks_hang(hanging: tuple[int, ...]) -> mmap.mmap:
    """From here on the child of these forks, counted from 1, sleeps where CPython would hang; the first byte counts them."""
    forks = mmap.mmap(-1, 1)

    def in_child() -> None:
        forks[0] += 1
        if forks[0] in hanging:
            time.sleep(1000)

    os.register_at_fork(after_in_child=in_child)
    return forks


def _children() -> list[str]:
    return [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]


def _batches(dataset_dir: Path, num_workers: int) -> Iterator[Batch]:
    split = open_dataset(dataset_dir).open_split("train")
    plan = StoredPlan(split.shard_sizes, 8)
    micro_batches = MicroBatches(split, plan, EvaluationTransform(32, 1.0, "bilinear"), seed=0)
    coordinates = [Coordinates(0, 0, slot) for slot in range(plan.num_slots)]
    return stream(micro_batches, coordinates, reading=Reading(num_workers, 2 if num_workers else 1, pin_memory=False))
