"""The inspection of one shard: what lies in its tar and its index, and what of it is not as the manifest says."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tarfile import TarInfo
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.data.decode import DecodeError
from aplantida_dist.data.index import IMAGE_SUFFIXES, MAX_METADATA_BYTES, index_dtype, split_member_name
from aplantida_dist.data.manifest import Shard
from aplantida_dist.files import sha256_of_file
from aplantida_dist.shards.licence import Licence, licence_of
from aplantida_dist.shards.members import read_tar_members
from aplantida_dist.shards.reencode import longer_side_of

MAX_LABEL_DIGITS = 10
"""More has no row of an index room for."""


@dataclass(frozen=True, order=True)
class Damage:
    """One thing that is wrong: where (a path inside the dataset) and what."""

    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


@dataclass(frozen=True)
class ShardFinding:
    """What reading one shard gave: its keys in the tar's order, whether the tar is whole, what is wrong with it.

    `licences` are those that its samples state, None among them where one states none.
    """

    place: str
    sample_keys: tuple[str, ...]
    licences: frozenset[Licence | None]
    is_whole: bool
    damages: tuple[Damage, ...]


@dataclass(frozen=True)
class _FoundSample:
    """One sample as it lies in the tar. `label` is -1 where KEY.cls does not say one, `longer_side` 0 where it was not asked for.

    `licence` is what KEY.json states; `faults` are about its files.
    """

    sample_key: str
    offset: int
    length: int
    crc32: int
    label: int
    longer_side: int
    licence: Licence | None
    faults: tuple[str, ...]


def inspect_shard(
    split_dir: Path, shard: Shard, *, name_of_sha256: dict[str, str], num_classes: int | None, max_side: int | None
) -> ShardFinding:
    """Read a shard and its index to their ends. `name_of_sha256` has every shard of the split, so that swapped ones are named.

    Without `num_classes` (the class map is itself damaged) labels are compared with the index only. `max_side` is that of a
    dataset that was re-encoded: no picture may be longer.
    """
    path, place = split_dir / shard.name, f"{split_dir.name}/{shard.name}"
    index, index_damages = check_index(split_dir, shard)
    if not path.is_file():
        return ShardFinding(place, (), frozenset(), False, (Damage(place, "missing"), *index_damages))
    faults = faults_of_bytes(path, shard, name_of_sha256)
    tar = read_tar_members(path)
    samples = list(_read_samples(path, tar.members, with_sides=max_side is not None))
    faults += [tar.fault] if tar.fault else _faults_of_counts(samples, shard)
    if index is not None and len(index) != len(samples):
        faults.append(f"{len(samples)} samples can be read, the index lists {len(index)}")
        index = None
    faults += _faults_of_samples(samples, index, num_classes=num_classes, max_side=max_side)
    return ShardFinding(
        place=place,
        sample_keys=tuple(sample.sample_key for sample in samples),
        licences=frozenset(sample.licence for sample in samples),
        is_whole=tar.fault is None,
        damages=(*(Damage(place, fault) for fault in faults), *index_damages),
    )


def check_index(split_dir: Path, shard: Shard) -> tuple[NDArray[Any] | None, list[Damage]]:
    """Read an index as far as it is one; a changed index is still compared, so that the report says what changed."""
    path, place = split_dir / shard.index_name, f"{split_dir.name}/{shard.index_name}"
    if not path.is_file():
        return None, [Damage(place, "missing")]
    dtype = index_dtype(is_foreign=shard.is_foreign)
    content, expected_bytes = path.read_bytes(), shard.num_samples * dtype.itemsize
    if len(content) != expected_bytes:
        return None, [Damage(place, f"holds {len(content)} bytes, expected {expected_bytes}")]
    changed = hashlib.sha256(content).hexdigest() != shard.index_sha256
    damages = [Damage(place, "its sha256 is not the manifest's")] if changed else []
    return np.frombuffer(content, dtype=dtype), damages


def faults_of_bytes(path: Path, shard: Shard, name_of_sha256: dict[str, str]) -> list[str]:
    """What of a tar's size and digest is not the manifest's; a tar that belongs elsewhere in the split is named."""
    num_bytes, sha256 = path.stat().st_size, sha256_of_file(path)
    if sha256 == shard.sha256:
        return []
    if sha256 in name_of_sha256:
        return [f"holds what belongs in {name_of_sha256[sha256]}"]
    if num_bytes != shard.bytes:
        return [f"holds {num_bytes} bytes, the manifest says {shard.bytes}"]
    return ["its sha256 is not the manifest's"]


def _faults_of_counts(samples: list[_FoundSample], shard: Shard) -> list[str]:
    faults = []
    if len(samples) != shard.num_samples:
        faults.append(f"holds {len(samples)} samples, the manifest says {shard.num_samples}")
    counts = Counter(str(sample.label) for sample in samples)
    if counts != shard.class_counts:
        faults.append("its samples of each class are not as many as the manifest says")
    return faults


def _read_samples(path: Path, members: Iterable[TarInfo], *, with_sides: bool) -> Iterator[_FoundSample]:
    """The samples of a tar: neighbours that share a key, as WebDataset groups them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for sample_key, files in groupby(members, key=lambda member: split_member_name(member.name)[0]):
            yield _read_sample(descriptor, sample_key, list(files), with_side=with_sides)
    finally:
        os.close(descriptor)


def _read_sample(descriptor: int, sample_key: str, files: list[TarInfo], *, with_side: bool) -> _FoundSample:
    suffixes = [split_member_name(file.name)[1] for file in files]
    images = [file for file, suffix in zip(files, suffixes, strict=True) if suffix in IMAGE_SUFFIXES]
    contents = {
        suffix: os.pread(descriptor, file.size, file.offset_data)
        for file, suffix in zip(files, suffixes, strict=True)
        if suffix in ("cls", "json") and file.size <= MAX_METADATA_BYTES
    }
    faults = [f"an extra member .{suffix}" for suffix in suffixes if suffix not in (*IMAGE_SUFFIXES, "cls", "json")]
    faults += [f"several members .{suffix}" for suffix in ("cls", "json") if suffixes.count(suffix) > 1]
    faults += ["a member that is no plain file" for file in files if not file.isreg()]
    if len(images) != 1:
        faults.append(f"{len(images)} image members, expected one")
    label_text = contents.get("cls", b"")
    label = int(label_text) if len(label_text) <= MAX_LABEL_DIGITS and label_text.isdigit() else -1
    if label < 0:
        faults.append("no class index in KEY.cls")
    metadata = json_object(contents.get("json", b""))
    if metadata is None:
        faults.append("no JSON object in KEY.json")
    offset, length = (images[0].offset_data, images[0].size) if images else (0, 0)
    image = os.pread(descriptor, length, offset)
    longer_side = 0
    if with_side:
        try:
            longer_side = longer_side_of(image)
        except DecodeError:
            faults.append("no picture")
    return _FoundSample(
        sample_key=sample_key,
        offset=offset,
        length=length,
        crc32=zlib.crc32(image),
        label=label,
        longer_side=longer_side,
        licence=licence_of(metadata or {}),
        faults=tuple(faults),
    )


def json_object(content: bytes) -> dict[str, Any] | None:
    """The object that bytes hold as JSON; None where they hold none."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _faults_of_samples(
    samples: list[_FoundSample], index: NDArray[Any] | None, *, num_classes: int | None, max_side: int | None
) -> list[str]:
    faults_of_key = []
    for number, sample in enumerate(samples):
        faults = list(sample.faults)
        if num_classes is not None and sample.label >= num_classes:
            faults.append(f"a label is none of the {num_classes} classes")
        if max_side is not None and sample.longer_side > max_side:
            faults.append(f"a side is longer than the {max_side} pixels of the re-encoding")
        if index is not None:
            faults += _differences(sample, index[number])
        faults_of_key.append((sample.sample_key, faults))
    return gather_faults(faults_of_key)


def gather_faults(faults_of_key: Iterable[tuple[str, list[str]]]) -> list[str]:
    """What is wrong with single samples (sample key, its faults), by kind, so that a thousand equal faults make one line."""
    keys_of_fault: defaultdict[str, list[str]] = defaultdict(list)
    for key, faults in faults_of_key:
        for fault in faults:
            keys_of_fault[fault].append(key)
    return [f"{fault} ({len(keys)} samples, first {keys[0]})" for fault, keys in keys_of_fault.items()]


def _differences(sample: _FoundSample, entry: Any) -> list[str]:
    """What a row of the index says that is not so."""
    faults = []
    if (sample.offset, sample.length) != (int(entry["offset"]), int(entry["length"])):
        faults.append("the image does not lie where the index says")
    elif sample.crc32 != int(entry["crc32"]):
        faults.append("the crc32 of the image is not the index's")
    if sample.label != int(entry["label"]):
        faults.append("the label in KEY.cls is not the index's")
    return faults
