"""The writer: samples in, shards with their index and the manifest out; the same samples give the same bytes."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aplantida_dist.data.index import INDEX_DTYPE, keys_of_index
from aplantida_dist.data.manifest import Manifest, Shard, identity_of, make_manifest, save_manifest
from aplantida_dist.errors import UserError
from aplantida_dist.shards.views import View

MEMBER_MODE = 0o644


class WriterError(UserError):
    """Shards that cannot be written."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its label, ready to be written. The key holds no dot; `metadata` is JSON."""

    sample_key: str
    image_suffix: str
    image: bytes
    label: int
    metadata: bytes


@dataclass(frozen=True)
class ShardLimits:
    """A shard ends at `num_samples`, or before the sample whose files would bring it above `num_bytes`; it holds one at least."""

    num_samples: int = 1000
    num_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.num_bytes < 1:
            raise WriterError(
                f"a shard of at most {self.num_samples} samples and {self.num_bytes} bytes holds nothing; give at least 1 of each"
            )


def write_split(
    samples: Iterable[Sample],
    split_dir: Path,
    *,
    split: str,
    class_map_digest: str,
    limits: ShardLimits,
    licence: str | None = None,
    views: Sequence[View] = (),
    parent: str | None = None,
) -> Manifest:
    """Write the samples of a split, in the order in which they come, into a new folder; returns its manifest.

    One sample is held at a time. After the shards come the indexes of the views, whose tars stay where they are. Every file is synced to disk; a disk that is full or read-only is a WriterError.
    """
    shards: list[Shard] = []
    identity_sum = 0
    open_shard: _OpenShard | None = None
    try:
        split_dir.mkdir()
        for sample in samples:
            if open_shard is not None and open_shard.is_full_for(sample, limits):
                shards.append(open_shard.finish())
                open_shard = None
            if open_shard is None:
                open_shard = _OpenShard(split_dir / f"shard-{len(shards):06d}.tar")
            open_shard.add(sample)
            identity_sum += identity_of(sample.sample_key)
        if open_shard is not None:
            shards.append(open_shard.finish())
            open_shard = None
        for view in views:
            shards.append(_write_view(view, split_dir / f"shard-{len(shards):06d}.tar"))
            identity_sum += sum(map(identity_of, keys_of_index(view.index)))
    except OSError as error:
        raise WriterError(
            f"{split_dir}: could not be written: {error.strerror}; make room or choose another --out"
        ) from error
    finally:
        if open_shard is not None:
            open_shard.abandon()
    manifest = make_manifest(
        split=split,
        class_map_digest=class_map_digest,
        shards=tuple(shards),
        identity_sum=identity_sum,
        licence=licence,
        parent=parent,
    )
    save_manifest(manifest, split_dir)
    return manifest


class _OpenShard:
    """A tar that grows by whole samples: its digest, its index and its class counts grow with it.

    The headers are the standard library's; the members are laid end to end here, so that every offset is known as it is
    written and the bytes are those of `tarfile.open(mode="w", format=USTAR_FORMAT)`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("xb", buffering=1 << 20)
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.entries: list[tuple[int, int, int, int]] = []

    def is_full_for(self, sample: Sample, limits: ShardLimits) -> bool:
        grown_bytes = self.num_bytes + sum(
            tarfile.BLOCKSIZE + _padded(len(content)) for _, content in _members_of(sample)
        )
        return len(self.entries) >= limits.num_samples or grown_bytes > limits.num_bytes

    def add(self, sample: Sample) -> None:
        for suffix, content in _members_of(sample):
            offset = self._add_member(f"{sample.sample_key}.{suffix}", content)
            if suffix == sample.image_suffix:
                self.entries.append((offset, len(content), zlib.crc32(content), sample.label))

    def finish(self) -> Shard:
        """End the tar, write the index beside it, and describe both."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.num_bytes % tarfile.RECORDSIZE))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        index = np.array(self.entries, dtype=INDEX_DTYPE)
        shard = Shard(
            name=self.path.name,
            num_samples=len(self.entries),
            bytes=self.num_bytes,
            sha256=self.sha256.hexdigest(),
            index_sha256=hashlib.sha256(index.tobytes()).hexdigest(),
            class_counts=_class_counts_of(index),
        )
        _write_index(index, self.path.with_name(shard.index_name))
        return shard

    def abandon(self) -> None:
        # Closing flushes, and on a full disk that fails again, for the reason that is being raised already.
        with suppress(OSError):
            self.file.close()

    def _add_member(self, name: str, content: bytes) -> int:
        """Write one file of the tar; returns the offset of its content."""
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(content), MEMBER_MODE
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.num_bytes
        self._write(content)
        self._write(bytes(_padded(len(content)) - len(content)))
        return offset

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.sha256.update(content)
        self.num_bytes += len(content)


def _write_view(view: View, path: Path) -> Shard:
    """Write the index of a tar that others wrote, and describe both. `path` is where the tar would lie if it were ours."""
    shard = Shard(
        name=path.name,
        num_samples=len(view.index),
        bytes=view.tar.num_bytes,
        sha256=view.tar.sha256,
        index_sha256=hashlib.sha256(view.index.tobytes()).hexdigest(),
        class_counts=_class_counts_of(view.index),
        url=Path(view.tar.path).as_uri(),
    )
    _write_index(view.index, path.with_name(shard.index_name))
    return shard


def _class_counts_of(index: np.ndarray[Any, np.dtype[Any]]) -> dict[str, int]:
    counts = Counter(index["label"].tolist())
    return {str(label): counts[label] for label in sorted(counts)}


def _members_of(sample: Sample) -> tuple[tuple[str, bytes], ...]:
    """The files of a sample, (suffix, content), in the tar's order."""
    return (
        (sample.image_suffix, sample.image),
        ("cls", str(sample.label).encode()),
        ("json", sample.metadata),
    )


def _padded(num_bytes: int) -> int:
    """The bytes that a member's content takes in a tar: whole blocks of 512."""
    return num_bytes + -num_bytes % tarfile.BLOCKSIZE


def _write_index(index: np.ndarray[Any, np.dtype[Any]], path: Path) -> None:
    with path.open("xb") as file:
        file.write(index.tobytes())
        file.flush()
        os.fsync(file.fileno())
