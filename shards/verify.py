"""Verify a dataset: read every shard, index and digest, and list everything that is wrong; a subset also beside its parent."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from aplantida_dist.command import CommandParser, run_command
from aplantida_dist.shards.parentage import check_parentage
from aplantida_dist.shards.verify import verify_dataset

EXAMPLE = """\
example:
  python shards/verify.py shards/mine
  python shards/verify.py shards/eu_sw --parent shards/global

Exit code 0 and one line when the dataset is sound, else 2 and one line on stderr for each thing that is wrong.
"""


def main() -> int:
    parser = CommandParser(prog="shards/verify.py", description=str(__doc__), example=EXAMPLE)
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="the folder that shards/build.py made")
    parser.add_argument(
        "--parent",
        type=Path,
        metavar="DATASET",
        help="the dataset that this one is a subset of: compare digests, class names, and each photograph's split and class",
    )
    options = parser.parse_args()
    dataset_dir: Path = options.dataset
    verdict = verify_dataset(dataset_dir)
    if options.parent is not None and not verdict.damages:
        # Only of a sound dataset can be asked whether it is as its parent has it.
        verdict = replace(verdict, damages=check_parentage(dataset_dir, options.parent))
    read = f"{verdict.num_splits} splits, {verdict.num_shards:,} shards, {verdict.num_samples:,} samples"
    if not verdict.damages:
        print(f"{dataset_dir}: sound: {read}")
        return 0
    for damage in verdict.damages:
        print(damage, file=sys.stderr)
    print(
        f"{dataset_dir}: {len(verdict.damages)} things are wrong ({read} read); copy these files again or rebuild the dataset",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    run_command(main)
