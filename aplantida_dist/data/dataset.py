"""A dataset, opened for reading: its class map and its splits, and where each shard lies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.data.address import Address, AddressError, Place
from aplantida_dist.data.cache import Cache, Item
from aplantida_dist.data.classmap import CLASSES_FILE, ClassMap, load_class_map
from aplantida_dist.data.index import (
    REMEDY,
    ShardError,
    index_dtype,
    keys_of_index,
    parse_index,
    read_index,
    read_key,
    require_labels,
    require_within,
)
from aplantida_dist.data.manifest import (
    IDENTITIES_FILE,
    IDENTITY_DTYPE,
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    ManifestError,
    identity_digest,
    identity_of,
    load_manifest,
)
from aplantida_dist.data.sampling import IntArray
from aplantida_dist.files import digest

KEY_READERS = 8
"""Threads that read keys: from a cold disk one takes 200 µs a key, of which 80 are work (30 once the shards are cached)."""


@dataclass(frozen=True)
class Dataset:
    """A dataset, in a folder or at an address, and the class map that all its splits share; `cache` is None where it is read where it lies."""

    dataset_dir: Place
    class_map: ClassMap
    cache: Cache | None = None

    def has_split(self, name: str) -> bool:
        return (self.dataset_dir / name / MANIFEST_FILE).is_file()

    def open_split(self, name: str, *, max_samples: int | None = None) -> Split:
        """Open a split by its manifest, or the first `max_samples` of it. In a folder every shard must be there at its full size."""
        split_dir = self.dataset_dir / name
        if not self.has_split(name):
            found = ", ".join(known for known in SPLITS if self.has_split(known)) or "none at all"
            raise ManifestError(f"{self.dataset_dir}: has no split {name!r}, only {found}; build it or choose another")
        manifest = load_manifest(split_dir / MANIFEST_FILE)
        if manifest.class_map_digest != self.class_map.digest:
            raise ManifestError(
                f"{split_dir / MANIFEST_FILE}: was built with other classes than {self.dataset_dir / CLASSES_FILE} "
                "(their digests differ), so its labels mean something else; rebuild the dataset"
            )
        beyond = [label for label in manifest.class_counts if int(label) >= self.class_map.num_classes]
        if beyond:
            raise ManifestError(
                f"{split_dir / MANIFEST_FILE}: counts samples of the class {beyond[0]}, "
                f"{self.dataset_dir / CLASSES_FILE} has the classes 0 to {self.class_map.num_classes - 1}; rebuild the dataset"
            )
        if manifest.num_samples == 0 or max_samples == 0:
            raise ManifestError(
                f"{split_dir}: no samples to read (the manifest holds {manifest.num_samples}); an epoch needs at least one"
            )
        split = Split(split_dir, manifest, max_samples, cache=self.cache)
        if isinstance(split_dir, Path):
            # Elsewhere that would be 100,000 requests: there they are looked at as they come.
            split.require_shards(split_dir)
        return split


@dataclass(frozen=True)
class Split:
    """A split opened for reading. With `max_samples` it is the first so many samples of the manifest's order.

    With a `relabelling` a sample that the indexes label n has the label `relabelling[n]`: that of its class in another class map.
    """

    split_dir: Place
    manifest: Manifest
    max_samples: int | None = None
    relabelling: tuple[int, ...] | None = None
    cache: Cache | None = None

    def relabelled(self, labels: Sequence[int]) -> Split:
        """The same samples under the labels of another class map; `labels[n]` is what n becomes."""
        return replace(self, relabelling=tuple(labels))

    @property
    def name(self) -> str:
        return self.split_dir.name

    @cached_property
    def digest(self) -> str:
        """The manifest's digest; a limited or relabelled split is another split."""
        limited = f":{self.num_samples}" if self.is_limited else ""
        return (
            self.manifest.digest + limited + ("" if self.relabelling is None else f":{digest(list(self.relabelling))}")
        )

    @cached_property
    def shard_sizes(self) -> IntArray:
        """int64 [shards], the samples to read of each shard in the manifest's order."""
        sizes = self.manifest.shards.sizes
        if self.max_samples is None:
            return sizes
        before = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        limited: IntArray = np.clip(self.max_samples - before, 0, sizes)
        return limited

    @property
    def num_samples(self) -> int:
        return int(self.shard_sizes.sum())

    def counts_of_classes(self, num_classes: int) -> list[int]:
        """Samples of each class index: as the manifest counts them or, of a limited or relabelled split, the indexes of its shards."""
        if not self.is_limited and self.relabelling is None:
            return self.manifest.counts_of_classes(num_classes)
        counts: list[int] = np.bincount(self.labels, minlength=num_classes).tolist()
        return counts

    @property
    def is_limited(self) -> bool:
        return self.num_samples < self.manifest.num_samples

    @cached_property
    def labels(self) -> IntArray:
        """int64 [num_samples], the class index of each sample in the stored order, from the indexes of the shards."""
        read = [i for i, size in enumerate(self.shard_sizes) if size]
        with ThreadPoolExecutor(KEY_READERS) as readers:
            parts = readers.map(lambda i: self.read_index(i)["label"][: self.shard_sizes[i]], read)
            return np.concatenate(list(parts)).astype(np.int64)

    @cached_property
    def identity_digest(self) -> str:
        """What an epoch's sum of identities must be: the manifest's, or for a limited split that of its samples."""
        return _digest_of(self.identities) if self.is_limited else self.manifest.identity_digest

    @cached_property
    def identities(self) -> IntArray:
        """int64 [num_samples], who the samples are, in the stored order, from the file beside the manifest.

        Where an earlier version built a dataset without it they come from the keys in the tar headers; for a cached split every shard
        would have to come for that. Raises ShardError where they are not those of the manifest.
        """
        path = self.split_dir / IDENTITIES_FILE
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            if self.cache is None:
                return self._read_identities()
            raise ShardError(
                f"{path}: is not there; without it every shard would have to come before training begins: "
                "build the dataset again, as those of earlier versions have none"
            ) from None
        except OSError as error:
            raise ShardError(f"{path}: cannot be read: {error.strerror or error}; {REMEDY}") from error
        identities = np.frombuffer(content[: len(content) // 8 * 8], dtype=IDENTITY_DTYPE).astype(np.int64)
        if len(content) != 8 * self.manifest.num_samples or _digest_of(identities) != self.manifest.identity_digest:
            raise ShardError(f"{path}: does not hold the identities that the manifest sums up; {REMEDY}")
        return identities[: self.num_samples]

    def _read_identities(self) -> IntArray:
        with ThreadPoolExecutor(KEY_READERS) as readers:
            keys = readers.map(self.sample_keys, range(len(self.shard_sizes)))
            identities = np.array([identity_of(key) for shard in keys for key in shard], dtype=np.int64)
        if not self.is_limited and _digest_of(identities) != self.manifest.identity_digest:
            raise ShardError(
                f"{self.split_dir}: the samples have the identity digest {_digest_of(identities)}, the manifest says "
                f"{self.manifest.identity_digest}; {REMEDY}"
            )
        return identities

    def identity_digest_of(self, places: IntArray) -> str:
        """What the sum of the identities of these samples must be, each as often as it is named; int64 places in the stored order."""
        return _digest_of(self.identities[places])

    def shard_place(self, shard_index: int) -> Place:
        """Where this shard's tar lies: what an error names."""
        return self.manifest.shards[shard_index].tar_place(self.split_dir)

    def shard_path(self, shard_index: int) -> Path:
        """The local path of this shard's tar. Of a cached split, where the cache has it now, and may have it no more soon."""
        return self._local(self.shard_place(shard_index), self.tar_item(shard_index))

    def index_path(self, shard_index: int) -> Path:
        """The local path of this shard's index; likewise."""
        item = self.index_item(shard_index)
        return self._local(item.place, item)

    def tar_item(self, shard_index: int) -> Item:
        """This shard's tar as a cache takes it."""
        shard = self.manifest.shards[shard_index]
        return Item(self.shard_place(shard_index), shard.sha256, shard.bytes)

    def index_item(self, shard_index: int) -> Item:
        """This shard's index as a cache takes it."""
        shard = self.manifest.shards[shard_index]
        num_bytes = shard.num_samples * index_dtype(is_foreign=shard.is_foreign).itemsize
        return Item(self.split_dir / shard.index_name, shard.index_sha256, num_bytes)

    def _local(self, place: Place, item: Item) -> Path:
        if self.cache is not None:
            return self.cache.bring(item)
        assert isinstance(place, Path)  # `open_dataset` gives an address a cache
        return place

    def require_shards(self, split_dir: Path) -> None:
        """Raise ShardError for the first shard that is absent or not as long as the manifest says."""
        for shard in self.manifest.shards:
            path = shard.tar_path(split_dir)
            try:
                found_bytes = path.stat().st_size
            except OSError as error:
                raise ShardError(
                    f"{path}: the shard is not there ({error.strerror}); copy or rebuild the dataset"
                ) from None
            if found_bytes != shard.bytes:
                raise ShardError(
                    f"{path}: the shard has {found_bytes} bytes, the manifest says {shard.bytes}; copy or rebuild the dataset"
                )

    def read_index(self, shard_index: int) -> NDArray[Any]:
        """The index of a shard, checked against the manifest."""
        shard = self.manifest.shards[shard_index]
        item = self.index_item(shard_index)
        path = item.place
        told: dict[str, Any] = {"sha256": shard.index_sha256, "is_foreign": shard.is_foreign}
        if self.cache is None:
            index = read_index(self.index_path(shard_index), num_samples=shard.num_samples, **told)
        else:
            index = parse_index(self.cache.read(item), path=path, num_samples=shard.num_samples, **told)
        require_within(index, shard_bytes=shard.bytes, path=path)
        require_labels(index, class_counts=shard.class_counts, path=path)
        if self.relabelling is not None:
            index = index.copy()  # what was read is read-only
            index["label"] = np.array(self.relabelling)[index["label"]]
        return index

    def open_shard(self, shard_index: int) -> int:
        """A descriptor of a shard's tar, for the caller to close; ShardError where it cannot be opened, or is another by now."""
        path, expected_bytes = self.shard_place(shard_index), self.manifest.shards[shard_index].bytes
        try:
            if self.cache is not None:
                return self.cache.open(self.tar_item(shard_index))
            descriptor = os.open(self.shard_path(shard_index), os.O_RDONLY)
        except OSError as error:
            raise ShardError(
                f"{path}: the shard cannot be opened: {error.strerror}; rebuild or copy the dataset again"
            ) from error
        found_bytes = os.fstat(descriptor).st_size
        if found_bytes != expected_bytes:
            os.close(descriptor)
            raise ShardError(
                f"{path}: the shard has {found_bytes} bytes, the manifest says {expected_bytes}: it was cut or replaced since the "
                "run began; copy or rebuild the dataset"
            )
        return descriptor

    def sample_keys(self, shard_index: int) -> list[str]:
        """The keys of a shard's samples that are to be read, from its tar headers, or of a foreign shard from its index."""
        index, path = self.read_index(shard_index)[: self.shard_sizes[shard_index]], self.shard_place(shard_index)
        if self.manifest.shards[shard_index].is_foreign:
            return keys_of_index(index)
        descriptor = self.open_shard(shard_index)
        try:
            return [read_key(descriptor, entry, shard_path=path) for entry in index]
        finally:
            os.close(descriptor)


def _digest_of(identities: IntArray) -> str:
    """The digest of their sum; int64 wraps, which is the sum modulo 2^64 that is meant."""
    return identity_digest(int(identities.sum()))


def open_dataset(dataset_dir: Place, *, cache: Cache | None = None) -> Dataset:
    """Open a dataset by its class map; the error says where there is none. What lies at an address is read by way of a cache alone."""
    if cache is None and isinstance(dataset_dir, Address):
        raise AddressError(
            f"{dataset_dir}: is read by way of a cache; name a folder on this machine's own disk for it: data.cache_dir"
        )
    if not (dataset_dir / CLASSES_FILE).is_file():
        raise ManifestError(
            f"{dataset_dir}: no dataset here (no {CLASSES_FILE}); "
            f"build one with `python shards/build.py --from-folder PICTURES --out {dataset_dir}`"
        )
    return Dataset(dataset_dir, load_class_map(dataset_dir / CLASSES_FILE), cache)
