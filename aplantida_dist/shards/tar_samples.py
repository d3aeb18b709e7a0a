"""The samples of a tar that others wrote: which members belong together, and which make no sample that could be used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from tarfile import TarInfo

from aplantida_dist.data.index import IMAGE_SUFFIXES, split_member_name
from aplantida_dist.shards.audit import MAX_PICTURE_BYTES
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
    runs_of_key: defaultdict[str, list[list[TarInfo]]] = defaultdict(list)
    misfits: list[Misfit] = []
    for key, run in groupby((member for member in members if not member.isdir()), key=_key_of):
        if key is None:
            misfits += [Misfit(text_of_name(member.name), "no_sample", "") for member in run]
        else:
            runs_of_key[key].append(list(run))
    samples: list[TarSample] = []
    for runs in runs_of_key.values():
        stand_alone = all(any(_suffix_of(member) in IMAGE_SUFFIXES for member in run) for run in runs)
        for files in runs if stand_alone else [[member for run in runs for member in run]]:
            found = _sample_of(files)
            if isinstance(found, Misfit):
                misfits.append(found)
            else:
                samples.append(found)
    return sorted(samples, key=lambda sample: sample.image.offset_data), misfits


def _key_of(member: TarInfo) -> str | None:
    """The key of a member's sample; None for a name without a dot, or with nothing before or after it."""
    key, extension = split_member_name(member.name)
    return key if extension and key.rpartition("/")[2] else None


def _suffix_of(member: TarInfo) -> str:
    return split_member_name(member.name)[1].rpartition(".")[2]


def _sample_of(files: list[TarInfo]) -> TarSample | Misfit:
    images = [file for file in files if _suffix_of(file) in IMAGE_SUFFIXES]
    metadata, labels = ([file for file in files if _suffix_of(file) == suffix] for suffix in ("json", "cls"))
    name = text_of_name((images or files)[0].name)
    if len(images) != 1:
        return Misfit(name, "not_one_image", _names_of(images) or f"only {_names_of(files)}")
    for file in (*images, *metadata, *labels):
        if not file.isreg() or file.issparse():
            reason: Reason = "not_one_image" if file in images else "bad_metadata"
            return Misfit(name, reason, f"{text_of_name(file.name)} is a link, or no plain file")
    if images[0].size > MAX_PICTURE_BYTES:
        return Misfit(name, "too_large", f"{images[0].size} bytes, at most {MAX_PICTURE_BYTES} are read")
    for described in (metadata, labels):
        if len(described) > 1:
            return Misfit(name, "bad_metadata", f"several: {_names_of(described)}")
        if described and described[0].size > MAX_METADATA_BYTES:
            return Misfit(name, "bad_metadata", f"{_names_of(described)} is longer than {MAX_METADATA_BYTES} bytes")
    return TarSample(images[0], metadata[0] if metadata else None, labels[0] if labels else None)


def _names_of(files: list[TarInfo]) -> str:
    return ", ".join(text_of_name(file.name) for file in files)
