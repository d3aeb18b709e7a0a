"""The index of a shard: where each image member lies in the tar, how long it is, its crc32 and its label.

In our own tars the key stands in the tar header. In a tar that others wrote the names are theirs, so its index holds the key too.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.data.address import Place
from aplantida_dist.errors import UserError

INDEX_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4"), ("label", "<u4")])
"""20 bytes a sample, no header. `offset` is that of the image's bytes; its tar header is the 512 bytes before."""

KEY_BYTES = 12
FOREIGN_INDEX_DTYPE = np.dtype(
    [
        *((name, INDEX_DTYPE[name]) for name in INDEX_DTYPE.names or ()),
        ("key", f"V{KEY_BYTES}"),
        ("metadata_offset", "<u8"),
        ("metadata_length", "<u4"),
    ]
)
"""44 bytes a sample of a tar that others wrote: also its key, and where its .json lies (length 0: it has none)."""

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
HEADER_BYTES = 512
MAX_PICTURE_BYTES = 512 * 2**20
MAX_METADATA_BYTES = 2**24
"""Of a KEY.json: sixteen times the longest record that a build takes in. What claims more is refused before it is read."""
REMEDY = "run `python shards/verify.py DATASET` to see everything that is wrong"


class ShardError(UserError):
    """A shard or its index is absent, cut, changed, or not what the manifest says."""


class ChangedMemberError(ShardError):
    """The bytes of one sample have changed; its tar header still says whose they are."""

    def __init__(self, text: str, *, sample_key: str) -> None:
        super().__init__(text)
        self.sample_key = sample_key


@dataclass(frozen=True)
class Member:
    """The image of one sample, as read from its shard."""

    sample_key: str
    content: bytes


def index_dtype(*, is_foreign: bool) -> np.dtype[Any]:
    """The columns of an index: those of our own tars, or of tars that others wrote."""
    return FOREIGN_INDEX_DTYPE if is_foreign else INDEX_DTYPE


def read_index(path: Path, *, num_samples: int, sha256: str, is_foreign: bool = False) -> NDArray[Any]:
    """Read an index (structured array, one entry a sample, in the tar's order) and check its digest."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: the index cannot be read: {error.strerror}; {REMEDY}") from error
    return parse_index(content, path=path, num_samples=num_samples, sha256=sha256, is_foreign=is_foreign)


def parse_index(content: bytes, *, path: Place, num_samples: int, sha256: str, is_foreign: bool) -> NDArray[Any]:
    """What `read_index` makes of the bytes that lie at a place."""
    dtype = index_dtype(is_foreign=is_foreign)
    expected_bytes = num_samples * dtype.itemsize
    if len(content) != expected_bytes:
        raise ShardError(
            f"{path}: the index holds {len(content)} bytes, expected {expected_bytes} for {num_samples} samples; {REMEDY}"
        )
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ShardError(f"{path}: the index has changed (its sha256 differs from the manifest); {REMEDY}")
    return np.frombuffer(content, dtype=dtype)


def require_within(index: NDArray[Any], *, shard_bytes: int, path: Place) -> None:
    """Raise ShardError, before anything is read, for an index with a row that points outside its shard or at more than is read."""
    stretches = [("image", "offset", "length", HEADER_BYTES, MAX_PICTURE_BYTES)]
    if index.dtype == FOREIGN_INDEX_DTYPE:
        stretches.append((".json", "metadata_offset", "metadata_length", 0, MAX_METADATA_BYTES))
    for what, offset, length, first, longest in stretches:
        lengths = index[length].astype(np.uint64)
        # Subtracted and not added, because a sum of uint64 wraps.
        is_outside = (index[offset] < first) | (lengths > shard_bytes) | (lengths > longest)
        is_outside |= index[offset] > shard_bytes - np.minimum(lengths, shard_bytes)
        if is_outside.any():
            row = int(np.flatnonzero(is_outside)[0])
            raise ShardError(
                f"{path}: row {row} puts an {what} of {int(index[length][row])} bytes at {int(index[offset][row])}, "
                f"which its shard of {shard_bytes} bytes does not hold, or more than is read at once; {REMEDY}"
            )


def require_labels(index: NDArray[Any], *, class_counts: Mapping[str, int], path: Place) -> None:
    """Raise ShardError for an index whose labels are not those that the manifest counts in its shard: samples by class index.

    The manifest's own lie in the class map, so that no label is one that a head has no logit for.
    """
    counted = {int(label): count for label, count in class_counts.items() if count}
    labels, counts = (found.tolist() for found in np.unique(index["label"], return_counts=True))
    found = dict(zip(labels, counts, strict=True))
    if found == counted:
        return
    uncounted = [label for label in labels if label not in counted]
    if uncounted:
        row = int(np.flatnonzero(np.isin(index["label"], uncounted))[0])
        raise ShardError(
            f"{path}: row {row} has the label {int(index['label'][row])}, of which the manifest counts no sample in this shard; {REMEDY}"
        )
    label = next(label for label, count in counted.items() if found.get(label, 0) != count)
    raise ShardError(
        f"{path}: {found.get(label, 0)} rows have the label {label}, the manifest counts {counted[label]}; {REMEDY}"
    )


def read_member(descriptor: int, entry: Any, *, shard_path: Place) -> Member:
    """Read one image with its key: a single `pread` of its tar header and its bytes, checked against the crc32.

    The key comes from the index where that holds it, else from the header.

    `entry` is one row of the index. Raises ShardError for a cut shard or a header that is not one, ChangedMemberError for a changed byte.
    """
    offset, length = int(entry["offset"]), int(entry["length"])
    try:
        block = os.pread(descriptor, HEADER_BYTES + length, offset - HEADER_BYTES)
    except OSError as error:
        raise ShardError(f"{shard_path}: cannot be read at offset {offset}: {error.strerror}; {REMEDY}") from error
    if len(block) != HEADER_BYTES + length:
        raise ShardError(
            f"{shard_path}: ends inside the sample at offset {offset}: {length} bytes expected, the shard is cut short; {REMEDY}"
        )
    sample_key = _key_of_entry(entry) or _key_of_header(block[:HEADER_BYTES], offset, shard_path)
    content = block[HEADER_BYTES:]
    if zlib.crc32(content) != int(entry["crc32"]):
        text = f"{shard_path}: sample {sample_key} at offset {offset} has changed (its crc32 differs from the index); {REMEDY}"
        raise ChangedMemberError(text, sample_key=sample_key)
    return Member(sample_key, content)


def read_key(descriptor: int, entry: Any, *, shard_path: Place) -> str:
    """Read only the key of a sample, from the index where that holds it, else from its tar header."""
    if sample_key := _key_of_entry(entry):
        return sample_key
    offset = int(entry["offset"])
    return _key_of_header(os.pread(descriptor, HEADER_BYTES, offset - HEADER_BYTES), offset, shard_path)


def keys_of_index(index: NDArray[Any]) -> list[str]:
    """The keys of a foreign tar's samples; it is not touched."""
    return [key.tobytes().hex() for key in index["key"]]


def _key_of_entry(entry: Any) -> str:
    """The key that a row of a foreign tar's index holds; empty for a row of our own."""
    return entry["key"].tobytes().hex() if entry.dtype == FOREIGN_INDEX_DTYPE else ""


def _key_of_header(header: bytes, offset: int, shard_path: Place) -> str:
    """The sample key in a tar header: the member's name up to the first dot of its last component."""
    try:
        name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    except tarfile.HeaderError as error:
        raise ShardError(f"{shard_path}: no tar header before offset {offset}: {error}; {REMEDY}") from None
    return split_member_name(name)[0]


def split_member_name(name: str) -> tuple[str, str]:
    """Split a tar member's name into (sample key, extension) as WebDataset does: at the first dot of its last component."""
    folder, _, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def read_metadata(descriptor: int, index: NDArray[Any], member_index: int) -> dict[str, Any]:
    """Read what a sample's KEY.json holds; empty where it has none. Raises ShardError where that is no JSON."""
    raw = read_metadata_bytes(descriptor, index, member_index)
    if not raw:
        return {}
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        key = read_key(descriptor, index[member_index], shard_path=Path("shard"))
        raise ShardError(f"sample {key}: its KEY.json is no JSON: {error}; {REMEDY}") from None
    return content if isinstance(content, dict) else {"content": content}


def read_metadata_bytes(descriptor: int, index: NDArray[Any], member_index: int) -> bytes:
    """Read the bytes of a sample's KEY.json; none where it has none.

    The index of a foreign tar says where it lies. In our own a sample's members stand together: it lies between the image before
    and the image after, mostly behind its own.
    """
    entry = index[member_index]
    if index.dtype == FOREIGN_INDEX_DTYPE:
        return os.pread(descriptor, int(entry["metadata_length"]), int(entry["metadata_offset"]))
    key = read_key(descriptor, entry, shard_path=Path("shard"))
    before = _end_of_image(index[member_index - 1]) if member_index else 0
    after = int(index[member_index + 1]["offset"]) if member_index + 1 < len(index) else os.fstat(descriptor).st_size
    stretches = ((_end_of_image(entry), after), (before, int(entry["offset"]) - HEADER_BYTES))
    return next((raw for first, last in stretches if (raw := _find_json(descriptor, key, first, last))), b"")


def _find_json(descriptor: int, key: str, first: int, last: int) -> bytes:
    """The content of KEY.json among the whole members from `first` to `last`; none where it is not there."""
    position = first
    while position + HEADER_BYTES <= last:
        try:
            header = tarfile.TarInfo.frombuf(os.pread(descriptor, HEADER_BYTES, position), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            break  # the zeros at the end of the tar
        most = min(last - position - HEADER_BYTES, MAX_METADATA_BYTES)
        is_json = split_member_name(header.name) == (key, "json")
        if header.size < 0 or (is_json and header.size > most):
            raise ShardError(
                f"sample {key}: the tar header at byte {position} states {header.size} bytes, at most {most} can be there; {REMEDY}"
            )
        if is_json:
            return os.pread(descriptor, header.size, position + HEADER_BYTES)
        position += HEADER_BYTES + -(-header.size // HEADER_BYTES) * HEADER_BYTES
    return b""


def _end_of_image(entry: Any) -> int:
    """The offset of the header that follows an image: its end, rounded up to the tar's blocks."""
    return -(-(int(entry["offset"]) + int(entry["length"])) // HEADER_BYTES) * HEADER_BYTES
