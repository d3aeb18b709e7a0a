"""A source: what folders, records or tars offer to the builder, listed and checked, before any picture is opened."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from aplantida_dist.shards.record import LeftOut, Record

SPLIT_OF_WORD = {"train": "train", "val": "val", "validation": "val", "test": "test"}
"""How sources may call a split."""


@dataclass(frozen=True)
class MetadataUse:
    """How the lines of metadata.jsonl met the files: `unmatched` are the (line number, image_path) that name no file."""

    num_lines: int
    unmatched: tuple[tuple[int, str], ...]
    num_files_without_line: int


@dataclass(frozen=True)
class IndexedTar:
    """A tar that others wrote, as it was when it was indexed: its size, its time in nanoseconds, its sha256.

    `rows` has one row of FOREIGN_INDEX_DTYPE for each sample, in the tar's order; keys and labels are not known yet and 0.
    """

    path: str
    num_bytes: int
    modified_ns: int
    sha256: str
    rows: NDArray[Any]


@dataclass(frozen=True)
class Source:
    """What a source holds. Everything that came in is one of `records` or one of `outside`; `counted` says what that is.

    `name` is the last part of its path, and `picture_paths` are the folders or tars of its pictures. `records` come in the source's order: of
    equal pictures in one split the first stays. `splits` are the ones that the source decides, empty where the builder is to
    split. `class_names` are all its classes, sorted, also those without a picture. `metadata` is None where there is no metadata.jsonl.
    A record whose place is in one of `tars` stays there: it is indexed and not written.
    """

    name: str
    picture_paths: tuple[Path, ...]
    counted: str
    records: tuple[Record, ...]
    outside: tuple[LeftOut, ...]
    splits: tuple[str, ...]
    class_names: tuple[str, ...]
    metadata: MetadataUse | None
    tars: tuple[IndexedTar, ...] = ()

    @property
    def where(self) -> str:
        """Where its pictures lie, for errors."""
        further = len(self.picture_paths) - 1
        return f"{self.picture_paths[0]}" + (f" and {further:,} more" if further else "")


def text_of_name(name: str) -> str:
    """A file name as UTF-8 text, the same under every locale; bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
