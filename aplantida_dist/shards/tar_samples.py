"""The samples of a tar that others wrote: which members belong together, and which make no sample that could be used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from tarfile import TarInfo
from typing import NamedTuple

from aplantida_dist.data.index import IMAGE_SUFFIXES, MAX_PICTURE_BYTES, split_member_name
from aplantida_dist.shards.lines import MAX_LINE_BYTES
from aplantida_dist.shards.record import Reason
from aplantida_dist.shards.source import text_of_name

MAX_METADATA_BYTES = MAX_LINE_BYTES


@dataclass(frozen=True, slots=True)
class TarSample:
    """The members of one sample that matter: its image and, where it has them, its .json and its .cls."""

    image: TarInfo
    metadata: TarInfo | None
    label: TarInfo | None


@dataclass(frozen=True, slots=True)
class Misfit:
    """A sample, or a member of none, that cannot be used; `name` is that of its first member."""

    name: str
    reason: Reason
    detail: str


def find_samples(members: Sequence[TarInfo]) -> tuple[list[TarSample], list[Misfit]]:
    """Put the members of a tar together as samples, in the order of their images; each but the folders belongs to one of both lists.

    A sample's members share the name up to the first dot of its last component, as in WebDataset. Such a key may come again: where each
    run of neighbours holds an image, each is a sample, else all runs of the key are one sample whose members are interleaved
    with others. What a member is, its last suffix says, in any case of letters.
    """
    runs_of_key: defaultdict[str, list[list[_File]]] = defaultdict(list)
    misfits: list[Misfit] = []
    for key, run in groupby((_file_of(member) for member in members if not member.isdir()), key=lambda file: file.key):
        if key:
            runs_of_key[key].append(list(run))
        else:
            misfits += [Misfit(_names_of([file]), "no_sample", "") for file in run]
    samples: list[TarSample] = []
    for runs in runs_of_key.values():
        stand_alone = len(runs) == 1 or all(any(file.is_image for file in run) for run in runs)
        for files in runs if stand_alone else [[file for run in runs for file in run]]:
            found = _sample_of(files)
            if isinstance(found, Misfit):
                misfits.append(found)
            else:
                samples.append(found)
    return sorted(samples, key=lambda sample: sample.image.offset_data), misfits


class _File(NamedTuple):
    """A member of a tar, the key of its sample and its last suffix; no key for a name without a dot, or with nothing on one side of it."""

    key: str
    suffix: str
    member: TarInfo

    @property
    def is_image(self) -> bool:
        return self.suffix in IMAGE_SUFFIXES


def _file_of(member: TarInfo) -> _File:
    key, extension = split_member_name(member.name)
    has_key = extension and key and not key.endswith("/")
    return _File(key if has_key else "", extension.rpartition(".")[2], member)


def _sample_of(files: list[_File]) -> TarSample | Misfit:
    images = [file for file in files if file.is_image]
    if len(images) != 1:
        names = _names_of(images) or f"only {_names_of(files)}"
        return Misfit(_names_of((images or files)[:1]), "not_one_image", names)
    metadata, labels = ([file for file in files if file.suffix == suffix] for suffix in ("json", "cls"))
    if fault := _fault_of_image(images[0].member) or _fault_of_text(metadata) or _fault_of_text(labels):
        return Misfit(_names_of(images), *fault)
    return TarSample(images[0].member, metadata[0].member if metadata else None, labels[0].member if labels else None)


def _fault_of_image(image: TarInfo) -> tuple[Reason, str] | None:
    if not _is_plain(image):
        return "not_one_image", "it is a link, or no plain file"
    if image.size > MAX_PICTURE_BYTES:
        return "too_large", f"{image.size} bytes, at most {MAX_PICTURE_BYTES} are read"
    return None


def _fault_of_text(files: list[_File]) -> tuple[Reason, str] | None:
    """What is wrong with the .json, or the .cls, of a sample, which may have none."""
    if len(files) > 1:
        return "bad_metadata", f"several: {_names_of(files)}"
    for file in files:
        if not _is_plain(file.member):
            return "bad_metadata", f"{_names_of(files)} is a link, or no plain file"
        if file.member.size > MAX_METADATA_BYTES:
            return "bad_metadata", f"{_names_of(files)} is longer than {MAX_METADATA_BYTES} bytes"
    return None


def _is_plain(member: TarInfo) -> bool:
    return member.isreg() and not member.issparse()


def _names_of(files: Sequence[_File]) -> str:
    return ", ".join(text_of_name(file.member.name) for file in files)
