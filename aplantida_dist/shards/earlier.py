"""An earlier dataset: the split in which each of its photographs stands, so that a grown one can keep it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from aplantida_dist.data.index import ShardError, read_index, read_key
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
        for key in _read_keys(dataset_dir / split):
            if split_of_key.setdefault(key, split) != split:
                raise EarlierError(
                    f"{dataset_dir}: photograph {key} stands in {split_of_key[key]} and in {split}; "
                    "build it again without --keep-splits"
                )
    return split_of_key


def _read_keys(split_dir: Path) -> Iterator[str]:
    for shard in load_manifest(split_dir / MANIFEST_FILE).shards:
        path = split_dir / shard.name
        index = read_index(split_dir / shard.index_name, num_samples=shard.num_samples, sha256=shard.index_sha256)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"{path}: cannot be opened: {error.strerror}; restore the shard") from error
        try:
            for entry in index:
                yield read_key(descriptor, entry, shard_path=path)
        finally:
            os.close(descriptor)
