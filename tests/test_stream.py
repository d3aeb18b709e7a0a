"""The stream: what the plan names is what is read, whoever reads it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aplantida_dist.data.batch import Batch
from aplantida_dist.data.dataset import Split, open_dataset
from aplantida_dist.data.images import EvaluationTransform, TrainTransform
from aplantida_dist.data.manifest import ManifestError
from aplantida_dist.data.plan import Coordinates, StoredPlan, TrainPlan
from aplantida_dist.data.stream import SPARE_BUFFERS, MicroBatches, Reading, StreamError, stream
from aplantida_dist.errors import UserError

TRAIN = TrainTransform(32, (0.35, 1.0), (0.75, 1.3333), 0.5, 0.0, "bicubic")
STORED = EvaluationTransform(32, 0.9, "bicubic")


def read_on(
    split: Split,
    *,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    epochs: int = 1,
    plan: TrainPlan | None = None,
) -> Iterator[Batch]:
    plan = plan or TrainPlan(split.shard_sizes, 5, 16, 4, 40)
    coordinates = [
        Coordinates(epoch, step, slot)
        for epoch in range(epochs)
        for step in range(plan.steps_per_epoch)
        for slot in plan.slots_of(rank, world_size)
    ]
    micro_batches = MicroBatches(split, plan, TRAIN, seed=5)
    return stream(micro_batches, coordinates, reading=Reading(num_workers, 2, pin_memory=False))


def read(split: Split, **how: Any) -> list[Batch]:
    return list(read_on(split, **how))


def is_same(one: Batch, other: Batch) -> bool:
    return (
        one.at == other.at
        and one.sample_keys == other.sample_keys
        and all(
            torch.equal(getattr(one, name), getattr(other, name))
            for name in ("images", "labels", "weights", "identities")
        )
    )


@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_are_bit_identical_for_any_number_of_workers(dataset_dir: Path, num_workers: int) -> None:
    """JPEG decoding and random augmentation included."""
    split = open_dataset(dataset_dir).open_split("train")
    alone, helped = read(split, num_workers=0, epochs=2), read(split, num_workers=num_workers, epochs=2)
    assert len(alone) == len(helped)
    assert all(is_same(one, other) for one, other in zip(alone, helped, strict=True))


@pytest.mark.parametrize("held", ["batch", "view", "array"])
def test_pixels_that_are_held_are_never_overwritten(dataset_dir: Path, held: str) -> None:
    """However the caller holds them, and though each worker has few buffers; the pixels are those of the batch also in the end."""
    split = open_dataset(dataset_dir).open_split("train")
    alone = read(split, num_workers=0, epochs=3)
    hold: dict[str, Callable[[Batch], Any]] = {
        "batch": lambda batch: batch.images,
        "view": lambda batch: batch.images[-1:],
        "array": lambda batch: batch.images[-1:].numpy(),
    }
    kept = [hold[held](batch) for batch in read_on(split, num_workers=1, epochs=3)]
    assert len(kept) == len(alone) > 2 + SPARE_BUFFERS
    for one, other in zip(alone, kept, strict=True):
        assert np.array_equal(hold[held](one), other)


def test_pixels_that_are_let_go_make_room_for_others(dataset_dir: Path) -> None:
    """A caller that holds one batch at a time sees the pixels of all of them in a few places of memory."""
    split = open_dataset(dataset_dir).open_split("train")
    places = [batch.images.data_ptr() for batch in read_on(split, num_workers=1, epochs=3)]
    assert len(set(places)) <= 2 + SPARE_BUFFERS < len(places)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_batches_are_bit_identical_for_any_number_of_ranks(dataset_dir: Path, world_size: int) -> None:
    """A slot holds the same pixels whichever rank reads it."""
    split = open_dataset(dataset_dir).open_split("train")
    whole = {batch.at: batch for batch in read(split, num_workers=0)}
    parts = [
        batch for rank in range(world_size) for batch in read(split, num_workers=0, rank=rank, world_size=world_size)
    ]
    assert whole.keys() <= {batch.at for batch in parts}
    assert all(is_same(batch, whole[batch.at]) for batch in parts if batch.at in whole)
    assert all(batch.weights.sum() == 0 for batch in parts if batch.at not in whole)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3, 7])
@pytest.mark.parametrize("split_name", ["train", "val", "test"])
def test_an_epoch_reads_what_the_manifest_holds(
    dataset_dir: Path, split_name: str, world_size: int, num_workers: int
) -> None:
    """Each key once, and the sum of identities is the manifest's; splits of fewer samples than ranks too."""
    split = open_dataset(dataset_dir).open_split(split_name)
    batches = [
        batch
        for rank in range(world_size)
        for batch in read(split, num_workers=num_workers, rank=rank, world_size=world_size)
    ]
    keys = Counter(
        key
        for batch in batches
        for key, weight in zip(batch.sample_keys, batch.weights.tolist(), strict=True)
        if weight
    )
    assert len(keys) == split.num_samples
    assert set(keys.values()) == {1}
    identities = sum(int(batch.identities[batch.weights > 0].sum()) for batch in batches)
    assert f"{identities % 2**64:016x}" == split.identity_digest


def test_labels_are_those_of_the_class_folders(dataset_dir: Path) -> None:
    """A label read through the index is the class whose folder the picture lay in."""
    dataset = open_dataset(dataset_dir)
    split = dataset.open_split("train")
    plan = StoredPlan(split.shard_sizes, 10)
    micro_batches = MicroBatches(split, plan, STORED, seed=0, with_metadata=True)
    slots = [Coordinates(0, 0, slot) for slot in plan.slots_of(0, 1)]
    seen: Counter[int] = Counter()
    for batch in stream(micro_batches, slots, reading=Reading(0, 2, pin_memory=False)):
        for label, weight, metadata in zip(batch.labels.tolist(), batch.weights.tolist(), batch.metadata, strict=True):
            assert metadata["latin_name"] == dataset.class_map.class_names[label]
            seen[label] += int(weight)
    assert [seen[label] for label in range(6)] == split.manifest.counts_of_classes(6)


def test_epochs_see_other_crops_of_the_same_picture(dataset_dir: Path) -> None:
    """Augmentation follows (seed, epoch, sample)."""
    split = open_dataset(dataset_dir).open_split("train")
    by_key: dict[str, set[bytes]] = {}
    for batch in read(split, num_workers=0, epochs=2):
        for key, image, weight in zip(batch.sample_keys, batch.images, batch.weights.tolist(), strict=True):
            if weight:
                by_key.setdefault(key, set()).add(image.numpy().tobytes())
    assert all(len(images) == 2 for images in by_key.values())


def test_max_samples_is_the_head_of_the_manifest_and_proves_itself(dataset_dir: Path) -> None:
    """A limited split reads so many samples, and its digest is that of their keys."""
    dataset = open_dataset(dataset_dir)
    for limit in (1, 13, 14, 30, 1000):
        split = dataset.open_split("train", max_samples=limit)
        batches = read(split, num_workers=0)
        identities = sum(int(batch.identities[batch.weights > 0].sum()) for batch in batches)
        assert sum(int(batch.weights.sum()) for batch in batches) == min(limit, 69) == split.num_samples
        assert f"{identities % 2**64:016x}" == split.identity_digest
    assert dataset.open_split("train", max_samples=1000).digest == dataset.open_split("train").digest


def corrupted(dataset_dir: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(dataset_dir, copy)
    return copy


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_changed_byte_stops_the_stream_and_names_the_sample(
    dataset_dir: Path, tmp_path: Path, num_workers: int
) -> None:
    """199 of 200 flips in a JPEG decode in silence; the crc32 sees them all."""
    copy = corrupted(dataset_dir, tmp_path)
    split = open_dataset(copy).open_split("train")
    entry = np.fromfile(split.index_path(1), dtype=[("offset", "<u8"), ("rest", "V12")])[4]
    flip(split.shard_path(1), int(entry["offset"]) + 300)
    with pytest.raises(StreamError, match=r"shard-000001\.tar: sample [0-9a-f]{24} at offset \d+ has changed"):
        read(split, num_workers=num_workers)


def test_a_changed_header_or_index_stops_the_stream(dataset_dir: Path, tmp_path: Path) -> None:
    """What names a sample is checked like what it holds."""
    copy = corrupted(dataset_dir, tmp_path)
    split = open_dataset(copy).open_split("train")
    offset = int(np.fromfile(split.index_path(0), dtype=[("offset", "<u8"), ("rest", "V12")])[2]["offset"])
    flip(split.shard_path(0), offset - 512)
    with pytest.raises(StreamError, match=r"no tar header before offset"):
        read(split, num_workers=0)
    flip(split.index_path(0), 33)
    with pytest.raises(StreamError, match=r"shard-000000\.idx: the index has changed"):
        read(split, num_workers=0)


def test_a_cut_or_absent_shard_is_found_before_training(dataset_dir: Path, tmp_path: Path) -> None:
    """Opening a split compares every shard's size with the manifest."""
    copy = corrupted(dataset_dir, tmp_path)
    shard = copy / "train" / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes()[:-700])
    with pytest.raises(UserError, match=r"shard-000002\.tar: the shard has \d+ bytes, the manifest says"):
        open_dataset(copy).open_split("train")
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000002\.tar: the shard is not there"):
        open_dataset(copy).open_split("train")


def test_a_dataset_that_is_not_there_says_how_to_build_one(tmp_path: Path, dataset_dir: Path) -> None:
    """No dataset, no such split, another class map."""
    with pytest.raises(ManifestError, match=r"no dataset here .*shards/build\.py"):
        open_dataset(tmp_path)
    with pytest.raises(ManifestError, match="has no split 'extra', only train, val, test"):
        open_dataset(dataset_dir).open_split("extra")
    copy = corrupted(dataset_dir, tmp_path)
    other = open_dataset(copy).class_map.class_names
    type(open_dataset(copy).class_map)(tuple(reversed(other))).save(copy / "classes.json")
    with pytest.raises(ManifestError, match="was built with other classes"):
        open_dataset(copy).open_split("val")
