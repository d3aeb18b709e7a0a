"""The shards are plain WebDataset: other people's readers see every sample with its label."""

from __future__ import annotations

import gc
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset
from pictures import build, fill
from PIL import Image
from timm.data import create_dataset

from aplantida_dist.data.manifest import load_manifest
from aplantida_dist.shards.audit import sample_key_of
from aplantida_dist.shards.writer import ShardLimits

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
COUNTS = {"birch": 20, "oak": 12, "yew": 10}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, several shards in train and one in val and test."""
    folder = tmp_path_factory.mktemp("readable")
    fill(folder / "source", COUNTS)
    build(folder / "source", folder / "set", limits=ShardLimits(num_samples=8))
    return folder / "set"


@pytest.fixture(autouse=True)
def collect_what_readers_leave_open() -> Iterator[None]:
    """webdataset leaves its shards to the collector; collected here, their warnings do not reach other tests."""
    yield
    gc.collect()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_webdataset_reads_every_sample_with_its_label(dataset: Path, split: str) -> None:
    """Plain `webdataset.WebDataset` gives each image once, under the key of its bytes, with the label of its class folder."""
    manifest = load_manifest(dataset / split / "manifest.json")
    class_names = json.loads((dataset / "classes.json").read_text())["classes"]
    paths = [str(dataset / split / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert len(samples) == len({sample["__key__"] for sample in samples}) == manifest.num_samples
    for sample in samples:
        assert sample_key_of(sample["jpg"]) == sample["__key__"]
        assert json.loads(sample["json"])["image_source"].startswith(f"{class_names[int(sample['cls'])]}/")
        assert Image.open(io.BytesIO(sample["jpg"])).size == (40, 36)
    assert Counter(sample["cls"].decode() for sample in samples) == manifest.class_counts


def timm_split(manifest_shards: int, num_samples: int) -> str:
    """How timm names a split that has no _info.json: a brace list of the shards, and the number of samples."""
    return f"shard-{{000000..{manifest_shards - 1:06d}}}.tar|{num_samples}"


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("is_training", [False, True])
def test_timm_reads_every_sample_with_its_label(dataset: Path, split: str, is_training: bool) -> None:
    """timm's wds reader, given the shards and their count by its `split` argument, gives the samples of the manifest."""
    manifest = load_manifest(dataset / split / "manifest.json")
    name = timm_split(len(manifest.shards), manifest.num_samples)
    read = create_dataset("wds/", root=str(dataset / split), split=name, is_training=is_training, batch_size=1)
    assert len(read) == manifest.num_samples
    labels = [int(label) for image, label in read if image.size == (40, 36)]
    assert Counter(map(str, labels)) == manifest.class_counts


def test_timm_and_manifest_agree_sample_by_sample(dataset: Path) -> None:
    """In evaluation timm yields the samples in the shards' order, with the very pixels and labels of the tar."""
    manifest = load_manifest(dataset / "train" / "manifest.json")
    paths = [str(dataset / "train" / shard.name) for shard in manifest.shards]
    plain = webdataset.WebDataset(paths, shardshuffle=False)
    expected = [(Image.open(io.BytesIO(sample["jpg"])).tobytes(), int(sample["cls"])) for sample in plain]
    name = timm_split(len(manifest.shards), manifest.num_samples)
    read = create_dataset("wds/", root=str(dataset / "train"), split=name, is_training=False)
    assert [(image.tobytes(), int(label)) for image, label in read] == expected
