"""What a resumed run reads before its first step: the bytes of that step's first micro-batches, and nothing else of any shard."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from aplantida_dist.data.dataset import Split, open_dataset
from aplantida_dist.data.index import HEADER_BYTES
from aplantida_dist.data.plan import Coordinates, TrainPlan
from tests.laws import train
from tests.ranks import run_ranks
from tests.runs import compose, cut_back, write_config

KEPT = ("checkpoint.every_steps=1", "checkpoint.keep_last=100")


@dataclass(frozen=True)
class Counted:
    """One rank's reading, from the start of the program: the files of the dataset that it opened, by name and how often, and the bytes
    that the system says were read (by any call, of any file) while the first micro-batch was made."""

    at: Coordinates
    opened: Counter[str]
    opened_for_the_batch: Counter[str]
    bytes_read: int


def count_on_rank(config: Path, run_dir: Path, dataset_dir: Path) -> Counted:
    """Compose the run as the command does, and ask for its first micro-batch."""
    from aplantida_dist.trainer import read_ahead

    opened: Counter[str] = Counter()

    def listen(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(str(dataset_dir)):
            opened[str(Path(str(arguments[0])).relative_to(dataset_dir))] += 1

    sys.addaudithook(listen)
    training = compose(config, run_dir, KEPT)
    before = opened.copy()
    batches = read_ahead(training.job, training.start_step)
    bytes_before, by_asking = read_by_this_process()
    batch = next(batches)
    bytes_after, _ = read_by_this_process()
    return Counted(batch.at, opened, opened - before, bytes_after - bytes_before - by_asking)


def read_by_this_process() -> tuple[int, int]:
    """The bytes that all reading calls of this process returned, and those that the asking itself adds to them."""
    descriptor = os.open("/proc/self/io", os.O_RDONLY)
    try:
        text = os.read(descriptor, 4096)
    finally:
        os.close(descriptor)
    return int(text.split()[1]), len(text)


def expected(split: Split, plan: TrainPlan, at: Coordinates) -> tuple[Counter[str], int]:
    """What the micro-batch needs: the index and the tar of each of its shards, opened once; of the tar only its members, with their headers."""
    micro_batch = plan.micro_batch(at)
    files: Counter[str] = Counter()
    num_bytes = 0
    for shard in set(micro_batch.shard_indices.tolist()):
        files.update([f"train/{split.index_path(shard).name}", f"train/{split.shard_path(shard).name}"])
        num_bytes += split.index_path(shard).stat().st_size
    for shard, member in zip(micro_batch.shard_indices.tolist(), micro_batch.member_indices.tolist(), strict=True):
        num_bytes += HEADER_BYTES + int(split.read_index(shard)["length"][member])
    return files, num_bytes


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_bytes_read_before_the_first_batch_are_those_of_that_batch(
    world_size: int, dataset_dir: Path, tmp_path: Path
) -> None:
    """In the second and third epoch, resumed twice in a row, on each rank: to the byte, and no file of train is opened but those.

    The main process has read who is in val, which is held against what the weights were trained on.
    """
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=3)
    run_dir = tmp_path / "run"
    train(world_size, config, run_dir, *KEPT)
    split = open_dataset(dataset_dir).open_split("train")
    plan = TrainPlan(split.shard_sizes, 3, 16, 4, 262144)
    for stop in (7, 13):
        if stop == 13:
            train(world_size, config, run_dir, *KEPT)  # so that what is resumed then was resumed before
        cut_back(run_dir, step=stop)
        copy = tmp_path / f"counted_{stop}"
        shutil.copytree(run_dir, copy)
        counts = run_ranks(world_size, count_on_rank, config, copy, dataset_dir)
        for rank, counted in enumerate(counts):
            at = Coordinates(*divmod(stop, plan.steps_per_epoch), plan.slots_of(rank, world_size)[0])
            files, num_bytes = expected(split, plan, at)
            assert counted.at == at
            assert counted.opened_for_the_batch == files
            assert counted.bytes_read == num_bytes
            at_start = {"classes.json", "train/manifest.json", "val/manifest.json"}
            of_val = {"val/identities.bin"} if rank == 0 else set()
            assert (counted.opened - files).keys() == at_start | of_val
