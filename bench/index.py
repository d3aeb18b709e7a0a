"""The indexing of tars that others wrote, beside no more than reading them, and beside reading them with their sha256."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from aplantida_dist.files import sha256_of_file
from aplantida_dist.shards.tars import read_tars
from bench.finding import Finding, Goal, compare, interleave
from bench.pictures import Pictures

READ_BYTES = 2**20
GOAL = Goal("at least", 0.8)


def index(paths: Sequence[Path]) -> int:
    """Ours: the members, .json and .cls of each sample, the crc32 of its image, the sha256 of the tar; returns the samples."""
    return len(read_tars(f"{{{','.join(map(str, paths))}}}", class_names=None).records)


def read(paths: Sequence[Path]) -> int:
    """Every byte into one buffer; returns how many."""
    buffer = bytearray(READ_BYTES)
    num_bytes = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                num_bytes += count
    return num_bytes


def read_with_sha256(paths: Sequence[Path]) -> int:
    """Every byte into a digest, which an index of a tar must hold; returns how many digests."""
    return len([sha256_of_file(path) for path in paths])


def bench_index(pictures: Pictures, *, repeats: int) -> list[Finding]:
    """Compare the megabytes a second (wall, page cache) over our own shards, taken as tars of others. The first pass is not counted."""
    paths = [pictures.split.shard_path(shard_index) for shard_index in range(len(pictures.split.shard_sizes))]
    acts: dict[str, Callable[[Sequence[Path]], int]] = {
        "ours": index,
        "reading": read,
        "reading + sha256": read_with_sha256,
    }
    measures = [functools.partial(_megabytes_per_s, act=act, paths=paths) for act in acts.values()]
    ours, *peers = (speeds[1:] for speeds in interleave(measures, repeats=repeats + 1))
    return [
        compare("index of foreign tars: speed", "MB/s", ours, speeds, peer_name=name, goal=GOAL)
        for name, speeds in zip(list(acts)[1:], peers, strict=True)
    ]


def _megabytes_per_s(repeat: int, *, act: Callable[[Sequence[Path]], int], paths: Sequence[Path]) -> float:
    started_s = time.perf_counter()
    act(paths)
    return sum(path.stat().st_size for path in paths) / 1e6 / (time.perf_counter() - started_s)
