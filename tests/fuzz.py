"""What the fuzzers feed: bytes out of nothing, and files of ours with one thing wrong; and the readers that they feed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from aplantida_dist.checkpoint import load_checkpoint
from aplantida_dist.config_file import load_config
from aplantida_dist.data.classmap import load_class_map
from aplantida_dist.data.dataset import Split
from aplantida_dist.data.decode import DecodeError, decode
from aplantida_dist.data.index import (
    FOREIGN_INDEX_DTYPE,
    INDEX_DTYPE,
    read_index,
    read_key,
    read_member,
    read_metadata,
    require_within,
)
from aplantida_dist.data.manifest import load_manifest
from aplantida_dist.errors import UserError
from aplantida_dist.files import sha256_of_file
from aplantida_dist.history import read_history
from aplantida_dist.run_folder import resolve_checkpoint
from aplantida_dist.shards.members import read_tar_members
from aplantida_dist.soft_label_file import open_soft_labels

MAX_BYTES = 4096
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**400, -(2**63), 2**63, 1.5, float("nan"), float("-inf"), "", "\0", "\ud800", "٣", "../../x", "x" * 5000,
    [], [[]], [None], {}, {"a": {}}, "-1", "file:///\0", "file:///%00",
)  # fmt: skip
ODD_TEXTS = (
    b"[" * 3_000, b'{"a":' * 3_000, b"9" * 5000, b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b"\xff\xfe", b"\xef\xbb\xbf", b"\0",
    b'"', b"{", b"}", b",", b":", b'{"schema": 1, "schema": 2}', b'"\\U00110000"', b"!!python/object:os.system", b"*a", b"&a", b"%YAML 1.9" * 3,
    b"? ", b"- ", b"\t", b"\r", b"\xe2\x80\xa8", b"|\n", b">\n", b"0x1p3", b"\x85",
)  # fmt: skip
ODD_NUMBERS = tuple(
    struct.pack(form, value) for form in ("<Q", ">Q") for value in (0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1)
)


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file after one to four accidents: a bit flipped, a piece cut out or put in, a number made huge, the end lost."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.sampled_from(["flip", "cut", "lose", "insert", "odd", "number", "zero", "swap"])):
            case "flip" if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[place:]
            case "lose":
                del content[place : place + draw(st.integers(1, 64))]
            case "insert":
                content[place:place] = draw(st.binary(min_size=1, max_size=32))
            case "odd":
                content[place:place] = draw(st.sampled_from(ODD_TEXTS))
            case "number":
                number = draw(st.sampled_from(ODD_NUMBERS))
                content[place : place + len(number)] = number
            case "zero":
                content[place : place + 32] = bytes(32)
            case "swap":
                other = draw(st.integers(0, max(len(content) - 1, 0)))
                content[place : place + 8], content[other : other + 8] = (
                    content[other : other + 8],
                    content[place : place + 8],
                )
    return bytes(content)


@st.composite
def damaged_json(draw: st.DrawFn, whole: bytes) -> bytes:
    """A JSON file in which one to three values, at any depth, are others; or are gone, or stand under another name, or come twice."""
    content = json.loads(whole)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(content))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["odd", "odd", "lose", "rename", "copy"])):
            case "odd":
                # A copy: a later accident may change what is inside of it.
                holder[key] = deepcopy(draw(st.sampled_from(ODD_VALUES)))
            case "lose":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[draw(st.sampled_from(["", "x", "digest", "\ud800", "__metadata__"]))] = holder.pop(key)
            case "copy":
                other_holder, other_key = draw(st.sampled_from(places))
                if other_key in other_holder if isinstance(other_holder, dict) else other_key < len(other_holder):
                    other_holder[other_key] = json.loads(json.dumps(holder[key]))
    text = json.dumps(content)
    if draw(st.booleans()) and isinstance(content, dict) and content:
        name = draw(st.sampled_from(sorted(content)))
        text = "{" + json.dumps(name) + ": " + draw(st.sampled_from(["null", "[]", "1", "NaN"])) + ", " + text[1:]
    return text.encode()


def _places(content: Any) -> Any:
    """Every (holder, key) of a JSON value."""
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])


def anything(whole: bytes, *, is_json: bool = False) -> st.SearchStrategy[bytes]:
    """Raw bytes, accidents to a whole file and, of JSON, other values in it."""
    kinds = [st.binary(max_size=MAX_BYTES), damaged_bytes(whole)]
    return st.one_of(*kinds, damaged_json(whole)) if is_json else st.one_of(*kinds)


Reader = Callable[[bytes, Path], None]
"""Writes bytes where a file is expected, below a folder of its own, and reads them as the program would. Raises nothing but what it must."""


def read_config(content: bytes, folder: Path) -> None:
    (folder / "config.yaml").write_bytes(content)
    load_config(folder / "config.yaml", [content[:60].decode("utf-8", "replace")] if len(content) % 2 else [])


def read_manifest(content: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(content)
    manifest = load_manifest(folder / "manifest.json")
    split = Split(folder, manifest)
    assert split.digest
    assert split.num_samples == manifest.num_samples
    split.require_shards(folder)


def read_class_map(content: bytes, folder: Path) -> None:
    (folder / "classes.json").write_bytes(content)
    load_class_map(folder / "classes.json")


def read_rows(content: bytes, folder: Path) -> None:
    (folder / "history.jsonl").write_bytes(content)
    for row in read_history(folder / "history.jsonl"):
        json.dumps(row.to_json(), allow_nan=False).encode()


def read_position(content: bytes, folder: Path) -> None:
    (folder / "position.json").write_bytes(content)
    load_checkpoint(folder)


def read_pointer(content: bytes, folder: Path) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "best.json").write_bytes(content)
    resolve_checkpoint(folder, "best")


def read_soft_labels(content: bytes, folder: Path) -> None:
    (folder / "soft.safetensors").write_bytes(content)
    open_soft_labels(folder / "soft.safetensors").parentage()


def read_picture(content: bytes, folder: Path) -> None:
    try:
        decode(content)
    except DecodeError as error:
        raise UserError(str(error)) from error  # as the stream tells it


def read_tar(content: bytes, folder: Path) -> None:
    (folder / "x.tar").write_bytes(content)
    listed = read_tar_members(folder / "x.tar")
    assert all(member.size >= 0 for member in listed.members)
    if listed.fault:
        raise UserError(listed.fault)  # as `index_tar` tells it


def index_reader(tar: bytes, *, is_foreign: bool) -> Reader:
    """Reads bytes as the index of this tar, whose digest the manifest has, so that every row of nonsense comes through to the tar."""

    def read(content: bytes, folder: Path) -> None:
        size = (FOREIGN_INDEX_DTYPE if is_foreign else INDEX_DTYPE).itemsize
        _read_samples(folder, tar, content[: len(content) // size * size], is_foreign=is_foreign)

    return read


def indexed_tar_reader(index: bytes) -> Reader:
    """Reads bytes as the tar of this index."""
    return lambda content, folder: _read_samples(folder, content, index, is_foreign=False)


def _read_samples(folder: Path, tar: bytes, index: bytes, *, is_foreign: bool) -> None:
    (folder / "x.tar").write_bytes(tar)
    (folder / "x.idx").write_bytes(index)
    size = (FOREIGN_INDEX_DTYPE if is_foreign else INDEX_DTYPE).itemsize
    sha256 = sha256_of_file(folder / "x.idx")
    rows = read_index(folder / "x.idx", num_samples=len(index) // size, sha256=sha256, is_foreign=is_foreign)
    require_within(rows, shard_bytes=len(tar), path=folder / "x.idx")
    descriptor = os.open(folder / "x.tar", os.O_RDONLY)
    faults: list[UserError] = []
    try:
        for number, row in enumerate(rows):
            for act in (
                lambda row=row: read_key(descriptor, row, shard_path=folder / "x.tar"),
                lambda row=row: read_member(descriptor, row, shard_path=folder / "x.tar"),
                lambda number=number: read_metadata(descriptor, rows, number),
            ):
                try:
                    act()
                except UserError as error:
                    faults.append(error)
    finally:
        os.close(descriptor)
    if faults:
        raise faults[0]
