"""An earlier dataset: the split in which each of its photographs stands, so that a grown one can keep it."""

from __future__ import annotations

from pathlib import Path

from aplantida_dist.data.dataset import Split
from aplantida_dist.data.manifest import MANIFEST_FILE, SPLITS, load_manifest
from aplantida_dist.errors import UserError


class EarlierError(UserError):
    """The splits of this earlier dataset cannot be kept."""


def read_splits(dataset_dir: Path) -> dict[str, str]:
    """Read sample key → split from the tar headers and indexes; no picture is read.

    Raises EarlierError where there is no dataset or a photograph stands in two of its splits, and ManifestError or ShardError
    where it is damaged.
    """
    splits = [split for split in SPLITS if (dataset_dir / split).is_dir()]
    if "train" not in splits:
        raise EarlierError(f"{dataset_dir}: no dataset here whose splits could be kept; give the folder that was built")
    split_of_key: dict[str, str] = {}
    for split in splits:
        earlier = Split(dataset_dir / split, load_manifest(dataset_dir / split / MANIFEST_FILE))
        keys = (key for index in range(len(earlier.manifest.shards)) for key in earlier.sample_keys(index))
        for key in keys:
            if split_of_key.setdefault(key, split) != split:
                raise EarlierError(
                    f"{dataset_dir}: photograph {key} stands in {split_of_key[key]} and in {split}; "
                    "build it again without --keep-splits"
                )
    return split_of_key
