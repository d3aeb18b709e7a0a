"""Build a dataset: shards, indexes and manifests out of a folder of pictures, or out of records and their pictures."""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentTypeError
from pathlib import Path

from aplantida_dist.command import CommandParser, count, run_command
from aplantida_dist.data.manifest import MAX_QUALITY, Reencoding
from aplantida_dist.errors import UserError
from aplantida_dist.shards.account import to_text
from aplantida_dist.shards.builder import BuildOptions, build_dataset
from aplantida_dist.shards.folder import read_folder
from aplantida_dist.shards.groups import MAX_DISTANCE
from aplantida_dist.shards.jsonl import read_jsonl
from aplantida_dist.shards.licence import parse_requirement
from aplantida_dist.shards.placement import require_free_place
from aplantida_dist.shards.reencode import DEFAULT_QUALITY
from aplantida_dist.shards.source import Source
from aplantida_dist.shards.writer import ShardLimits

EXAMPLE = """\
example:
  python shards/build.py --from-folder my_pictures --out shards/mine
  python shards/build.py --from-jsonl records.jsonl --image-dir pictures --require-license commercial --out shards/mine
  python shards/build.py --from-folder my_pictures --max-side 512 --quality 90 --out shards/small

my_pictures holds one folder a class, or train/, val/ (or validation/) and test/ with one folder a class in each.
A metadata.jsonl beside them, one JSON object a line with `image_path`, is kept with each sample as KEY.json.

records.jsonl holds one JSON object a line: `latin_name` (the class) and `image_url` or `image_path`; further plant_id, common_name,
image_source, license, attribution, region, country, which are kept, and `split` (train, val, validation or test) in all lines or none.
The picture of a URL lies in pictures as md5(url).jpg (.jpeg, .png, .webp), an image_path is relative to pictures.

A build that was killed is removed by the next one of the same dataset, which starts clean and says so.
"""


def main() -> None:
    options = _parser().parse_args()
    requirement = parse_requirement(options.require_license)
    reencoding = _reencoding_of(options)
    # Before the source is read: a million records take half a minute.
    require_free_place(options.out, replace=options.replace)
    account = build_dataset(
        _read_source(options),
        options.out,
        options=BuildOptions(
            seed=options.seed,
            limits=ShardLimits(num_samples=options.shard_samples, num_bytes=options.shard_bytes),
            num_workers=options.workers,
            replace=options.replace,
            licence=requirement,
            keep_splits_of=options.keep_splits,
            near_distance=options.near_duplicates,
            reencoding=reencoding,
        ),
    )
    print(to_text(account))
    print(f"report: {options.out / 'report.md'}")


def _read_source(options: argparse.Namespace) -> Source:
    if options.from_folder is not None:
        if options.image_dir is not None:
            raise UserError("--image-dir belongs to --from-jsonl; leave it out, or give records instead of a folder")
        return read_folder(options.from_folder)
    if options.image_dir is None:
        raise UserError("--from-jsonl needs --image-dir, the folder of the pictures; see shards/build.py --help")
    return read_jsonl(options.from_jsonl, options.image_dir)


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
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--from-folder", type=Path, metavar="DIR", help="the folder of pictures")
    source.add_argument("--from-jsonl", type=Path, metavar="FILE", help="records of pictures, one JSON object a line")
    parser.add_argument("--image-dir", type=Path, metavar="DIR", help="where the pictures of --from-jsonl lie")
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
