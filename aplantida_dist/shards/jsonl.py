"""Records of pictures as a source: one JSON object a line, and a folder where the picture of a URL lies as md5(url).jpg."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from aplantida_dist.credentials import has_credentials
from aplantida_dist.errors import UserError
from aplantida_dist.files import canonical_json
from aplantida_dist.shards.class_names import class_name_of
from aplantida_dist.shards.download.failure import Failure
from aplantida_dist.shards.licence import UNKNOWN, Licence, Requirement, licence_of
from aplantida_dist.shards.lines import Line, LineError, read_lines
from aplantida_dist.shards.place import Place
from aplantida_dist.shards.record import LeftOut, Record
from aplantida_dist.shards.source import Source, text_of_name
from aplantida_dist.shards.stated_splits import StatedSplits

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""What the picture of a URL may end in, in the order in which they are tried; what it holds is read from its bytes."""

ALL_DOWNLOADED: Mapping[str, Failure] = MappingProxyType({})


class RecordsError(UserError):
    """Records that cannot be put together with their pictures."""


@dataclass
class _Tally:
    """What is gathered while the records stream by: each class name as one text in memory, and the splits."""

    class_names: dict[str, str] = field(default_factory=dict)
    splits: StatedSplits = field(default_factory=StatedSplits)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One record as its line states it; `path` is where its picture lies, None where it lies in none of its `places`."""

    line: Line
    class_name: str
    split: str | None
    licence: Licence | None
    places: list[str]
    path: str | None


@dataclass(frozen=True)
class Shortfall:
    """What a file of records lacks in a folder: records = num_there + those without their picture.

    Of those, `urls` are the distinct ones to ask for, in the records' order; `unlicensed` are the URLs that are not worth
    asking for, since no record of theirs meets the requirement; `num_without_url` records name a path that is not there.
    """

    num_there: int
    urls: tuple[str, ...]
    unlicensed: tuple[str, ...]
    num_without_url: int


def read_jsonl(
    records_path: Path, image_dir: Path, *, not_downloaded: Mapping[str, Failure] = ALL_DOWNLOADED
) -> Source:
    """List the pictures of a file of records, in its order; each record becomes one of `records` or is left out.

    A record is named FILE:LINE, its class is its `latin_name` (runs of white space are one blank). One line is parsed at a
    time, and of each only the canonical JSON stays. A record without its picture is `not_downloaded` where its URL is one of
    those, for the reason that stands there, else `missing`. Raises LineError for a line that is malformed or whose picture would lie
    outside `image_dir`, RecordsError where only some of the records carry a `split`.
    """
    image_dir = image_dir.absolute()
    if not image_dir.is_dir():
        raise RecordsError(f"{image_dir}: no such folder; give the folder of the pictures as --image-dir")
    records: list[Record] = []
    missing: list[LeftOut] = []
    tally = _Tally()
    name = text_of_name(records_path.name)
    for entry in _read_entries(records_path, image_dir, tally):
        source, content = f"{name}:{entry.line.number}", entry.line.content
        if entry.path is not None:
            metadata = _metadata_of(content)
            records.append(Record(Place(entry.path), source, entry.class_name, entry.split, metadata, entry.licence))
        elif (url := _url_to_ask(entry)) in not_downloaded:
            detail = f"{not_downloaded[url]} ({url})"
            missing.append(LeftOut(source, entry.class_name, "not_downloaded", detail, None))
        else:
            missing.append(LeftOut(source, entry.class_name, "missing", _what_is_missing(content, entry.places), None))
    return Source(
        name=name,
        picture_paths=(image_dir,),
        counted="records",
        records=tuple(records),
        outside=tuple(missing),
        splits=tally.splits.decided(source=str(records_path)),
        class_names=tuple(sorted(tally.class_names)),
        metadata=None,
    )


def read_shortfall(records_path: Path, image_dir: Path, *, requirement: Requirement) -> Shortfall:
    """Find what a folder lacks of the records' pictures. Raises what `read_jsonl` raises, before anything is asked for.

    Only the URLs that are not there are held: 1 million of 100 characters are 0.2 GB.
    """
    num_there = num_without_url = 0
    is_wanted: dict[str, bool] = {}
    for entry in _read_entries(records_path, image_dir.absolute(), _Tally()):
        if entry.path is not None:
            num_there += 1
        elif url := _url_to_ask(entry):
            is_wanted[url] = is_wanted.get(url, True) and requirement.is_met_by(entry.licence or UNKNOWN)
        else:
            num_without_url += 1
    return Shortfall(
        num_there=num_there,
        urls=tuple(url for url, wanted in is_wanted.items() if wanted),
        unlicensed=tuple(url for url, wanted in is_wanted.items() if not wanted),
        num_without_url=num_without_url,
    )


def stem_of_url(url: str) -> str:
    """What the picture of a URL is called in the folder, without the suffix: md5 in hex of the URL's UTF-8 bytes."""
    return hashlib.md5(url.encode(), usedforsecurity=False).hexdigest()


def _read_entries(records_path: Path, image_dir: Path, tally: _Tally) -> Iterator[_Entry]:
    """Read the records one at a time, and look for the picture of each."""
    for line in read_lines(records_path):
        class_name, licence = _class_name_of(line, tally), _licence_of(line)
        split = tally.splits.split_of(line.content.get("split"), place=line.place)
        if has_credentials(_text(line, "image_url")):
            raise LineError(
                f"{line.place}: its image_url holds a user, a password or a token, which the dataset and its reports would show; take it out"
            )
        places = _places_of(line)
        path = next((path for path in (f"{image_dir}/{inside}" for inside in places) if os.path.exists(path)), None)
        yield _Entry(line, class_name, split, licence, places, path)
    tally.splits.decided(source=str(records_path))  # raises where only some records state one


def _url_to_ask(entry: _Entry) -> str:
    """The URL where the picture may be had; empty for a record with an `image_path`, which is never looked for elsewhere."""
    return "" if _text(entry.line, "image_path") else _text(entry.line, "image_url")


def _class_name_of(line: Line, tally: _Tally) -> str:
    """The class of a record: one text in memory for all its records."""
    class_name = class_name_of(_text(line, "latin_name"))
    if not class_name:
        raise LineError(f"{line.place}: no 'latin_name', which is the class; correct the line or remove it")
    return tally.class_names.setdefault(class_name, class_name)


def _licence_of(line: Line) -> Licence | None:
    return licence_of({"license": _text(line, "license")})


def _places_of(line: Line) -> list[str]:
    """Where in the folder the picture of a record may lie: at its `image_path`, else under the md5 of its `image_url`."""
    if image_path := _text(line, "image_path"):
        return [_inside(image_path, place=line.place)]
    if image_url := _text(line, "image_url"):
        return [stem_of_url(image_url) + suffix for suffix in SUFFIXES]
    raise LineError(f"{line.place}: neither 'image_url' nor 'image_path'; correct the line or remove it")


def _inside(image_path: str, *, place: str) -> str:
    """The path as it is, once it is sure not to lead out of the folder."""
    path = PurePosixPath(image_path)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in image_path:
        raise LineError(
            f"{place}: image_path {image_path!r} does not name a file inside the image folder; give it relative to --image-dir, without '..'"
        )
    return str(path)


def _text(line: Line, field: str) -> str:
    """A field that is text; empty where the record has none."""
    value = line.content.get(field)
    if value is not None and not isinstance(value, str):
        raise LineError(f"{line.place}: {field!r} is {value!r}, expected text; correct the line or remove it")
    return value or ""


def _what_is_missing(content: dict[str, Any], places: list[str]) -> str:
    if content.get("image_path"):
        return f"no {places[0]}"
    return f"no {places[0]} (nor {', '.join(SUFFIXES[1:])}) of {content['image_url']}"


def _metadata_of(content: dict[str, Any]) -> bytes:
    """What KEY.json will hold: the record, without where its picture lay here and the split that it was put in."""
    return canonical_json({field: value for field, value in content.items() if field not in ("image_path", "split")})
