"""Datasets with pictures that are broken on purpose, after the build or behind the audit's back."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from aplantida_dist.data.index import INDEX_DTYPE, read_key


@dataclass(frozen=True)
class Sample:
    """One sample of a copied dataset: where its picture's bytes lie."""

    dataset_dir: Path
    split: str
    shard_index: int
    member_index: int

    @property
    def shard_path(self) -> Path:
        return self.dataset_dir / self.split / f"shard-{self.shard_index:06d}.tar"

    @property
    def index_path(self) -> Path:
        return self.shard_path.with_suffix(".idx")

    @property
    def offset(self) -> int:
        return int(self._entry["offset"])

    @property
    def label(self) -> int:
        return int(self._entry["label"])

    @property
    def sample_key(self) -> str:
        with self.shard_path.open("rb") as file:
            return read_key(file.fileno(), self._entry, shard_path=self.shard_path)

    @property
    def content(self) -> bytes:
        return self.shard_path.read_bytes()[self.offset : self.offset + int(self._entry["length"])]

    def overwrite(self, content: bytes) -> None:
        """Change the picture in its shard, whose index knows nothing of it: what a failing disk does."""
        with self.shard_path.open("r+b") as file:
            file.seek(self.offset)
            file.write(content.ljust(int(self._entry["length"]), b"\0"))

    def smuggle(self, content: bytes) -> None:
        """Change the picture with all its digests, as if the dataset had been built so."""
        self.overwrite(content)
        index = np.fromfile(self.index_path, dtype=INDEX_DTYPE)
        index[self.member_index]["length"] = len(content)
        index[self.member_index]["crc32"] = zlib.crc32(content)
        index.tofile(self.index_path)
        manifest_path = self.shard_path.with_name("manifest.json")
        manifest = json.loads(manifest_path.read_text())
        shard = manifest["shards"][self.shard_index]
        shard["index_sha256"] = hashlib.sha256(self.index_path.read_bytes()).hexdigest()
        shard["sha256"] = hashlib.sha256(self.shard_path.read_bytes()).hexdigest()
        manifest_path.write_text(json.dumps(manifest))

    @property
    def _entry(self) -> np.void:
        entry: np.void = np.fromfile(self.index_path, dtype=INDEX_DTYPE)[self.member_index]
        return entry


def copied(dataset_dir: Path, folder: Path) -> Path:
    """A copy of a dataset, to be broken."""
    return Path(shutil.copytree(dataset_dir, folder / "dataset"))


def broken(dataset_dir: Path, *places: tuple[str, int, int]) -> list[Sample]:
    """Flip a bit in the pictures at (split, shard, member)."""
    samples = [Sample(dataset_dir, *place) for place in places]
    for sample in samples:
        sample.overwrite(flipped(sample.content))
    return samples


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def cut(content: bytes) -> bytes:
    """The first half of a picture."""
    return content[: len(content) // 2]


def half_grey(content: bytes) -> bytes:
    """A JPEG that was cut and given its end mark again: libjpeg fills it with grey."""
    return cut(content) + b"\xff\xd9"


def bomb(content: bytes) -> bytes:
    """A JPEG whose header claims 60,000 × 60,000 pixels."""
    frame = next(i for i in range(len(content)) if content[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return content[: frame + 5] + struct.pack(">HH", 60_000, 60_000) + content[frame + 9 :]


def blank(content: bytes) -> bytes:
    """A black picture: what the first trainer put in the place of a failed download."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 36)).save(buffer, format="JPEG", quality=50)
    return buffer.getvalue()[: len(content)]
