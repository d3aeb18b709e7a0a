"""The writer: samples in, shards with their index and the manifest out; the same samples give the same bytes."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from aplantida_dist.data.index import INDEX_DTYPE, keys_of_index
from aplantida_dist.data.manifest import (
    Manifest,
    Reencoding,
    Shard,
    identity_of,
    make_manifest,
    save_identities,
    save_manifest,
)
from aplantida_dist.errors import UserError
from aplantida_dist.files import reason_of
from aplantida_dist.shards.behind import Behind
from aplantida_dist.shards.header import ustar_header
from aplantida_dist.shards.views import View

BLOCK_BYTES = 1 << 20
BLOCKS_AHEAD = 4
"""Blocks that may wait to be digested and written: a block is so many bytes, or one sample that is longer."""
SHARDS_AHEAD = 2
"""Full shards that may wait to be on disk while the next one is written."""


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
    reencoding: Reencoding | None = None,
) -> Manifest:
    """Write the samples of a split, in the order in which they come, into a new folder; returns its manifest.

    A few blocks are held at a time: one thread digests and writes while the next samples come, another syncs what is full.
    After the shards come the indexes of the views, whose tars stay where they are. Every file is synced to disk; a disk that is full or read-only is a WriterError.
    """
    with _told(split_dir, num_bytes=0):
        split_dir.mkdir()
    shards: list[Future[Shard]] = []
    identities = array("q")
    # The files close last: on the way out of an error a thread may still be writing.
    with ExitStack() as files, Behind(ahead=BLOCKS_AHEAD) as writing, Behind(ahead=SHARDS_AHEAD) as syncing:
        open_shard: _OpenShard | None = None
        for sample in samples:
            if open_shard is not None and open_shard.is_full_for(sample, limits):
                shards.append(open_shard.finish(syncing))
                open_shard = None
            if open_shard is None:
                open_shard = _OpenShard(split_dir / f"shard-{len(shards):06d}.tar", writing=writing, files=files)
            open_shard.add(sample)
            identities.append(identity_of(sample.sample_key))
        if open_shard is not None:
            shards.append(open_shard.finish(syncing))
        written = [shard.result() for shard in shards]
    for view in views:
        written.append(_write_view(view, split_dir / f"shard-{len(written):06d}.tar"))
        identities.extend(map(identity_of, keys_of_index(view.index)))
    manifest = make_manifest(
        split=split,
        class_map_digest=class_map_digest,
        shards=tuple(written),
        identity_sum=sum(identities),
        licence=licence,
        parent=parent,
        reencoding=reencoding,
    )
    save_identities(identities, split_dir)
    save_manifest(manifest, split_dir)
    return manifest


def num_bytes_of_sample(*, num_image_bytes: int, num_metadata_bytes: int) -> int:
    """The bytes that a sample takes in a tar, for labels below 10^512."""
    return 4 * tarfile.BLOCKSIZE + _padded(num_image_bytes) + _padded(num_metadata_bytes)


class _OpenShard:
    """A tar that grows by whole samples: its digest, its index and its class counts grow with it.

    The members are laid end to end here, so that every offset is known before it is written; the bytes are those of
    `tarfile.open(mode="w", format=USTAR_FORMAT)`. Whole blocks are handed on to be digested and written.
    """

    def __init__(self, path: Path, *, writing: Behind, files: ExitStack) -> None:
        self.path = path
        self.writing = writing
        with _told(path, num_bytes=0):
            self.file = path.open("xb")
        files.callback(_close, self.file)
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.entries: list[tuple[int, int, int, int]] = []
        self.block: list[bytes] = []
        self.num_handed_on = 0

    def is_full_for(self, sample: Sample, limits: ShardLimits) -> bool:
        grown_bytes = self.num_bytes + num_bytes_of_sample(
            num_image_bytes=len(sample.image), num_metadata_bytes=len(sample.metadata)
        )
        return len(self.entries) >= limits.num_samples or grown_bytes > limits.num_bytes

    def add(self, sample: Sample) -> None:
        offset = self._add_member(f"{sample.sample_key}.{sample.image_suffix}", sample.image)
        # Not behind: a digest that takes 10 µs there waits longer for the interpreter's lock.
        self.entries.append((offset, len(sample.image), zlib.crc32(sample.image), sample.label))
        self._add_member(f"{sample.sample_key}.cls", b"%d" % sample.label)
        self._add_member(f"{sample.sample_key}.json", sample.metadata)
        if self.num_bytes - self.num_handed_on >= BLOCK_BYTES:
            self._hand_on()

    def finish(self, syncing: Behind) -> Future[Shard]:
        """End the tar; in time it is on disk with its index beside it, and described."""
        self._append(bytes(2 * tarfile.BLOCKSIZE))
        self._append(bytes(-self.num_bytes % tarfile.RECORDSIZE))
        return syncing.do(partial(self._seal, self._hand_on()))

    def _add_member(self, name: str, content: bytes) -> int:
        """Append one file of the tar; returns the offset of its content."""
        self._append(ustar_header(name, len(content)))
        offset = self.num_bytes
        self._append(content)
        self._append(bytes(-len(content) % tarfile.BLOCKSIZE))
        return offset

    def _append(self, piece: bytes) -> None:
        self.block.append(piece)
        self.num_bytes += len(piece)

    def _hand_on(self) -> Future[None]:
        block, self.block, self.num_handed_on = self.block, [], self.num_bytes
        return self.writing.do(partial(self._write, block))

    def _write(self, block: list[bytes]) -> None:
        content = b"".join(block)
        with _told(self.path, num_bytes=len(content)):
            self.file.write(content)
            self.file.flush()
        self.sha256.update(content)

    def _seal(self, written: Future[None]) -> Shard:
        """Once the last block is written: sync the tar, write the index beside it, and describe both."""
        written.result()
        with _told(self.path, num_bytes=self.num_bytes), self.file:
            os.fsync(self.file.fileno())
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


def _padded(num_bytes: int) -> int:
    """The bytes that a member's content takes in a tar: whole blocks of 512."""
    return num_bytes + -num_bytes % tarfile.BLOCKSIZE


def _write_index(index: np.ndarray[Any, np.dtype[Any]], path: Path) -> None:
    with _told(path, num_bytes=index.nbytes), path.open("xb") as file:
        file.write(index.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _close(file: IO[bytes]) -> None:
    # Closing flushes, and on a full disk that fails again, for the reason that is being raised already.
    with suppress(OSError):
        file.close()


@contextmanager
def _told(path: Path, *, num_bytes: int) -> Iterator[None]:
    """Make what the system refuses a WriterError that names the file and, on a full disk, the bytes that it lacks."""
    try:
        yield
    except OSError as error:
        raise WriterError(
            f"{path}: could not be written: {reason_of(error, path, num_bytes=num_bytes)}; make room or choose another --out"
        ) from error
