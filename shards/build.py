"""Build a dataset: shards, indexes and manifests out of folders of pictures, records, tars that others wrote, or another dataset."""

from __future__ import annotations

import argparse
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aplantida_dist.command import CommandParser, count, run_command
from aplantida_dist.data.manifest import MAX_QUALITY, Reencoding
from aplantida_dist.errors import UserError
from aplantida_dist.shards.account import Account
from aplantida_dist.shards.audit import MIN_SIDE
from aplantida_dist.shards.builder import BuildOptions, build_dataset
from aplantida_dist.shards.class_names import read_class_names
from aplantida_dist.shards.folder import read_folder
from aplantida_dist.shards.groups import MAX_DISTANCE
from aplantida_dist.shards.joined import joined
from aplantida_dist.shards.jsonl import read_jsonl
from aplantida_dist.shards.licence import parse_requirement
from aplantida_dist.shards.placement import require_free_place
from aplantida_dist.shards.reencode import DEFAULT_QUALITY
from aplantida_dist.shards.report_text import to_text
from aplantida_dist.shards.source import Source
from aplantida_dist.shards.subset import SubsetOptions, build_subset
from aplantida_dist.shards.tars import read_tars
from aplantida_dist.shards.where import parse_condition
from aplantida_dist.shards.writer import ShardLimits

EXAMPLE = """\
example:
  python shards/build.py --from-folder my_pictures --out shards/mine
  python shards/build.py --from-jsonl records.jsonl --image-dir pictures --require-license commercial --out shards/mine
  python shards/build.py --from-tars 'theirs/train-{000..127}.tar' --class-names names.txt --from-folder my_pictures --out shards/both
  python shards/build.py --from-dataset shards/global --where region=EU_SW --out shards/eu_sw
  python shards/build.py --from-folder my_pictures --max-side 512 --quality 90 --out shards/small

my_pictures holds one folder a class, or train/, val/ (or validation/) and test/ with one folder a class in each.
A metadata.jsonl beside them, one JSON object a line with `image_path`, is kept with each sample as KEY.json.

records.jsonl holds one JSON object a line: `latin_name` (the class) and `image_url` or `image_path`; further plant_id, common_name,
image_source, license, attribution, region, country, which are kept, and `split` (train, val, validation or test) in all lines or none.
The picture of a URL lies in pictures as md5(url).jpg (.jpeg, .png, .webp), an image_path is relative to pictures.

theirs/train-000.tar and so on are WebDataset tars, of samples such as 0001.jpg, 0001.json, 0001.cls. They are read where they lie and stay
as they are: the dataset holds indexes onto them. The class is the `latin_name` of the .json, else the .cls: a name, or a number into names.txt.
--from-dataset makes a subset: every photograph keeps its split, its bytes and its metadata, and the subset names its parent by digest.
--where FIELD=VALUE[,VALUE…] compares a field of KEY.json, as text, exactly (a value with a comma stands in double quotes);
FIELD!=VALUE is its opposite, also met where the field is absent. Given several times, all must hold.
What was left out, and why, is in the dataset's report.json and report.md, and with pictures in its report.html.
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


def main() -> None:
    options = _parser().parse_args()
    account = _build(options) if options.from_dataset is None else _build_subset(options)
    print(to_text(account))
    print(f"report: {options.out / 'report.md'}, with pictures of what was left out: {options.out / 'report.html'}")


def _build(options: argparse.Namespace) -> Account:
    if options.where or options.classes is not None:
        raise UserError(
            "--where and --classes belong to --from-dataset; leave them out, or give a dataset to select from"
        )
    requirement = parse_requirement(options.require_license)
    reencoding = _reencoding_of(options)
    # Before the source is read: a million records take half a minute.
    require_free_place(options.out, replace=options.replace)
    return build_dataset(
        joined(_read_sources(options)),
        options.out,
        options=BuildOptions(
            seed=options.seed,
            limits=ShardLimits(num_samples=options.shard_samples, num_bytes=options.shard_bytes),
            num_workers=options.workers,
            replace=options.replace,
            licence=requirement,
            keep_splits_of=options.keep_splits,
            near_distance=options.near_duplicates,
            min_side=options.min_side,
            min_samples=options.min_samples,
            reencoding=reencoding,
        ),
    )


def _build_subset(options: argparse.Namespace) -> Account:
    # The parser knows no abbreviations and no short options, so what begins with -- is an option.
    given = [word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")]
    for option in given:
        if option not in OF_SUBSETS:
            raise UserError(
                f"{option} does not go with --from-dataset, whose photographs are audited and split already; leave it out"
            )
    return build_subset(
        options.from_dataset,
        options.out,
        options=SubsetOptions(
            conditions=tuple(parse_condition(text) for text in options.where),
            limits=ShardLimits(num_samples=options.shard_samples, num_bytes=options.shard_bytes),
            replace=options.replace,
            licence=parse_requirement(options.require_license),
            classes_path=options.classes,
        ),
    )


def _read_sources(options: argparse.Namespace) -> list[Source]:
    """Read what was asked for, in the order of the command line; the n-th --image-dir is that of the n-th --from-jsonl."""
    asked: list[Folder | Records | Tars] = options.sources
    if not asked:
        raise UserError(
            "nothing to build from: give --from-folder, --from-jsonl, --from-tars or --from-dataset; see shards/build.py --help"
        )
    num_records, num_tars = (sum(isinstance(one, kind) for one in asked) for kind in (Records, Tars))
    if num_records and not options.image_dir:
        raise UserError("--from-jsonl needs --image-dir, the folder of the pictures; see shards/build.py --help")
    image_dirs = iter(_one_each(options.image_dir, num_records, "--image-dir", of="--from-jsonl"))
    names_paths = iter(_one_each(options.class_names, num_tars, "--class-names", of="--from-tars"))
    sources = []
    for one in asked:
        match one:
            case Folder(text):
                sources.append(read_folder(Path(text)))
            case Records(text):
                sources.append(read_jsonl(Path(text), next(image_dirs)))
            case Tars(text):
                path = next(names_paths, None)
                sources.append(read_tars(text, class_names=None if path is None else read_class_names(path)))
    return sources


def _one_each(given: Sequence[Path], count: int, option: str, *, of: str) -> Sequence[Path]:
    """As many as there are sources of the kind, from one for all or one for each."""
    if given and not count:
        raise UserError(f"{option} belongs to {of}; leave it out, or give {of} too")
    if len(given) not in (0, 1, count):
        raise UserError(f"{len(given)} {option} for {count} {of}; give one for all, or one for each in their order")
    return [*given] * count if len(given) == 1 else given


def _reencoding_of(options: argparse.Namespace) -> Reencoding | None:
    if options.max_side is not None:
        quality = DEFAULT_QUALITY if options.quality is None else options.quality
        return Reencoding(max_side=options.max_side, quality=quality)
    if options.quality is not None:
        raise UserError("--quality belongs to --max-side; leave it out, or say how long a side may be")
    return None


def _parser() -> CommandParser:
    limits = ShardLimits()
    parser = CommandParser(prog="shards/build.py", description=str(__doc__), example=EXAMPLE)
    _add_sources(parser)
    parser.add_argument("--from-dataset", type=Path, metavar="DATASET", help="a dataset to make a subset of")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="FIELD=VALUE[,VALUE…]",
        help="what the photographs of --from-dataset must be, such as region=EU_SW or country!=US,CA; may be given several times",
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="the classes that a subset may hold, one name a line (default: all)",
    )
    parser.add_argument(
        "--require-license",
        default="any",
        metavar="commercial|any|LIST",
        help="leave out pictures under other licences; a LIST is as CC0,CC-BY,CC-BY-SA (default: any)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DATASET", help="the folder to make; it must not exist"
    )
    parser.add_argument("--replace", action="store_true", help="replace a dataset that stands at --out")
    parser.add_argument(
        "--seed", type=int, default=0, help="decides the split and the order in the shards (default: 0)"
    )
    parser.add_argument(
        "--keep-splits",
        type=Path,
        metavar="DATASET",
        help="an earlier dataset: each photograph of it stays in its split, whatever the seed",
    )
    parser.add_argument(
        "--near-duplicates",
        type=_distance_or_off,
        default="2",
        metavar="DISTANCE|off",
        help=f"pictures whose 64-bit looks differ in at most so many bits stay in one split, 0 to {MAX_DISTANCE} (default: 2)",
    )
    parser.add_argument(
        "--min-side",
        type=count,
        default=MIN_SIDE,
        metavar="PX",
        help=f"leave out pictures whose shorter side, upright, has fewer pixels (default: {MIN_SIDE})",
    )
    parser.add_argument(
        "--min-samples",
        type=count,
        default=1,
        metavar="N",
        help="leave out classes with fewer usable photographs, whole; near duplicates count each (default: 1, none)",
    )
    parser.add_argument(
        "--shard-samples",
        type=int,
        default=limits.num_samples,
        help=f"samples a shard, at most (default: {limits.num_samples})",
    )
    parser.add_argument(
        "--shard-bytes",
        type=int,
        default=limits.num_bytes,
        help=f"bytes a shard, at most (default: {limits.num_bytes})",
    )
    parser.add_argument(
        "--max-side",
        type=count,
        metavar="PIXELS",
        help="make pictures smaller whose longer side exceeds it; the others keep every byte (default: all keep every byte)",
    )
    parser.add_argument(
        "--quality",
        type=_quality,
        metavar="QUALITY",
        help=f"of the JPEGs that --max-side makes, 1 to {MAX_QUALITY} (default: {DEFAULT_QUALITY})",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes that decode, 0 for none beside this one; they do not change the result (default: all cores)",
    )
    return parser


def _add_sources(parser: CommandParser) -> None:
    """All sources go to one list, so that their order is that of the command line."""
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


if __name__ == "__main__":
    run_command(main)
