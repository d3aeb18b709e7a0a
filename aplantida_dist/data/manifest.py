"""The manifest: the list of a split's shards with counts and digests, the authority on what an epoch must cover."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, overload
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic_core import core_schema

from aplantida_dist.data.address import Place
from aplantida_dist.data.shard_columns import ShardColumns
from aplantida_dist.errors import UserError
from aplantida_dist.files import canonical_json, read_json, write_json, write_whole

MANIFEST_FILE = "manifest.json"
IDENTITIES_FILE = "identities.bin"
"""Beside the manifest, who its samples are, in the stored order: so that nobody has to read every shard's headers for it."""
IDENTITY_DTYPE = np.dtype("<i8")
MANIFEST_VERSION = 1
SPLITS = ("train", "val", "test")
MAX_QUALITY = 95
"""Of a JPEG: above it the bytes grow and the picture hardly gains."""


_NO_SHARDS = b'"shards":[]'
"""As canonical JSON has it. Inside of a text the quotation marks would be escaped."""


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


class Shards(Sequence[Shard]):
    """The shards of a manifest: a sequence that keeps columns, and makes a shard when it is asked for one."""

    def __init__(self, shards: Iterable[Shard] = ()) -> None:
        self._columns = ShardColumns()
        for shard in shards:
            self.add(shard)

    def add(self, shard: Shard) -> int:
        """Lay a shard behind the others; returns its place."""
        return self._columns.add(**dict(shard))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """int64 [shards], the samples of each."""
        return np.array(self._columns.num_samples, dtype=np.int64)

    @property
    def columns(self) -> ShardColumns:
        """What sums over all shards go by."""
        return self._columns

    def __len__(self) -> int:
        return len(self._columns)

    @overload
    def __getitem__(self, at: int) -> Shard: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Shard, ...]: ...
    def __getitem__(self, at: int | slice) -> Shard | tuple[Shard, ...]:
        places = range(len(self))[at]
        if isinstance(places, range):
            return tuple(self[place] for place in places)
        return Shard.model_construct(**self._columns.row(places))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Shards are taken as they are, anything else as a tuple of them, with its errors."""
        rows = core_schema.tuple_variable_schema(handler.generate_schema(Shard), strict=False)
        return core_schema.no_info_wrap_validator_function(
            lambda value, validate: value if isinstance(value, cls) else cls(validate(value)),
            rows,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda shards: [shard.model_dump(mode="json") for shard in shards]
            ),
        )


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
    shards: Shards
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
        rest = canonical_json(self.model_dump(mode="json", exclude={"shards"}) | {"shards": []})
        before, after = rest.split(_NO_SHARDS)
        found = hashlib.sha256(before)
        for number in range(len(self.shards)):
            fields = self.shards.columns.row(number)
            del fields["url"]
            found.update((b"," if number else _NO_SHARDS[:-1]) + canonical_json(fields))
        found.update((b"]" if len(self.shards) else _NO_SHARDS) + after)
        return found.hexdigest()

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
    shards: Iterable[Shard],
    identity_sum: int,
    licence: str | None = None,
    parent: str | None = None,
    reencoding: Reencoding | None = None,
) -> Manifest:
    """Assemble a manifest; its totals are the sums over its shards."""
    table = shards if isinstance(shards, Shards) else Shards(shards)
    return Manifest(
        version=MANIFEST_VERSION,
        split=split,
        class_map_digest=class_map_digest,
        num_samples=table.columns.total_samples(),
        identity_digest=identity_digest(identity_sum),
        class_counts=table.columns.totals_of_classes(),
        shards=table,
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
    reading = _Reading()
    content = read_json(path, what="manifest", remedy=remedy, object_hook=reading.take)
    try:
        manifest = Manifest.model_validate(reading.put_in_place(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ManifestError(f"{path}: {place or 'content'}: {first['msg']}; {remedy}") from None
    if manifest.version != MANIFEST_VERSION:
        raise ManifestError(
            f"{path}: version {manifest.version}, this program reads version {MANIFEST_VERSION}; rebuild the dataset"
        )
    return manifest


@dataclass(frozen=True, slots=True)
class _Place:
    """What stands in for a shard of a manifest that is being read: its place among those that were taken out of it."""

    number: int


class _Reading:
    """The reading of a manifest: each shard is checked and laid into columns when its text is parsed, so that all are never objects at once.

    What is no sound shard is left where it stands, and the errors are those that it would have without.
    """

    def __init__(self) -> None:
        self._shards = Shards()

    def take(self, content: dict[str, Any]) -> Any:
        """Called with each object of the text, the innermost first."""
        if "index_sha256" not in content:
            return content
        try:
            return _Place(self._shards.add(Shard.model_validate(content)))
        except ValidationError:
            return content

    def put_in_place(self, content: Any) -> Any:
        """The parsed content with its shards in it again."""
        shards = content.get("shards") if isinstance(content, dict) else None
        if not isinstance(shards, list):
            return content
        if shards == [_Place(number) for number in range(len(self._shards))]:
            return content | {"shards": self._shards}
        given_back = [self._shards[shard.number] if isinstance(shard, _Place) else shard for shard in shards]
        return content | {"shards": given_back}


def faults_of_totals(manifest: Manifest) -> list[str]:
    """What the manifest says that contradicts itself: totals that are not the sums over the shards, a shard named twice."""
    faults = []
    columns = manifest.shards.columns
    if (num_samples := columns.total_samples()) != manifest.num_samples:
        faults.append(f"states {manifest.num_samples} samples, its shards add up to {num_samples}")
    if columns.totals_of_classes() != manifest.class_counts:
        faults.append("the class counts are not the sums over the shards")
    of_shards = zip(columns.names, columns.num_samples, columns.totals_of_shards(), strict=True)
    faults += [
        f"{name} states {stated} samples but its classes add up to {found}"
        for name, stated, found in of_shards
        if found != stated
    ]
    if len(set(columns.names)) != len(columns.names):
        faults.append("a shard name stands more than once")
    return faults
