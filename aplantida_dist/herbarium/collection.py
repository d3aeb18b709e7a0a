"""A whole herbarium on disk: how many pictures each species has, and drawing them in parallel."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.errors import UserError
from aplantida_dist.files import write_whole
from aplantida_dist.herbarium.names import MAX_SPECIES
from aplantida_dist.herbarium.picture import draw_leaf, encode_jpeg
from aplantida_dist.herbarium.records import make_record
from aplantida_dist.herbarium.species import make_species

METADATA_FILE = "metadata.jsonl"
EVEN_SHARE = 0.5
"""The share of the pictures that is dealt evenly, unless told otherwise."""

_PICTURES_A_TASK = 32
_SMALLEST_SIDE = 16
_NEWS_EVERY_S = 5.0


class HerbariumError(UserError):
    """A herbarium that cannot be drawn as asked."""


@dataclass(frozen=True)
class HeldOut:
    """How many pictures of every species val/ and test/ get, besides those of train/: as many of a rare species as of a common one."""

    val: int
    test: int


@dataclass(frozen=True)
class _Picture:
    """One picture to draw. `split` is the folder above that of its species, or empty."""

    split: str
    species: int
    index: int


@dataclass(frozen=True)
class _Task:
    """Consecutive pictures of one or more species, for one worker."""

    out_dir: Path
    seed: int
    width: int
    height: int
    pictures: tuple[_Picture, ...]


def draw_herbarium(
    out_dir: Path,
    *,
    num_species: int,
    num_pictures: int,
    width: int,
    height: int,
    seed: int,
    workers: int,
    even_share: float = EVEN_SHARE,
    held_out: HeldOut | None = None,
) -> None:
    """Draw a herbarium: a folder of JPEG files a species, and metadata.jsonl, which is written last.

    With `held_out` those are train/, and val/ and test/ lie beside it, with the same number of further pictures of every species.
    The bytes depend on everything but `workers`. Raises HerbariumError when the folder holds something already, or when
    the numbers do not fit each other.
    """
    _require_drawable(num_species=num_species, side=min(width, height), workers=workers)
    counts = count_pictures(num_species=num_species, num_pictures=num_pictures, even_share=even_share).tolist()
    pictures = [picture for species, count in enumerate(counts) for picture in _pictures_of(species, count, held_out)]
    folder_names = [make_species(seed, index).folder_name for index in range(num_species)]
    _make_folders(out_dir, {Path(picture.split, folder_names[picture.species]) for picture in pictures})
    tasks = [
        _Task(out_dir, seed, width, height, tuple(pictures[start : start + _PICTURES_A_TASK]))
        for start in range(0, len(pictures), _PICTURES_A_TASK)
    ]
    lines = [line for part in _with_news(_done(tasks, workers=workers), total=len(pictures)) for line in part]
    write_whole(out_dir / METADATA_FILE, "".join(f"{line}\n" for line in lines).encode())


def count_pictures(*, num_species: int, num_pictures: int, even_share: float) -> NDArray[np.int64]:
    """How many pictures each species has, int64 [num_species], summing to `num_pictures`; at least one each.

    `even_share` of the pictures is dealt evenly, so each species has at least that share of the mean; the rest follows
    Zipf's law, 1 / rank, in the order of the species.
    """
    if num_pictures < num_species:
        raise HerbariumError(
            f"herbarium: {num_pictures} pictures are too few for {num_species} species; ask for at least one picture a species"
        )
    if not 0.0 <= even_share <= 1.0:
        raise HerbariumError(f"herbarium: an even share of {even_share:g} is no share; give a number from 0 to 1")
    least = max(int(even_share * num_pictures) // num_species, 1)
    rest = num_pictures - least * num_species
    ends = np.cumsum(1.0 / np.arange(1, num_species + 1))
    shares = np.diff(np.rint(rest * ends / ends[-1]).astype(np.int64), prepend=0)
    return np.asarray(least + np.sort(shares)[::-1])


def _pictures_of(species: int, count: int, held_out: HeldOut | None) -> list[_Picture]:
    """The pictures of a species: `count` to train with, and those held out, which have the numbers that follow."""
    if held_out is None:
        return [_Picture("", species, index) for index in range(count)]
    splits = ["train"] * count + ["val"] * held_out.val + ["test"] * held_out.test
    return [_Picture(split, species, index) for index, split in enumerate(splits)]


def _require_drawable(*, num_species: int, side: int, workers: int) -> None:
    if not 1 <= num_species <= MAX_SPECIES:
        raise HerbariumError(f"herbarium: {num_species} species asked for; it can draw 1 to {MAX_SPECIES}")
    if side < _SMALLEST_SIDE:
        raise HerbariumError(
            f"herbarium: a side of {side} pixels is too small to draw a leaf; give at least {_SMALLEST_SIDE}"
        )
    if workers < 1:
        raise HerbariumError(f"herbarium: {workers} workers cannot draw; give at least 1")


def _make_folders(out_dir: Path, inner: Iterable[Path]) -> None:
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if any(out_dir.iterdir()):
            raise HerbariumError(f"{out_dir}: the folder is not empty; delete what it holds or choose another one")
        for path in inner:
            (out_dir / path).mkdir(parents=True)
    except OSError as error:
        raise HerbariumError(
            f"{out_dir}: cannot be made a folder of pictures: {error.strerror}; choose another one"
        ) from error


def _done(tasks: list[_Task], *, workers: int) -> Iterator[list[str]]:
    """Draw the tasks, in this process or in several; yields the metadata lines of each task, in order."""
    if workers == 1:
        yield from map(_draw_task, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_draw_task, tasks)


def _draw_task(task: _Task) -> list[str]:
    lines = []
    species_of = {index: make_species(task.seed, index) for index in {picture.species for picture in task.pictures}}
    for picture in task.pictures:
        species = species_of[picture.species]
        record = make_record(species, picture.index)
        if picture.split:
            record = replace(record, image_path=f"{picture.split}/{record.image_path}")
        image = draw_leaf(species, picture.index, width=task.width, height=task.height)
        (task.out_dir / record.image_path).write_bytes(encode_jpeg(image))
        lines.append(json.dumps(asdict(record)))
    return lines


def _with_news(parts: Iterable[list[str]], *, total: int) -> Iterator[list[str]]:
    """Pass the parts on, and say on stderr now and then how far the drawing is."""
    start_s = told_s = time.monotonic()
    done = 0
    for part in parts:
        yield part
        done += len(part)
        now_s = time.monotonic()
        if now_s - told_s >= _NEWS_EVERY_S or done == total:
            told_s = now_s
            print(
                f"herbarium: {done} of {total} pictures, {done / (now_s - start_s):.0f}/s", file=sys.stderr, flush=True
            )
