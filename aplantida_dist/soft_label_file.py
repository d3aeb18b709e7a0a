"""The soft label file: a teacher's k likeliest classes of each sample, sorted by identity, and looked up where it lies on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from aplantida_dist.data.classmap import ClassMap
from aplantida_dist.data.images import Interpolation
from aplantida_dist.data.manifest import identity_digest
from aplantida_dist.errors import UserError
from aplantida_dist.files import canonical_json, reason_of, replacing
from aplantida_dist.lineage import Descent, Identities, Lineage, lineage_from, require_lineage_facts

_ALIGNMENT = 64
_HASH_BYTES = 2**22
_MAX_HEADER_BYTES = 2**26
_SAFETENSORS_TYPES = {"<i8": "I64", "<u4": "U32", "<u2": "U16", "<f2": "F16"}
_REMEDY = "write it again with `python -m aplantida_dist.soft_labels`"


class SoftLabelError(UserError):
    """Soft labels are absent, changed, do not cover the samples, or do not fit the student or each other."""


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Preprocessing(_Facts):
    """What the teacher saw of a picture: `data.images.EvaluationTransform`, the same pixels every time."""

    augmented: Literal[False] = False
    image_size: int = Field(ge=1)
    crop_fraction: float = Field(gt=0.0)
    interpolation: Interpolation


class SoftLabelFacts(_Facts):
    """Everything that decides the bytes of a file, and nothing else, such as the number of ranks that wrote it.

    teacher_path and teacher_digest are those of the checkpoint; lineage is `Lineage.facts` of its weights. num_kept is k, the
    classes kept of each sample. manifest_digest is that of the split, identity_digest the sum of the identities in the file.
    micro_batch_size and precision stand here because they move the last bits of a forward pass.
    """

    format: Literal[1] = 1
    teacher_run: str
    teacher_path: str
    teacher_digest: str
    lineage: Annotated[dict[str, Any], AfterValidator(require_lineage_facts)]
    class_names: tuple[str, ...] = Field(strict=False, min_length=1)
    temperature: float = Field(gt=0.0)
    num_kept: int = Field(ge=1)
    split: str
    manifest_digest: str
    num_samples: int = Field(ge=1)
    identity_digest: str
    preprocessing: Preprocessing
    micro_batch_size: int
    precision: str

    @property
    def class_map(self) -> ClassMap:
        """The teacher's class map: what a class index in the file means."""
        return ClassMap(self.class_names)

    @property
    def record_dtype(self) -> np.dtype[Any]:
        """One sample, in a file that is not sorted yet."""
        return np.dtype(
            [
                ("identity", "<i8"),
                ("rest", "<f2"),
                ("class_indices", self._class_index_type, (self.num_kept,)),
                ("probabilities", "<f2", (self.num_kept,)),
            ]
        )

    @property
    def _class_index_type(self) -> str:
        return "<u2" if len(self.class_names) <= 2**16 else "<u4"

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The arrays of the file in their order: dtype and shape."""
        rows, kept = self.num_samples, self.num_kept
        return {
            "identities": ("<i8", (rows,)),
            "seen": ("<i8", (int(self.lineage["num_identities"]),)),
            "class_indices": (self._class_index_type, (rows, kept)),
            "probabilities": ("<f2", (rows, kept)),
            "rest": ("<f2", (rows,)),
        }


class StoredLabels(NamedTuple):
    """What a file holds of some samples, a row each; rows that are not there hold zeros.

    is_there: bool [b]. class_indices: int64 [b, k], the teacher's, the likeliest first. probabilities: float32 [b, k]. rest:
    float32 [b], the probability of all other classes together.
    """

    is_there: NDArray[np.bool_]
    class_indices: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    rest: NDArray[np.float32]


@dataclass(frozen=True)
class SoftLabelFile:
    """A file whose bytes have been checked against their digests. The arrays are mapped: processes share the kernel's pages."""

    path: Path
    facts: SoftLabelFacts
    digest: str
    arrays: Mapping[str, NDArray[Any]]

    def look_up(self, identities: Identities) -> StoredLabels:
        """The rows of these samples: int64 [b] in, any order, repetitions allowed."""
        known = self.arrays["identities"]
        places = np.searchsorted(known, identities).clip(max=len(known) - 1)
        is_there = known[places] == identities
        return StoredLabels(
            is_there=is_there,
            class_indices=self.arrays["class_indices"][places].astype(np.int64) * is_there[:, None],
            probabilities=self.arrays["probabilities"][places].astype(np.float32) * is_there[:, None],
            rest=self.arrays["rest"][places].astype(np.float32) * is_there,
        )

    def parentage(self) -> tuple[Descent, Lineage]:
        """The teacher as an ancestor of whoever learns from it, and what it was trained on."""
        seen = np.array(self.arrays["seen"], dtype=np.int64)
        return Descent(self.facts.teacher_path, self.facts.teacher_digest), lineage_from(seen, self.facts.lineage)


def open_soft_labels(path: Path) -> SoftLabelFile:
    """Map a file and check every byte of it; SoftLabelError where it is absent, cut, changed, or no such file. 146 MB took 0.4 s."""
    try:
        with path.open("rb") as file:
            num_header_bytes = int.from_bytes(file.read(8), "little")
            if num_header_bytes > _MAX_HEADER_BYTES:
                raise ValueError("it does not begin like one")
            header = json.loads(file.read(num_header_bytes))
            text = header["__metadata__"]["soft_labels"]
            content = json.loads(text)
            if hashlib.sha256(text.encode()).hexdigest() != header["__metadata__"]["sha256"]:
                raise SoftLabelError(f"{path}: the header has changed since it was written; {_REMEDY}")
            facts = SoftLabelFacts.model_validate(content["facts"])
            if header != _header(facts, content["sha256"]):
                raise SoftLabelError(f"{path}: the header has changed since it was written; {_REMEDY}")
            num_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise SoftLabelError(f"{path}: no soft labels can be read here: {error.strerror}; {_REMEDY}") from error
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise SoftLabelError(f"{path}: is no file of soft labels ({reason}); {_REMEDY}") from None
    arrays, expected_bytes = _map_arrays(path, facts, start=8 + num_header_bytes, num_bytes=num_bytes)
    if num_bytes != expected_bytes:
        raise SoftLabelError(f"{path}: has {num_bytes} bytes, expected {expected_bytes}; {_REMEDY}")
    for name, array in arrays.items():
        if _sha256_of(array) != content["sha256"][name]:
            raise SoftLabelError(f"{path}: {name} has changed since it was written (its sha256 differs); {_REMEDY}")
    return SoftLabelFile(path, facts, header["__metadata__"]["sha256"], arrays)


def write_soft_labels(path: Path, facts: SoftLabelFacts, *, parts: Iterable[NDArray[Any]], seen: Identities) -> None:
    """Write a file beside its place and move it there whole; any order of the samples gives the same bytes.

    parts: arrays of `facts.record_dtype`, read twice and held one at a time, so that memory does not grow with the samples.
    seen: the identities of the teacher's lineage. Raises SoftLabelError where the parts are not the samples of the split.
    """
    parts = list(parts)
    identities = np.concatenate([part["identity"] for part in parts])
    order = np.argsort(identities, kind="stable")
    _require_samples(identities[order], facts, path)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    # The digests' places are filled last; they are as long as these.
    start = len(_encode(_header(facts, dict.fromkeys(facts.layout(), "0" * 64))))
    num_bytes = _end_of(facts, start=start)
    try:
        with replacing(path) as beside:
            with beside.open("wb") as file:
                file.truncate(num_bytes)
            arrays, _ = _map_arrays(beside, facts, start=start, num_bytes=num_bytes, mode="r+")
            arrays["identities"][:] = identities[order]
            arrays["seen"][:] = seen
            first = 0
            for part in parts:
                here = places[first : first + len(part)]
                for name in ("class_indices", "probabilities", "rest"):
                    arrays[name][here] = part[name]
                first += len(part)
            digests = {name: _sha256_of(array) for name, array in arrays.items()}
            del arrays
            with beside.open("r+b") as file:
                file.write(_encode(_header(facts, digests)))
                os.fsync(file.fileno())
    except OSError as error:
        raise SoftLabelError(
            f"{path}: could not be written: {reason_of(error, path, num_bytes=num_bytes)}; make room or choose another place"
        ) from error


def _require_samples(ascending: Identities, facts: SoftLabelFacts, path: Path) -> None:
    """Each sample of the split once, by count, by digest, and by no two being one."""
    found = identity_digest(int(ascending.sum()))
    if len(ascending) != facts.num_samples or found != facts.identity_digest:
        raise SoftLabelError(
            f"{path}: {len(ascending)} samples with the identity digest {found} were labelled, expected "
            f"{facts.num_samples} with {facts.identity_digest}; run shards/verify.py on the dataset"
        )
    if (ascending[1:] == ascending[:-1]).any():
        raise SoftLabelError(f"{path}: two samples of the split have one key; run shards/verify.py on the dataset")


def _header(facts: SoftLabelFacts, digests: Mapping[str, str]) -> dict[str, Any]:
    """The header as safetensors knows it; ours stands in its metadata as JSON text, with the sha256 of that text."""
    text = canonical_json({"facts": facts.model_dump(mode="json"), "sha256": dict(digests)}).decode()
    header: dict[str, Any] = {
        "__metadata__": {"soft_labels": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    }
    begin = 0
    for name, (dtype, shape) in facts.layout().items():
        end = begin + _bytes_of(dtype, shape)
        header[name] = {"dtype": _SAFETENSORS_TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    return header


def _encode(header: Mapping[str, Any]) -> bytes:
    """The first bytes of a safetensors file: the header's length, the header, and spaces up to where arrays may begin."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _map_arrays(
    path: Path, facts: SoftLabelFacts, *, start: int, num_bytes: int, mode: Literal["r", "r+"] = "r"
) -> tuple[dict[str, NDArray[Any]], int]:
    """The arrays of a file, and where the last one ends; none where the file is shorter than that."""
    end = _end_of(facts, start=start)
    if num_bytes < end:
        return {}, end
    arrays: dict[str, NDArray[Any]] = {}
    for name, (dtype, shape) in facts.layout().items():
        # Nothing can be mapped of an array without entries, such as what an unknown lineage has seen.
        is_empty = 0 in shape
        arrays[name] = np.zeros(shape, dtype) if is_empty else np.memmap(path, dtype, mode, offset=start, shape=shape)
        start += _bytes_of(dtype, shape)
    return arrays, end


def _end_of(facts: SoftLabelFacts, *, start: int) -> int:
    return start + sum(_bytes_of(dtype, shape) for dtype, shape in facts.layout().values())


def _bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    return np.dtype(dtype).itemsize * math.prod(shape)


def _sha256_of(array: NDArray[Any]) -> str:
    """The sha256 of an array's bytes, a few megabytes at a time."""
    digest, content = hashlib.sha256(), array.reshape(-1).view(np.uint8)
    for first in range(0, len(content), _HASH_BYTES):
        digest.update(content[first : first + _HASH_BYTES].data)
    return digest.hexdigest()
