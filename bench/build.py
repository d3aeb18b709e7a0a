"""Our writing of shards, without the audit, beside plain `tar` and webdataset's ShardWriter on the same files."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import webdataset

from aplantida_dist.files import sync_folder
from aplantida_dist.shards.audit import sample_key_of
from aplantida_dist.shards.place import Place
from aplantida_dist.shards.second_reading import Audited, read_again
from aplantida_dist.shards.writer import Sample, ShardLimits, write_split
from bench.finding import Finding, Goal, compare, interleave

METADATA = b'{"latin_name":"Bellis perennis","license":"CC-BY"}'
TIMES = 4
"""How often the files are listed: a shard's last sync is then a small part, as in a dataset of many shards."""
TAR_GOAL, SHARD_WRITER_GOAL = Goal("at least", 0.8), Goal("at least", 1.0)


OURS, SECOND_PASS = "ours", "ours, keys checked"
SYNCED_TAR, BARE_TAR, SHARD_WRITER = "tar, then sync", "tar, not synced", "ShardWriter, then sync"


@dataclass(frozen=True)
class Files:
    """The files that all write, and how many bytes they hold together."""

    pictures: tuple[Audited, ...]
    num_bytes: int


def list_files(folder: Path) -> Files:
    """Every JPEG below a folder, with its key, as the audit leaves it."""
    paths = sorted(folder.rglob("*.jpg"))
    pictures = tuple(Audited(Place(str(path)), sample_key_of(path.read_bytes()), "jpg") for path in paths)
    return Files(pictures * TIMES, sum(path.stat().st_size for path in paths) * TIMES)


def write_ours(files: Files, out_dir: Path) -> None:
    """Read, digest, index, write, sync."""
    _write(files, (picture.place.read() for picture in files.pictures), out_dir)


def write_second_pass(files: Files, out_dir: Path) -> None:
    """The same as a build does it: each picture must still have the bytes that its key is made of, one more sha256."""
    images = read_again(files.pictures, reencoding=None, num_workers=0)
    _write(files, (image.image for image in images), out_dir)


def _write(files: Files, images: Iterable[bytes], out_dir: Path) -> None:
    samples = (
        Sample(picture.sample_key, picture.suffix, image, 3, METADATA)
        for picture, image in zip(files.pictures, images, strict=True)
    )
    write_split(samples, out_dir / "train", split="train", class_map_digest="", limits=ShardLimits())


def write_tar(files: Files, out_dir: Path) -> None:
    """`tar` into one file: no label, no metadata, no digest, no index, nothing synced."""
    names = "\n".join(picture.place.path for picture in files.pictures)
    # Without the last option a file that is listed again becomes a link.
    options = ["--absolute-names", "--hard-dereference"]
    command = ["tar", "--create", "--file", str(out_dir / "all.tar"), "--files-from", "-", *options]
    subprocess.run(command, input=names, text=True, check=True)


def write_shard_writer(files: Files, out_dir: Path) -> None:
    """webdataset's ShardWriter: labels and metadata, no digest, no index, nothing synced."""
    maxcount = ShardLimits().num_samples
    with webdataset.ShardWriter(str(out_dir / "shard-%06d.tar"), maxcount=maxcount, verbose=0) as writer:
        for picture in files.pictures:
            image = picture.place.read()
            writer.write({"__key__": picture.sample_key, "jpg": image, "cls": b"3", "json": METADATA})


def with_sync(write: Callable[[Files, Path], None], files: Files, out_dir: Path) -> None:
    """Write, then sync what was written: the durability that ours has."""
    write(files, out_dir)
    for path in out_dir.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(out_dir)


def bench_build(folder: Path, *, cache_dir: Path, repeats: int) -> list[Finding]:
    """Compare MB/s; the first turn of each, which fills the page cache, is not counted."""
    files = list_files(folder)
    writers: dict[str, Callable[[Files, Path], None]] = {
        OURS: write_ours,
        SECOND_PASS: write_second_pass,
        SYNCED_TAR: functools.partial(with_sync, write_tar),
        BARE_TAR: write_tar,
        SHARD_WRITER: functools.partial(with_sync, write_shard_writer),
    }
    measures = [
        functools.partial(_seconds, write=write, files=files, out_dir=cache_dir / "written")
        for write in writers.values()
    ]
    seconds = {name: runs[1:] for name, runs in zip(writers, interleave(measures, repeats=repeats + 1), strict=True)}
    mb_per_s = {name: [files.num_bytes / 1e6 / run_s for run_s in runs] for name, runs in seconds.items()}
    samples_per_s = {name: [len(files.pictures) / run_s for run_s in runs] for name, runs in seconds.items()}
    size = f"{files.num_bytes / len(files.pictures) / 1e3:.0f} kB pictures"
    rows = [
        (f"build: writing {size}", OURS, SYNCED_TAR, TAR_GOAL),
        (f"build: writing {size}", OURS, BARE_TAR, TAR_GOAL),
        (f"build: writing {size}", OURS, SHARD_WRITER, SHARD_WRITER_GOAL),
        ("build: the same, keys checked again", SECOND_PASS, SYNCED_TAR, TAR_GOAL),
    ]
    return [
        compare(what, unit, speeds[ours], speeds[peer], peer_name=peer, goal=goal)
        for unit, speeds in (("MB/s", mb_per_s), ("samples/s", samples_per_s))
        for what, ours, peer, goal in rows
    ]


def _seconds(repeat: int, *, write: Callable[[Files, Path], None], files: Files, out_dir: Path) -> float:
    """The wall time of one writing into an empty folder; nothing that another wrote is still on its way to the disk."""
    out_dir.mkdir(parents=True)
    os.sync()
    try:
        started_s = time.perf_counter()
        write(files, out_dir)
        return time.perf_counter() - started_s
    finally:
        shutil.rmtree(out_dir)
