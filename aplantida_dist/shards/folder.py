"""A folder of pictures as records: one folder a class, or one folder a split with the class folders inside."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aplantida_dist.errors import UserError
from aplantida_dist.files import canonical_json
from aplantida_dist.shards.licence import licence_of
from aplantida_dist.shards.lines import read_lines
from aplantida_dist.shards.place import Place
from aplantida_dist.shards.record import LeftOut, Record
from aplantida_dist.shards.source import SPLIT_OF_WORD, MetadataUse, Source, text_of_name

METADATA_FILE = "metadata.jsonl"
HOW_TO_LAY_OUT = "give one folder a class, or train/, val/ and test/ with one folder a class in each"


class FolderError(UserError):
    """A folder that is not laid out as classes of pictures, or metadata that cannot be read."""


@dataclass(frozen=True)
class _ClassFolder:
    path: str
    source: str
    class_name: str
    split: str | None


def read_folder(folder_dir: Path) -> Source:
    """List the pictures of a folder in an order that does not depend on the file system.

    Files deeper inside a class folder belong to that class; links are followed. Raises FolderError for a layout that is not
    understood, for a val or test class that train does not have, and for a malformed line of metadata.jsonl.
    """
    folder_dir = folder_dir.absolute()
    if not folder_dir.is_dir():
        raise FolderError(f"{folder_dir}: no such folder; {HOW_TO_LAY_OUT}")
    class_folders, outside, splits = _read_layout(folder_dir)
    _require_train_classes(folder_dir, class_folders)
    lines = _read_metadata(folder_dir / METADATA_FILE)
    num_lines, num_without = len(lines), 0
    records = []
    for folder in class_folders:
        for path, source in _files_below(folder.path, folder.source, ancestors=()):
            number_and_line = lines.pop(source, None)
            num_without += number_and_line is None
            known = json.loads(number_and_line[1]) if number_and_line else {}
            metadata = _metadata_of(known, source=source, class_name=folder.class_name)
            records.append(Record(Place(path), source, folder.class_name, folder.split, metadata, licence_of(known)))
    unmatched = tuple(sorted((number, image_path) for image_path, (number, _) in lines.items()))
    return Source(
        name=folder_dir.name,
        picture_paths=(folder_dir,),
        counted="files",
        records=tuple(sorted(records, key=lambda record: record.source)),
        outside=tuple(LeftOut(source, None, "outside_classes", "", None) for source in outside),
        splits=splits,
        class_names=tuple(sorted({folder.class_name for folder in class_folders})),
        metadata=MetadataUse(num_lines, unmatched, num_without) if (folder_dir / METADATA_FILE).exists() else None,
    )


def _read_layout(folder_dir: Path) -> tuple[list[_ClassFolder], list[str], tuple[str, ...]]:
    """The class folders, the files that lie in none, and the splits that the folder decides."""
    folders, files = _entries(str(folder_dir))
    outside = [name for name in files if name != METADATA_FILE]
    split_folders = {name: path for name, path in folders.items() if name in SPLIT_OF_WORD}
    if not split_folders:
        return [_ClassFolder(path, name, name, None) for name, path in folders.items()], outside, ()
    _require_split_layout(folder_dir, folders)
    class_folders = []
    for split_folder, path in split_folders.items():
        inner_folders, inner_files = _entries(path)
        outside += [f"{split_folder}/{name}" for name in inner_files]
        for name, inner_path in inner_folders.items():
            source, split = f"{split_folder}/{name}", SPLIT_OF_WORD[split_folder]
            class_folders.append(_ClassFolder(inner_path, source, name, split))
    splits = tuple(dict.fromkeys(SPLIT_OF_WORD.values()))
    return class_folders, outside, tuple(s for s in splits if s in {SPLIT_OF_WORD[name] for name in split_folders})


def _require_split_layout(folder_dir: Path, folders: dict[str, str]) -> None:
    others = [name for name in folders if name not in SPLIT_OF_WORD]
    if others:
        raise FolderError(
            f"{folder_dir}: has folders of splits and, beside them, {_some(others)}; {HOW_TO_LAY_OUT}, not both at once"
        )
    if "train" not in folders:
        raise FolderError(f"{folder_dir}: has {_some(list(folders))} but no train/; {HOW_TO_LAY_OUT}")
    if "val" in folders and "validation" in folders:
        raise FolderError(f"{folder_dir}: has both val/ and validation/; keep one of them")


def _require_train_classes(folder_dir: Path, class_folders: list[_ClassFolder]) -> None:
    """Every class of val and test is a class of train, or the heads that train builds could not name it."""
    in_train = {folder.class_name for folder in class_folders if folder.split in (None, "train")}
    unknown = sorted({folder.class_name for folder in class_folders} - in_train)
    if unknown:
        raise FolderError(
            f"{folder_dir}: {len(unknown)} classes of val or test are unknown to train: {_some(unknown)}; "
            "add them to train/, correct their names, or remove them"
        )


def _entries(folder: str) -> tuple[dict[str, str], list[str]]:
    """The (name → path) of the folders and the names of everything else inside, both in the order of their names."""
    try:
        with os.scandir(folder) as listing:
            entries = sorted((text_of_name(entry.name), entry.path, entry.is_dir()) for entry in listing)
    except OSError as error:
        raise FolderError(f"{folder}: cannot be listed: {error.strerror}; make it readable or remove it") from error
    folders = {name: path for name, path, is_dir in entries if is_dir}
    return folders, [name for name, _, is_dir in entries if not is_dir]


def _files_below(folder: str, source: str, *, ancestors: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Every file below a class folder as (path, source). A link back to a folder above it would never end: FolderError."""
    real = os.path.realpath(folder)
    if real in ancestors:
        raise FolderError(f"{folder}: a link that leads back to {real}, which holds it; remove the link")
    with_this = (*ancestors, real)
    try:
        with os.scandir(folder) as listing:
            entries = [(entry.path, f"{source}/{text_of_name(entry.name)}", entry.is_dir()) for entry in listing]
    except OSError as error:
        raise FolderError(f"{folder}: cannot be listed: {error.strerror}; make it readable or remove it") from error
    for path, entry_source, is_dir in entries:
        if is_dir:
            yield from _files_below(path, entry_source, ancestors=with_this)
        else:
            yield path, entry_source


def _read_metadata(path: Path) -> dict[str, tuple[int, bytes]]:
    """Read metadata.jsonl as image_path → (line number, line), checked line by line; empty where the file is absent."""
    lines: dict[str, tuple[int, bytes]] = {}
    if not path.exists():
        return lines
    for line in read_lines(path):
        stated = line.content.get("image_path")
        if not isinstance(stated, str):
            raise FolderError(f"{line.place}: expected the text 'image_path'; correct the line or remove it")
        image_path = posixpath.normpath(stated)
        if image_path in lines:
            raise FolderError(
                f"{path}: lines {lines[image_path][0]} and {line.number} both describe {image_path}; keep one"
            )
        lines[image_path] = (line.number, line.raw)
    return lines


def _metadata_of(known: dict[str, Any], *, source: str, class_name: str) -> bytes:
    """What KEY.json will hold: what the metadata line said, and what the folder knew where the line was silent."""
    content = {"latin_name": class_name, "image_source": source, **known}
    content.pop("image_path", None)
    return canonical_json(content)


def _some(names: list[str]) -> str:
    """The first ten names, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
