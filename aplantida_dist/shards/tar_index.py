"""The indexing of a tar that others wrote: one row a sample, the sha256 of the whole, and what its .json and .cls hold."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tarfile import TarInfo
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.data.index import FOREIGN_INDEX_DTYPE, KEY_BYTES
from aplantida_dist.errors import UserError
from aplantida_dist.files import sha256_of_file
from aplantida_dist.shards.members import read_tar_members
from aplantida_dist.shards.source import IndexedTar, text_of_name
from aplantida_dist.shards.tar_samples import Misfit, TarSample, find_samples

PICKLE_SUFFIXES = ("pickle", "pkl", "pt", "pth", "pyd")


class TarError(UserError):
    """A tar that is damaged, or that changed while it was used."""


@dataclass(frozen=True, slots=True)
class FoundSample:
    """A sample in a tar: the name and place of its image, the bytes of its .json and .cls, None where it has none."""

    name: str
    offset: int
    num_bytes: int
    metadata: bytes | None
    label: bytes | None


@dataclass(frozen=True)
class TarFinding:
    """What indexing a tar gave: `samples` are those of the rows, in their order."""

    tar: IndexedTar
    samples: tuple[FoundSample, ...]
    misfits: tuple[Misfit, ...]


def index_tar(path: Path) -> TarFinding:
    """Read a tar once for its digest and once for its samples, both at the same time.

    Raises TarError where it is damaged: what a tar holds behind a cut or a flipped bit is not known, so nothing of it is used.
    """
    try:
        status = path.stat()
        with ThreadPoolExecutor(1) as beside:  # hashing holds no lock, so it costs no time where there are two cores
            sha256 = beside.submit(sha256_of_file, path)
            listed = read_tar_members(path)
            if listed.fault:
                raise TarError(f"{path}: {listed.fault}; fetch it again, or leave it out")
            _require_no_pickle(path, listed.members)
            samples, misfits = find_samples(listed.members)
            rows, found = _read_samples(path, samples)
            tar = IndexedTar(str(path), status.st_size, status.st_mtime_ns, sha256.result(), rows)
    except OSError as error:
        raise TarError(f"{path}: cannot be read: {error.strerror}; make it readable or leave it out") from error
    return TarFinding(tar, tuple(found), tuple(misfits))


def require_unchanged(tars: Iterable[IndexedTar]) -> None:
    """Raise TarError for the first tar that is gone, or has another size or time than when it was indexed."""
    for tar in tars:
        try:
            status = os.stat(tar.path)
        except OSError as error:
            raise TarError(
                f"{tar.path}: cannot be read any more: {error.strerror}; leave the tars alone and build again"
            ) from error
        if (status.st_size, status.st_mtime_ns) != (tar.num_bytes, tar.modified_ns):
            raise TarError(f"{tar.path}: changed while the dataset was built; leave the tars alone and build again")


def _require_no_pickle(path: Path, members: Iterable[TarInfo]) -> None:
    """Nothing here unpickles, but the tar stays where it lies and other readers, webdataset among them, would."""
    for member in members:
        suffix = member.name.rpartition(".")[2].lower()
        if suffix in PICKLE_SUFFIXES:
            raise TarError(
                f"{path}: holds {text_of_name(member.name)}: a .{suffix} is read by unpickling, which can run code; write the tar without it"
            )


def _read_samples(path: Path, samples: list[TarSample]) -> tuple[NDArray[Any], list[FoundSample]]:
    rows: list[tuple[int, int, int, int, bytes, int, int]] = []
    found: list[FoundSample] = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for sample in samples:
            image, metadata = sample.image, sample.metadata
            crc32 = zlib.crc32(os.pread(descriptor, image.size, image.offset_data))
            where = (0, 0) if metadata is None else (metadata.offset_data, metadata.size)
            rows.append((image.offset_data, image.size, crc32, 0, bytes(KEY_BYTES), *where))
            contents = (_read(descriptor, file) for file in (metadata, sample.label))
            found.append(FoundSample(text_of_name(image.name), image.offset_data, image.size, *contents))
    finally:
        os.close(descriptor)
    return np.array(rows, dtype=FOREIGN_INDEX_DTYPE), found


def _read(descriptor: int, file: TarInfo | None) -> bytes | None:
    return None if file is None else os.pread(descriptor, file.size, file.offset_data)
