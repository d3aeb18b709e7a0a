"""Tars for the tests, as others write them: with webdataset's ShardWriter, and member by member."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import webdataset
from pictures import draw

from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.images import EvaluationTransform
from aplantida_dist.data.plan import Coordinates, StoredPlan
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from aplantida_dist.shards.account import Account
from aplantida_dist.shards.builder import BuildOptions, build_dataset
from aplantida_dist.shards.joined import joined
from aplantida_dist.shards.licence import parse_requirement
from aplantida_dist.shards.source import Source
from aplantida_dist.shards.tars import read_tars
from aplantida_dist.shards.writer import ShardLimits

Files = list[tuple[str, bytes]]


def pack(
    path: Path, files: Iterable[tuple[str | tarfile.TarInfo, bytes]], *, tar_format: int = tarfile.GNU_FORMAT
) -> Path:
    """Write a tar of these members; a TarInfo stands for itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format, encoding="utf-8") as tar:
        for name, content in files:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return path


def sample(key: str, number: int, class_name: str = "Acer", *, suffix: str = "jpg", **fields: Any) -> Files:
    """The files of a sample: the picture of this number, and what is known of it."""
    return [
        (f"{key}.{suffix}", draw(number)),
        (f"{key}.json", json.dumps({"latin_name": class_name, **fields}).encode()),
    ]


def write_shards(pattern: str, samples: Sequence[dict[str, Any]], *, num_samples: int) -> list[Path]:
    """Write tars as webdataset's ShardWriter does by default; each begins at key 000000 again."""
    with webdataset.ShardWriter(pattern, maxcount=num_samples, verbose=0) as writer:
        for number, one in enumerate(samples):
            writer.write({"__key__": f"{number % num_samples:06d}", **one})
    return sorted(Path(pattern).parent.glob("*.tar"))


def build_sources(sources: Sequence[Source], out: Path, *, licence: str = "any", **options: Any) -> Account:
    """Build in this process, in shards of 7 samples."""
    given = {"seed": 0, "limits": ShardLimits(num_samples=7), "num_workers": 0, "replace": False, "near_distance": 2}
    return build_dataset(
        joined(sources), out, options=BuildOptions(**{**given, **options}, licence=parse_requirement(licence))
    )


def build_tars(urls: str | Path, out: Path, *, class_names: tuple[str, ...] | None = None, **options: Any) -> Account:
    return build_sources([read_tars(str(urls), class_names=class_names)], out, **options)


def read_split(dataset_dir: Path, split_name: str) -> dict[str, tuple[str, bytes, dict[str, Any]]]:
    """sample key → class name, pixels, metadata, as the evaluation streams them."""
    dataset = open_dataset(dataset_dir)
    split = dataset.open_split(split_name)
    plan = StoredPlan(split.shard_sizes, 4)
    micro_batches = MicroBatches(split, plan, EvaluationTransform(16, 1.0, "bicubic"), seed=0, with_metadata=True)
    slots = [Coordinates(0, 0, slot) for slot in plan.slots_of(0, 1)]
    found: dict[str, tuple[str, bytes, dict[str, Any]]] = {}
    for batch in stream(micro_batches, slots, reading=Reading(0, 2, pin_memory=False)):
        for i, key in enumerate(batch.sample_keys):
            name = dataset.class_map.class_names[int(batch.labels[i])]
            found[key] = (name, batch.images[i].numpy().tobytes(), batch.metadata[i])
    assert len(found) == split.num_samples
    return found


def read_dataset(dataset_dir: Path) -> dict[str, tuple[str, bytes, dict[str, Any]]]:
    """The same of all its splits together."""
    splits = [split for split in ("train", "val", "test") if open_dataset(dataset_dir).has_split(split)]
    return {key: found for split in splits for key, found in read_split(dataset_dir, split).items()}
