"""The inspection of a foreign shard: a tar that others wrote, and the index of those of its samples that one split holds."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.data.index import keys_of_index
from aplantida_dist.data.manifest import Shard
from aplantida_dist.shards.audit import sample_key_of
from aplantida_dist.shards.inspection import (
    Damage,
    ShardFinding,
    check_index,
    faults_of_bytes,
    gather_faults,
    json_object,
)
from aplantida_dist.shards.licence import Licence, licence_of
from aplantida_dist.shards.members import read_tar_members


def inspect_view(split_dir: Path, shard: Shard, *, num_classes: int | None) -> ShardFinding:
    """Read a foreign tar and its index to their ends: the tar is the one that was indexed, and each row leads to its picture.

    What else lies in the tar is others' and is not looked at. Damage is named by the index, since the tar lies elsewhere.
    """
    path, place = shard.tar_path(split_dir), f"{split_dir.name}/{shard.index_name}"
    index, damages = check_index(split_dir, shard)
    if not path.is_file():
        return ShardFinding(
            place, (), frozenset(), False, (*damages, Damage(place, f"the tar that it leads into is missing: {path}"))
        )
    listed = read_tar_members(path)
    faults = faults_of_bytes(path, shard, {}) + ([listed.fault] if listed.fault else [])
    damages += [Damage(place, f"the tar {path} {fault}") for fault in faults]
    if index is None:
        return ShardFinding(place, (), frozenset(), False, tuple(damages))
    size_of_offset = {member.offset_data: member.size for member in listed.members if member.isreg()}
    found = gather_faults(_faults_of_rows(path, index, size_of_offset=size_of_offset, num_classes=num_classes))
    found += _faults_of_index(index, shard)
    keys = tuple(keys_of_index(index))
    licences = _licences_of(path, index)
    return ShardFinding(place, keys, licences, True, (*damages, *(Damage(place, fault) for fault in found)))


def _licences_of(path: Path, index: NDArray[Any]) -> frozenset[Licence | None]:
    with path.open("rb") as tar:
        contents = (os.pread(tar.fileno(), int(row["metadata_length"]), int(row["metadata_offset"])) for row in index)
        return frozenset(licence_of(json_object(content) or {}) for content in contents)


def _faults_of_index(index: NDArray[Any], shard: Shard) -> list[str]:
    faults = []
    if (np.diff(index["offset"].astype(np.int64)) <= 0).any():
        faults.append("its rows are not in the tar's order")
    if Counter(map(str, index["label"].tolist())) != shard.class_counts:
        faults.append("its samples of each class are not as many as the manifest says")
    return faults


def _faults_of_rows(
    path: Path, index: NDArray[Any], *, size_of_offset: dict[int, int], num_classes: int | None
) -> Iterator[tuple[str, list[str]]]:
    """The key of each row, and what of the row is not so."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for key, row in zip(keys_of_index(index), index.tolist(), strict=True):
            offset, length, crc32, label, _, metadata_offset, metadata_length = row
            faults = []
            if num_classes is not None and label >= num_classes:
                faults.append(f"a label is none of the {num_classes} classes")
            if size_of_offset.get(offset) != length:
                faults.append("no member of the tar lies where the index says")
            else:
                content = os.pread(descriptor, length, offset)
                faults += ["the crc32 of the image is not the index's"] if zlib.crc32(content) != crc32 else []
                faults += ["the key is not that of the image"] if sample_key_of(content) != key else []
            if metadata_length and size_of_offset.get(metadata_offset) != metadata_length:
                faults.append("no metadata lies where the index says")
            elif metadata_length and json_object(os.pread(descriptor, metadata_length, metadata_offset)) is None:
                faults.append("no JSON lies where the index says")
            yield key, faults
    finally:
        os.close(descriptor)
