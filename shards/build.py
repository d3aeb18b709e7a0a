"""Build a dataset: shards, indexes and manifests out of folders of pictures, records, tars that others wrote, or another dataset."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aplantida_dist.command import run_command
from aplantida_dist.data.manifest import Reencoding
from aplantida_dist.errors import UserError
from aplantida_dist.shards.account import Account
from aplantida_dist.shards.builder import BuildOptions, build_dataset
from aplantida_dist.shards.class_names import read_class_names
from aplantida_dist.shards.download.downloader import download
from aplantida_dist.shards.download.failure import Failure
from aplantida_dist.shards.download.haul import to_text as haul_to_text
from aplantida_dist.shards.download.manners import Manners
from aplantida_dist.shards.folder import read_folder
from aplantida_dist.shards.joined import joined
from aplantida_dist.shards.jsonl import read_jsonl, read_shortfall
from aplantida_dist.shards.licence import Requirement, parse_requirement
from aplantida_dist.shards.options import OF_SUBSETS, Folder, Records, Tars, build_parser
from aplantida_dist.shards.placement import require_free_place
from aplantida_dist.shards.reencode import DEFAULT_QUALITY
from aplantida_dist.shards.report_text import to_text
from aplantida_dist.shards.source import Source
from aplantida_dist.shards.subset import SubsetOptions, build_subset
from aplantida_dist.shards.tars import read_tars
from aplantida_dist.shards.where import parse_condition
from aplantida_dist.shards.writer import ShardLimits

UNLICENSED = Failure("refused", "not asked for under its licence")


def main() -> None:
    options = build_parser(str(__doc__)).parse_args()
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
        joined(_read_sources(options, requirement)),
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


def _read_sources(options: argparse.Namespace, requirement: Requirement) -> list[Source]:
    """Read what was asked for, in the order of the command line; the n-th --image-dir is that of the n-th --from-jsonl."""
    asked: list[Folder | Records | Tars] = options.sources
    if not asked:
        raise UserError(
            "nothing to build from: give --from-folder, --from-jsonl, --from-tars or --from-dataset; see shards/build.py --help"
        )
    if options.per_host is not None and not options.download:
        raise UserError("--per-host belongs to --download; leave it out, or add --download")
    num_records, num_tars = (sum(isinstance(one, kind) for one in asked) for kind in (Records, Tars))
    if num_records and not options.image_dir:
        raise UserError("--from-jsonl needs --image-dir, the folder of the pictures; see shards/build.py --help")
    if options.download and not num_records:
        raise UserError("--download belongs to --from-jsonl; leave it out, or give --from-jsonl too")
    image_dirs = iter(_one_each(options.image_dir, num_records, "--image-dir", of="--from-jsonl"))
    names_paths = iter(_one_each(options.class_names, num_tars, "--class-names", of="--from-tars"))
    sources = []
    for one in asked:
        match one:
            case Folder(text):
                sources.append(read_folder(Path(text)))
            case Records(text):
                records_path, image_dir = Path(text), next(image_dirs)
                failures = _download(records_path, image_dir, options, requirement) if options.download else {}
                sources.append(read_jsonl(records_path, image_dir, not_downloaded=failures))
            case Tars(text):
                path = next(names_paths, None)
                sources.append(read_tars(text, class_names=None if path is None else read_class_names(path)))
    return sources


def _download(
    records_path: Path, image_dir: Path, options: argparse.Namespace, requirement: Requirement
) -> dict[str, Failure]:
    """Fetch what is not there; returns each URL that did not come, and why."""
    shortfall = read_shortfall(records_path, image_dir, requirement=requirement)
    unlicensed = dict.fromkeys(shortfall.unlicensed, UNLICENSED)
    print(f"pictures of {shortfall.num_there:,} records are there already", flush=True)
    if unlicensed:
        print(
            f"{len(unlicensed):,} URLs are not fetched, for want of a licence that --require-license accepts",
            flush=True,
        )
    manners = Manners() if options.per_host is None else Manners(per_host=options.per_host)
    haul = download(shortfall.urls, image_dir, manners=manners)
    print(haul_to_text(haul), flush=True)
    return unlicensed | haul.failures


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


if __name__ == "__main__":
    run_command(main)
