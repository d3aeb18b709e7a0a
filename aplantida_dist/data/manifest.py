"""The manifest: the list of a split's shards with counts and digests, the authority on what an epoch must cover."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from aplantida_dist.data.address import Place
from aplantida_dist.errors import UserError
from aplantida_dist.files import digest, read_json, write_json, write_whole

MANIFEST_FILE = "manifest.json"
IDENTITIES_FILE = "identities.bin"
"""Beside the manifest, who its samples are, in the stored order: so that nobody has to read every shard's headers for it."""
IDENTITY_DTYPE = np.dtype("<i8")
MANIFEST_VERSION = 1
SPLITS = ("train", "val", "test")
MAX_QUALITY = 95
"""Of a JPEG: above it the bytes grow and the picture hardly gains."""


class ManifestError(UserError):
    """A manifest is absent, broken, or at odds with what lies beside it."""


Count = Annotated[int, Field(ge=0, le=2**53)]
"""A number of samples or bytes; more than every JSON reader keeps exactly is a mistake."""
ClassCounts = dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")], Count]
"""Samples by class index, in decimal as JSON wants its keys to be text."""


def _without_nul(url: str) -> str:
    if "\0" in url or "%00" in url:
        raise ValueError("holds a NUL, which no path does")
    return url


class Shard(BaseModel):
    """One tar of samples, as the manifest describes it. `name` is a plain file name; the index lies beside it as `.idx`.

    A foreign shard is a tar that others wrote, of which the index lists the samples of this split: `url` says where it lies, and
    of `name` only the index is there. For our own shards `url` is None, and then it is not written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar$")
    num_samples: Count
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    index_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    class_counts: ClassCounts
    url: Annotated[str, Field(pattern=r"^file:///"), AfterValidator(_without_nul)] | None = None

    @property
    def index_name(self) -> str:
        return f"{self.name.removesuffix('.tar')}.idx"

    @property
    def is_foreign(self) -> bool:
        return self.url is not None

    @property
    def file_names(self) -> tuple[str, ...]:
        """What of this shard lies beside the manifest."""
        return (self.index_name,) if self.is_foreign else (self.name, self.index_name)

    def tar_path(self, split_dir: Path) -> Path:
        """Where the tar of a dataset on this disk lies: beside the manifest, or where its url says."""
        return split_dir / self.name if self.url is None else self._named_path()

    def tar_place(self, split_dir: Place) -> Place:
        """The same of a dataset anywhere."""
        return split_dir / self.name if self.url is None else self._named_path()

    def _named_path(self) -> Path:
        assert self.url is not None
        return Path(os.fsdecode(unquote_to_bytes(self.url.removeprefix("file://"))))

    @model_serializer(mode="wrap")
    def _without_absent_url(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Manifests from before there were foreign shards keep their bytes.
        content: dict[str, Any] = serialize(self)
        if self.url is None:
            content.pop("url", None)
        return content


class Reencoding(BaseModel):
    """How pictures were made smaller: those whose longer side exceeded `max_side` pixels are JPEGs of this side and quality."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    max_side: int = Field(ge=1)
    quality: int = Field(ge=1, le=MAX_QUALITY)


class Manifest(BaseModel):
    """What one split holds. Totals are stated beside the shards and must agree with them.

    `licence` names the most restrictive licence inside; None where no sample states one. `parent` is the digest of the manifest
    that a subset was taken from; None where it was built from pictures. `reencoding` is None where every picture has the bytes
    that its key is made of. What is None is not written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: int
    split: str
    class_map_digest: str
    num_samples: Count
    identity_digest: str = Field(pattern=r"^[0-9a-f]{16}$")
    class_counts: ClassCounts
    shards: tuple[Shard, ...] = Field(strict=False)
    licence: str | None = None
    parent: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    reencoding: Reencoding | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Manifests from before these fields keep their bytes and their digest.
        content: dict[str, Any] = serialize(self)
        return {name: value for name, value in content.items() if value is not None}

    @property
    def digest(self) -> str:
        """The sha256 of the content: what a checkpoint and the history remember a split by. Where foreign tars lie is no part of it."""
        return digest(self.model_dump(mode="json", exclude={"shards": {"__all__": {"url"}}}))

    def counts_of_classes(self, num_classes: int) -> list[int]:
        """Samples of each class index, 0 for classes that this split does not hold."""
        return [self.class_counts.get(str(index), 0) for index in range(num_classes)]


def identity_of(sample_key: str) -> int:
    """The 64-bit identity of a sample: the first 8 bytes of the sha256 of its key, as a signed integer.

    Sums of identities (modulo 2^64) prove which samples were read, whatever the order.
    """
    return int.from_bytes(hashlib.sha256(sample_key.encode()).digest()[:8], "little", signed=True)


def identity_digest(identity_sum: int) -> str:
    """Write a sum of identities, modulo 2^64, as the 16 hex digits of manifests and history rows."""
    return f"{identity_sum % 2**64:016x}"


def make_manifest(
    *,
    split: str,
    class_map_digest: str,
    shards: tuple[Shard, ...],
    identity_sum: int,
    licence: str | None = None,
    parent: str | None = None,
    reencoding: Reencoding | None = None,
) -> Manifest:
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
        licence=licence,
        parent=parent,
        reencoding=reencoding,
    )


def save_manifest(manifest: Manifest, split_dir: Path) -> None:
    """Write manifest.json into the split's folder, whole or not at all."""
    write_json(split_dir / MANIFEST_FILE, manifest.model_dump(mode="json"))


def save_identities(identities: Iterable[int], split_dir: Path) -> None:
    """Write the identities of a split's samples beside its manifest, in the stored order."""
    write_whole(split_dir / IDENTITIES_FILE, np.fromiter(identities, dtype=IDENTITY_DTYPE).tobytes())


def load_manifest(path: Place) -> Manifest:
    """Read a manifest and check that its totals agree with its shards."""
    manifest = parse_manifest(path)
    for fault in faults_of_totals(manifest):
        raise ManifestError(f"{path}: {fault}; rebuild the dataset")
    return manifest


def parse_manifest(path: Place) -> Manifest:
    """Read a manifest whose totals may be wrong: `shards/verify.py` goes on to its shards, everything else uses `load_manifest`."""
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
    return manifest


def faults_of_totals(manifest: Manifest) -> list[str]:
    """What the manifest says that contradicts itself: totals that are not the sums over the shards, a shard named twice."""
    faults = []
    rebuilt = make_manifest(
        split=manifest.split,
        class_map_digest=manifest.class_map_digest,
        shards=manifest.shards,
        identity_sum=int(manifest.identity_digest, 16),
    )
    if rebuilt.num_samples != manifest.num_samples:
        faults.append(f"states {manifest.num_samples} samples, its shards add up to {rebuilt.num_samples}")
    if rebuilt.class_counts != manifest.class_counts:
        faults.append("the class counts are not the sums over the shards")
    for shard in manifest.shards:
        if sum(shard.class_counts.values()) != shard.num_samples:
            faults.append(
                f"{shard.name} states {shard.num_samples} samples but its classes add up to {sum(shard.class_counts.values())}"
            )
    if len({shard.name for shard in manifest.shards}) != len(manifest.shards):
        faults.append("a shard name stands more than once")
    return faults
