"""The pictures that every loader reads: a herbarium of photograph size, drawn once and kept as a folder and as shards."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from aplantida_dist.data.dataset import Split, open_dataset
from aplantida_dist.herbarium import draw_herbarium
from aplantida_dist.herbarium.collection import METADATA_FILE
from aplantida_dist.shards.builder import BuildOptions, build_dataset
from aplantida_dist.shards.folder import read_folder
from aplantida_dist.shards.writer import ShardLimits

SEED = 0
NUM_SPECIES = 16
NUM_SHARDS = 12
"""Several and even, because webdataset deals out whole shards: each worker gets as many pictures."""


@dataclass(frozen=True)
class Pictures:
    """The same pictures twice: `folder` holds a folder a class, `split` the shards."""

    folder: Path
    split: Split


def prepare_pictures(
    cache_dir: Path, *, num_pictures: int, width: int, height: int, workers: int, num_shards: int = NUM_SHARDS
) -> Pictures:
    """Open the pictures of this number and size; draw them first where an earlier run has not."""
    home = cache_dir / f"{num_pictures}-pictures-{width}x{height}"
    folder, dataset_dir = home / "pictures" / "train", home / f"dataset_{num_shards}"
    if not (folder / METADATA_FILE).exists():  # it is written last
        shutil.rmtree(home, ignore_errors=True)
        draw_herbarium(
            folder,
            num_species=NUM_SPECIES,
            num_pictures=num_pictures,
            width=width,
            height=height,
            seed=SEED,
            workers=workers,
        )
    if not dataset_dir.exists():
        limits = ShardLimits(num_samples=-(-num_pictures // num_shards))
        options = BuildOptions(seed=SEED, limits=limits, num_workers=0, replace=False)
        build_dataset(read_folder(folder.parent), dataset_dir, options=options)
    return Pictures(folder, open_dataset(dataset_dir).open_split("train"))
