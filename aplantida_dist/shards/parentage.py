"""The parentage of a subset: whether it is what it says of its parent, digest by digest and photograph by photograph."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from aplantida_dist.data.classmap import CLASSES_FILE, Parent
from aplantida_dist.data.dataset import Dataset, Split, open_dataset
from aplantida_dist.data.index import read_key
from aplantida_dist.data.manifest import MANIFEST_FILE, SPLITS
from aplantida_dist.shards.inspection import Damage


def check_parentage(dataset_dir: Path, parent_dir: Path) -> tuple[Damage, ...]:
    """Everything in which a sound subset differs from what it should be of this parent, sorted by place.

    The digests that it names are the parent's, its classes stand in the parent under the labels that it declares, and each of
    its photographs stands in the same split of the parent under the same class. Headers and indexes are read, no picture.
    """
    subset, parent = open_dataset(dataset_dir), open_dataset(parent_dir)
    declared = subset.class_map.parent
    if declared is None:
        return (Damage(CLASSES_FILE, "names no parent, so this is no subset"),)
    damages = _faults_of_classes(subset, parent, declared)
    for name in SPLITS:
        if subset.has_split(name):
            place = f"{name}/{MANIFEST_FILE}"
            damages += [Damage(place, fault) for fault in _faults_of_split(subset, parent, declared, name)]
    return tuple(sorted(damages))


def _faults_of_classes(subset: Dataset, parent: Dataset, declared: Parent) -> list[Damage]:
    faults = []
    if declared.digest != parent.class_map.digest:
        faults.append(f"names a parent of other classes than those of {parent.dataset_dir} (the digests differ)")
    names = parent.class_map.class_names
    for class_name, label in zip(subset.class_map.class_names, declared.labels, strict=True):
        found = names[label] if label < len(names) else None
        if found != class_name:
            faults.append(f"{class_name!r} should be class {label} of the parent, which is {found!r}")
            break
    return [Damage(CLASSES_FILE, fault) for fault in faults]


def _faults_of_split(subset: Dataset, parent: Dataset, declared: Parent, name: str) -> list[str]:
    """What is wrong with one split. Its keys are held, the parent's stream by."""
    if not parent.has_split(name):
        return [f"{parent.dataset_dir} has no {name}"]
    split, parent_split = subset.open_split(name), parent.open_split(name)
    faults = []
    if split.manifest.parent != parent_split.digest:
        faults.append(f"names another parent than {parent_split.split_dir / MANIFEST_FILE} (the digests differ)")
    label_of = {key: declared.labels[label] for key, label in _read_labels(split)}
    under_another = [key for key, label in _read_labels(parent_split) if label_of.pop(key, label) != label]
    if label_of:
        faults.append(f"{len(label_of):,} photographs are not in {name} of the parent, first {min(label_of)}")
    if under_another:
        faults.append(
            f"{len(under_another):,} photographs stand under another class in the parent, first {min(under_another)}"
        )
    return faults


def _read_labels(split: Split) -> Iterator[tuple[str, int]]:
    """The (key, label) of every sample, from headers and indexes."""
    for shard_index in range(len(split.manifest.shards)):
        index, path = split.read_index(shard_index), split.shard_path(shard_index)
        descriptor = split.open_shard(shard_index)
        try:
            for entry in index:
                yield read_key(descriptor, entry, shard_path=path), int(entry["label"])
        finally:
            os.close(descriptor)
