"""Small pictures for the tests, and folders of them."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from aplantida_dist.shards.account import Account
from aplantida_dist.shards.builder import BuildOptions, build_dataset
from aplantida_dist.shards.folder import read_folder
from aplantida_dist.shards.writer import ShardLimits


def draw(number: int, *, image_format: str = "JPEG", width: int = 40, height: int = 36) -> bytes:
    """The encoded picture of this number: noise, so that no two numbers share their bytes."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=image_format)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> Path:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def fill(folder: Path, counts: dict[str, int], *, first: int = 0) -> int:
    """Draw `counts[class]` pictures into each class folder; returns the first number that is not used."""
    for class_name, count in counts.items():
        (folder / class_name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            put(folder / class_name / f"{number}.jpg", draw(number))
        first += count
    return first


def build(
    folder: Path,
    dataset_dir: Path,
    *,
    seed: int = 0,
    num_workers: int = 0,
    replace: bool = False,
    limits: ShardLimits | None = None,
    keep_splits_of: Path | None = None,
    near_distance: int | None = 2,
    min_samples: int = 1,
) -> Account:
    """Build in this process."""
    options = BuildOptions(
        seed=seed,
        limits=limits or ShardLimits(),
        num_workers=num_workers,
        replace=replace,
        keep_splits_of=keep_splits_of,
        near_distance=near_distance,
        min_samples=min_samples,
    )
    return build_dataset(read_folder(folder), dataset_dir, options=options)


def digests_of(folder: Path) -> dict[str, str]:
    """Every file below a folder with the sha256 of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
