"""Verify a dataset: read every shard, index and digest, and list everything that is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

from aplantida_dist.command import CommandParser, run_command
from aplantida_dist.shards.verify import verify_dataset

EXAMPLE = """\
example:
  python shards/verify.py shards/mine

Exit code 0 and one line when the dataset is sound, else 2 and one line on stderr for each thing that is wrong.
"""


def main() -> int:
    parser = CommandParser(prog="shards/verify.py", description=str(__doc__), example=EXAMPLE)
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="the folder that shards/build.py made")
    dataset_dir: Path = parser.parse_args().dataset
    verdict = verify_dataset(dataset_dir)
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
