"""The options of `shards/build.py`: what it may be asked for, and how its help tells of it."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path

from aplantida_dist.command import CommandParser, count
from aplantida_dist.data.manifest import MAX_QUALITY
from aplantida_dist.shards.audit import MIN_SIDE
from aplantida_dist.shards.download.manners import Manners
from aplantida_dist.shards.groups import MAX_DISTANCE
from aplantida_dist.shards.reencode import DEFAULT_QUALITY
from aplantida_dist.shards.writer import ShardLimits

EXAMPLE = """\
example:
  python shards/build.py --from-folder my_pictures --out shards/mine
  python shards/build.py --from-jsonl records.jsonl --image-dir pictures --require-license commercial --out shards/mine
  python shards/build.py --from-jsonl records.jsonl --image-dir pictures --download --out shards/mine
  python shards/build.py --from-tars 'theirs/train-{000..127}.tar' --class-names names.txt --from-folder my_pictures --out shards/both
  python shards/build.py --from-dataset shards/global --where region=EU_SW --out shards/eu_sw
  python shards/build.py --from-folder my_pictures --max-side 512 --quality 90 --out shards/small

my_pictures holds one folder a class, or train/, val/ (or validation/) and test/ with one folder a class in each.
A metadata.jsonl beside them, one JSON object a line with `image_path`, is kept with each sample as KEY.json.

records.jsonl holds one JSON object a line: `latin_name` (the class) and `image_url` or `image_path`; further plant_id, common_name,
image_source, license, attribution, region, country, which are kept, and `split` (train, val, validation or test) in all lines or none.
The picture of a URL lies in pictures as md5(url).jpg (.jpeg, .png, .webp), an image_path is relative to pictures.
With --download the pictures of URLs that are not there are fetched into it first; the same command goes on where it was interrupted.

theirs/train-000.tar and so on are WebDataset tars, of samples such as 0001.jpg, 0001.json, 0001.cls. They are read where they lie and stay
as they are: the dataset holds indexes onto them. The class is the `latin_name` of the .json, else the .cls: a name, or a number into names.txt.
--from-dataset makes a subset: every photograph keeps its split, its bytes and its metadata, and the subset names its parent by digest.
--where FIELD=VALUE[,VALUE…] compares a field of KEY.json, as text, exactly (a value with a comma stands in double quotes);
FIELD!=VALUE is its opposite, also met where the field is absent. Given several times, all must hold.
What was left out, and why, is in the dataset's report.json and report.md, and with pictures in its report.html.
A build that was killed is removed by the next one of the same dataset, which starts clean and says so.
"""

OF_SUBSETS = frozenset(
    "--from-dataset --where --classes --require-license --out --replace --shard-samples --shard-bytes".split()
)
"""The options that go with --from-dataset; all others speak of pictures that are still to be audited and split."""


@dataclass(frozen=True)
class Folder:
    """A --from-folder."""

    text: str


@dataclass(frozen=True)
class Records:
    """A --from-jsonl."""

    text: str


@dataclass(frozen=True)
class Tars:
    """A --from-tars."""

    text: str


def build_parser(description: str) -> CommandParser:
    """The parser of the command. `sources` are in the order of the command line, so that of equal pictures the first source's stays."""
    parser = CommandParser(prog="shards/build.py", description=description, example=EXAMPLE)
    _add_sources(parser)
    _add_subset(parser)
    _add_audit(parser)
    _add_split(parser)
    _add_dataset(parser)
    return parser


def _add_sources(parser: CommandParser) -> None:
    group = parser.add_argument_group(
        "sources", "one or more, also of different kinds; of equal pictures that of the first source stays"
    )
    for option, kind, metavar, text in (
        ("--from-folder", Folder, "DIR", "a folder of pictures"),
        ("--from-jsonl", Records, "FILE", "records of pictures, one JSON object a line"),
        ("--from-tars", Tars, "URLS", "tars that others wrote, indexed in place; {000..127}, {a,b} and * expand"),
    ):
        group.add_argument(option, dest="sources", action="append", default=[], type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--image-dir",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="where the pictures of --from-jsonl lie; one for all, or one for each",
    )
    group.add_argument(
        "--class-names",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="what the numbers in --from-tars stand for: a classes.json, or one name a line; one for all, or one for each",
    )
    group.add_argument(
        "--download", action="store_true", help="fetch what is not in --image-dir from its image_url, politely"
    )
    group.add_argument(
        "--per-host",
        type=count,
        metavar="N",
        help=f"requests open at one host at once, with --download (default: {Manners().per_host})",
    )


def _add_subset(parser: CommandParser) -> None:
    group = parser.add_argument_group("subset", "instead of sources: photographs of a dataset, which keep their splits")
    group.add_argument("--from-dataset", type=Path, metavar="DATASET", help="a dataset to make a subset of")
    group.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="FIELD=VALUE[,VALUE…]",
        help="what the photographs of --from-dataset must be, such as region=EU_SW or country!=US,CA; may be given several times",
    )
    group.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="the classes that a subset may hold, one name a line (default: all)",
    )


def _add_audit(parser: CommandParser) -> None:
    group = parser.add_argument_group("audit", "what a picture must be")
    group.add_argument(
        "--require-license",
        default="any",
        metavar="commercial|any|LIST",
        help="leave out pictures under other licences; a LIST is as CC0,CC-BY,CC-BY-SA (default: any)",
    )
    group.add_argument(
        "--min-side",
        type=count,
        default=MIN_SIDE,
        metavar="PX",
        help=f"leave out pictures whose shorter side, upright, has fewer pixels (default: {MIN_SIDE})",
    )
    group.add_argument(
        "--min-samples",
        type=count,
        default=1,
        metavar="N",
        help="leave out classes with fewer usable photographs, whole; near duplicates count each (default: 1, none)",
    )
    group.add_argument(
        "--near-duplicates",
        type=_distance_or_off,
        default="2",
        metavar="DISTANCE|off",
        help=f"pictures whose 64-bit looks differ in at most so many bits stay in one split, 0 to {MAX_DISTANCE} (default: 2)",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes that decode, 0 for none beside this one; they do not change the result (default: all cores)",
    )


def _add_split(parser: CommandParser) -> None:
    group = parser.add_argument_group("split", "which photographs train, validate and test")
    group.add_argument("--seed", type=int, default=0, help="decides the split and the order in the shards (default: 0)")
    group.add_argument(
        "--keep-splits",
        type=Path,
        metavar="DATASET",
        help="an earlier dataset: each photograph of it stays in its split, whatever the seed",
    )


def _add_dataset(parser: CommandParser) -> None:
    limits = ShardLimits()
    group = parser.add_argument_group("dataset", "what is written, and where")
    group.add_argument(
        "--out", type=Path, required=True, metavar="DATASET", help="the folder to make; it must not exist"
    )
    group.add_argument("--replace", action="store_true", help="replace a dataset that stands at --out")
    group.add_argument(
        "--shard-samples",
        type=int,
        default=limits.num_samples,
        help=f"samples a shard, at most (default: {limits.num_samples})",
    )
    group.add_argument(
        "--shard-bytes",
        type=int,
        default=limits.num_bytes,
        help=f"bytes a shard, at most (default: {limits.num_bytes})",
    )
    group.add_argument(
        "--max-side",
        type=count,
        metavar="PIXELS",
        help="make pictures smaller whose longer side exceeds it; the others keep every byte (default: all keep every byte)",
    )
    group.add_argument(
        "--quality",
        type=_quality,
        metavar="QUALITY",
        help=f"of the JPEGs that --max-side makes, 1 to {MAX_QUALITY} (default: {DEFAULT_QUALITY})",
    )


def _distance_or_off(text: str) -> int | None:
    if text == "off":
        return None
    if text.isascii() and text.isdigit() and int(text) <= MAX_DISTANCE:
        return int(text)
    raise ArgumentTypeError(f"{text!r} is no distance; give 0 to {MAX_DISTANCE}, or off")


def _quality(text: str) -> int:
    if text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_QUALITY:
        return int(text)
    raise ArgumentTypeError(f"{text!r} is no quality; give 1 to {MAX_QUALITY}")
