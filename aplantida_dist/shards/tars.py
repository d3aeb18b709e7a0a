"""Tars that others wrote as a source: their samples become records of pictures, which stay where they lie."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aplantida_dist.errors import UserError
from aplantida_dist.files import canonical_json
from aplantida_dist.pace import with_pace
from aplantida_dist.shards.class_names import class_name_of
from aplantida_dist.shards.licence import licence_of
from aplantida_dist.shards.place import Place
from aplantida_dist.shards.record import LeftOut, Reason, Record
from aplantida_dist.shards.source import IndexedTar, Source, text_of_name
from aplantida_dist.shards.stated_splits import StatedSplits
from aplantida_dist.shards.tar_index import FoundSample, index_tar
from aplantida_dist.shards.tar_urls import expand_tar_urls

_NUMBER = re.compile(r"[+-]?[0-9]+")


class TarsError(UserError):
    """Tars whose samples do not say together which class or split they are of."""


class _UnusableSampleError(Exception):
    """Why one sample is left out; it never leaves this file."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason


@dataclass
class _Classes:
    """The class names met so far, and what each number of a .cls stands for: (class name, where that was said)."""

    stated: tuple[str, ...] | None
    name_of_number: dict[int, tuple[str, str]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def name_of(self, latin_name: str, label: str, *, place: str) -> str:
        """The class of a sample: its latin name, else its label, which is a name or the number of one."""
        name = latin_name or label
        if _NUMBER.fullmatch(label):
            name = self._name_of_number(int(label), latin_name, place=place)
        if not name:
            raise _UnusableSampleError("no_label", "")
        return self.names.setdefault(name, name)

    def _name_of_number(self, number: int, latin_name: str, *, place: str) -> str:
        if self.stated is not None and not 0 <= number < len(self.stated):
            raise TarsError(
                f"{place}: class {number}, but --class-names has 0 to {len(self.stated) - 1}; give the file of these tars"
            )
        known = (self.stated[number], "--class-names") if self.stated else self.name_of_number.get(number)
        if latin_name:
            known = known or self.name_of_number.setdefault(number, (latin_name, place))
        if known is None:
            raise TarsError(
                f"{place}: its .cls is {number} and its .json has no latin_name; say what numbers mean with --class-names FILE"
            )
        if latin_name and known[0] != latin_name:
            raise TarsError(
                f"{place}: class {number} is {latin_name!r} here and {known[0]!r} in {known[1]}; "
                "give tars that count their classes differently as several --from-tars"
            )
        return known[0]


def read_tars(urls: str, *, class_names: tuple[str, ...] | None) -> Source:
    """Index the tars that a text names (see `expand_tar_urls`), and list their samples, tar by tar, in the tar's order.

    A sample's class is the `latin_name` of its .json, else its .cls: a name, or a number into `class_names`. It is named
    TAR:MEMBER, after its image; the tars are named from the folder that holds them all. Raises TarUrlError, TarError for a damaged
    tar, TarsError for a number that has no name or two, and StatedSplitsError.
    """
    paths = expand_tar_urls(urls)
    home = os.path.commonpath([path.parent for path in paths])
    tars: list[IndexedTar] = []
    records: list[Record] = []
    outside: list[LeftOut] = []
    classes, splits = _Classes(class_names), StatedSplits()
    for path in with_pace(paths, total=len(paths), doing="indexing tars"):
        finding, name = index_tar(path), text_of_name(os.path.relpath(path, home))
        tars.append(finding.tar)
        outside += [LeftOut(f"{name}:{one.name}", None, one.reason, one.detail, None) for one in finding.misfits]
        for sample in finding.samples:
            place, source = Place(finding.tar.path, sample.offset, sample.num_bytes), f"{name}:{sample.name}"
            try:
                records.append(_record_of(sample, place=place, source=source, classes=classes, splits=splits))
            except _UnusableSampleError as error:
                outside.append(LeftOut(source, None, error.reason, str(error), place))
    return Source(
        name=text_of_name(paths[0].name if len(paths) == 1 else Path(home).name),
        picture_paths=paths,
        counted="tar samples",
        records=tuple(records),
        outside=tuple(outside),
        splits=splits.decided(source=urls),
        class_names=tuple(sorted(classes.names)),
        metadata=None,
        tars=tuple(tars),
    )


def _record_of(sample: FoundSample, *, place: Place, source: str, classes: _Classes, splits: StatedSplits) -> Record:
    content, word, metadata = _parsed(sample.metadata)
    class_name = classes.name_of(_latin_name_of(content), _label_of(sample.label), place=source)
    return Record(place, source, class_name, splits.split_of(word, place=source), metadata, licence_of(content))


def _parsed(metadata: bytes | None) -> tuple[dict[str, Any], Any, bytes]:
    """What a .json holds without its `split`, that split, and the canonical bytes of the first."""
    try:
        content = {} if metadata is None else json.loads(metadata)
        word = content.pop("split", None) if isinstance(content, dict) else None
        canonical = canonical_json(content)
    except (ValueError, RecursionError) as error:
        raise _UnusableSampleError("bad_metadata", f"its .json is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise _UnusableSampleError("bad_metadata", f"its .json holds {type(content).__name__}, expected an object")
    return content, word, canonical


def _latin_name_of(content: dict[str, Any]) -> str:
    latin_name = content.get("latin_name") or ""
    if not isinstance(latin_name, str):
        raise _UnusableSampleError("bad_metadata", f"its latin_name is {latin_name!r}, expected text")
    return class_name_of(latin_name)


def _label_of(label: bytes | None) -> str:
    try:
        return class_name_of((label or b"").decode())
    except UnicodeDecodeError as error:
        raise _UnusableSampleError("bad_metadata", f"its .cls is no text: {error}") from None
