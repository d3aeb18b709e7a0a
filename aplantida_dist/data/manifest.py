"""The manifest: the list of a split's shards with counts and digests, the authority on what an epoch must cover."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aplantida_dist.errors import UserError
from aplantida_dist.files import digest, read_json, write_json

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
SPLITS = ("train", "val", "test")


class ManifestError(UserError):
    """A manifest is absent, broken, or at odds with what lies beside it."""


class Shard(BaseModel):
    """One tar of samples, as the manifest describes it. `name` is a plain file name; the index lies beside it as `.idx`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar$")
    num_samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    index_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    class_counts: dict[str, int]

    @property
    def index_name(self) -> str:
        return f"{self.name.removesuffix('.tar')}.idx"


class Manifest(BaseModel):
    """What one split holds. Totals are stated beside the shards and must agree with them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: int
    split: str
    class_map_digest: str
    num_samples: int = Field(ge=0)
    identity_digest: str = Field(pattern=r"^[0-9a-f]{16}$")
    class_counts: dict[str, int]
    shards: tuple[Shard, ...] = Field(strict=False)

    @property
    def digest(self) -> str:
        """The sha256 of the content: what a checkpoint and the history remember a split by."""
        return digest(self.model_dump(mode="json"))

    def counts_of_classes(self, num_classes: int) -> list[int]:
        """Samples of each class index, 0 for classes that this split does not hold."""
        return [self.class_counts.get(str(index), 0) for index in range(num_classes)]


@dataclass(frozen=True)
class Split:
    """A split of a dataset, opened: its manifest and where its shards lie."""

    split_dir: Path
    manifest: Manifest

    @cached_property
    def digest(self) -> str:
        return self.manifest.digest

    def shard_path(self, shard_index: int) -> Path:
        """The local path of this shard's tar. The one seam through which a remote dataset will come, by way of a cache."""
        return self.split_dir / self.manifest.shards[shard_index].name

    def index_path(self, shard_index: int) -> Path:
        """The local path of this shard's index."""
        return self.split_dir / self.manifest.shards[shard_index].index_name


def identity_of(sample_key: str) -> int:
    """The 64-bit identity of a sample: the first 8 bytes of the sha256 of its key, as a signed integer.

    Sums of identities (modulo 2^64) prove which samples were read, whatever the order.
    """
    return int.from_bytes(hashlib.sha256(sample_key.encode()).digest()[:8], "little", signed=True)


def identity_digest(identity_sum: int) -> str:
    """Write a sum of identities, modulo 2^64, as the 16 hex digits of manifests and history rows."""
    return f"{identity_sum % 2**64:016x}"


def make_manifest(*, split: str, class_map_digest: str, shards: tuple[Shard, ...], identity_sum: int) -> Manifest:
    """Assemble a manifest; its totals are the sums over its shards."""
    class_counts: Counter[str] = Counter()
    for shard in shards:
        class_counts.update(shard.class_counts)
    return Manifest(
        version=MANIFEST_VERSION,
        split=split,
        class_map_digest=class_map_digest,
        num_samples=sum(shard.num_samples for shard in shards),
        identity_digest=identity_digest(identity_sum),
        class_counts=dict(sorted(class_counts.items(), key=lambda item: int(item[0]))),
        shards=shards,
    )


def save_manifest(manifest: Manifest, split_dir: Path) -> None:
    """Write manifest.json into the split's folder, whole or not at all."""
    write_json(split_dir / MANIFEST_FILE, manifest.model_dump(mode="json"))


def load_manifest(path: Path) -> Manifest:
    """Read a manifest and check that its totals agree with its shards."""
    remedy = "build the dataset with `python shards/build.py`"
    content = read_json(path, what="manifest", remedy=remedy)
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ManifestError(f"{path}: {place or 'content'}: {first['msg']}; {remedy}") from None
    if manifest.version != MANIFEST_VERSION:
        raise ManifestError(
            f"{path}: version {manifest.version}, this program reads version {MANIFEST_VERSION}; rebuild the dataset"
        )
    _require_totals(manifest, path)
    return manifest


def open_split(dataset_dir: Path, split: str) -> Split:
    """Open one split of a dataset by its manifest; ManifestError or UserError says what is absent."""
    if not dataset_dir.is_dir():
        raise ManifestError(
            f"{dataset_dir}: no dataset here; build one with `python shards/build.py --from-folder PICTURES --out {dataset_dir}`"
        )
    split_dir = dataset_dir / split
    if not split_dir.is_dir():
        found = [name for name in SPLITS if (dataset_dir / name / MANIFEST_FILE).is_file()]
        raise ManifestError(
            f"{dataset_dir}: has no split {split!r}, only {', '.join(found) or 'none at all'}; choose one of them"
        )
    return Split(split_dir, load_manifest(split_dir / MANIFEST_FILE))


def _require_totals(manifest: Manifest, path: Path) -> None:
    """The stated totals must be the sums over the shards, and shard names distinct."""
    rebuilt = make_manifest(
        split=manifest.split,
        class_map_digest=manifest.class_map_digest,
        shards=manifest.shards,
        identity_sum=int(manifest.identity_digest, 16),
    )
    if rebuilt.num_samples != manifest.num_samples or rebuilt.class_counts != manifest.class_counts:
        raise ManifestError(
            f"{path}: the totals do not agree with the shards ({manifest.num_samples} samples stated, {rebuilt.num_samples} in the shards); rebuild the dataset"
        )
    for shard in manifest.shards:
        if sum(shard.class_counts.values()) != shard.num_samples:
            raise ManifestError(
                f"{path}: {shard.name} states {shard.num_samples} samples but its classes add up to {sum(shard.class_counts.values())}; rebuild the dataset"
            )
    names = [shard.name for shard in manifest.shards]
    if len(set(names)) != len(names):
        raise ManifestError(f"{path}: a shard name stands more than once; rebuild the dataset")
