"""The manifest: its shards are columns inside, and nothing of that shows outside; a broken one is refused where it is broken."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aplantida_dist.data.manifest import (
    Manifest,
    ManifestError,
    Shard,
    Shards,
    load_manifest,
    make_manifest,
    save_manifest,
)
from aplantida_dist.files import digest
from bench.scale import make_dataset, start

MOST = 2**53


def random_shards(seed: int) -> tuple[Shard, ...]:
    """Shards of none to many classes, with counts from 0 to the largest that a manifest may state, some of them foreign."""
    random = np.random.default_rng(seed)
    shards = []
    for number in range(int(random.integers(0, 12))):
        labels = random.choice(10 ** int(random.integers(1, 11)), int(random.integers(0, 9)))
        counts = {str(label): int(MOST ** random.random()) - 1 for label in labels.tolist()}
        shards.append(
            Shard(
                name=f"shard-{number}.tar",
                num_samples=min(sum(counts.values()), MOST),
                bytes=int(random.integers(0, MOST)),
                sha256=random.bytes(32).hex(),
                index_sha256=random.bytes(32).hex(),
                class_counts=counts,
                url=f"file:///tars/{number}" if random.random() < 0.3 else None,
            )
        )
    return tuple(shards)


@pytest.mark.parametrize("seed", range(60))
def test_columns_give_back_what_they_were_given(seed: int, tmp_path: Path) -> None:
    """Each shard, each part of them, the totals as Python would add them, the file, and the digest of the content without the urls."""
    shards = random_shards(seed)
    table = Shards(shards)
    assert table == shards
    assert list(table) == list(shards)
    assert [table[place] for place in range(-len(shards), len(shards))] == [*shards, *shards]
    assert table[1:-1] == shards[1:-1]
    assert table.sizes.tolist() == [shard.num_samples for shard in shards]
    totals: Counter[str] = Counter()
    for shard in shards:
        totals.update(shard.class_counts)
    assert table.columns.totals_of_classes() == dict(totals)
    assert list(table.columns.totals_of_classes()) == sorted(totals, key=int)
    assert table.columns.totals_of_shards() == [sum(shard.class_counts.values()) for shard in shards]
    stated = {"class_counts": {}, "num_samples": 0}
    manifest = make_manifest(split="train", class_map_digest="x", shards=(), identity_sum=7).model_copy(
        update={"shards": table, **stated}
    )
    plain = manifest.model_dump(mode="json")
    assert plain["shards"] == [shard.model_dump(mode="json") for shard in shards]
    without_urls = [{name: value for name, value in shard.items() if name != "url"} for shard in plain["shards"]]
    assert manifest.digest == digest(plain | {"shards": without_urls})
    assert Manifest.model_validate(plain) == manifest


def test_a_manifest_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    """Object by object, also where all its totals agree and it is loaded whole."""
    shard = next(shard for shard in random_shards(3) if sum(shard.class_counts.values()) == shard.num_samples)
    manifest = make_manifest(split="train", class_map_digest="x", shards=(shard,), identity_sum=7)
    save_manifest(manifest, tmp_path)
    loaded = load_manifest(tmp_path / "manifest.json")
    assert loaded == manifest
    assert loaded.digest == manifest.digest


def test_sums_beyond_what_a_machine_word_holds_do_not_wrap() -> None:
    """2,048 counts of 2^53 add up to 2^64, which is not 0."""
    shard = random_shards(3)[0].model_copy(
        update={"class_counts": {str(label): MOST for label in range(2048)}, "num_samples": 0, "url": None}
    )
    table = Shards([shard] * 3)
    assert table.columns.totals_of_shards() == [2**64] * 3
    assert table.columns.totals_of_classes() == {str(label): 3 * MOST for label in range(2048)}


def sound() -> dict[str, Any]:
    shards = tuple(
        Shard(
            name=f"shard-{number}.tar",
            num_samples=3,
            bytes=10,
            sha256="0" * 64,
            index_sha256="1" * 64,
            class_counts={"0": 1, "4": 2},
        )
        for number in range(3)
    )
    return make_manifest(split="train", class_map_digest="x", shards=shards, identity_sum=7).model_dump(mode="json")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("shards", 1, "name"), "../x.tar", "shards.1.name: String should match pattern"),
        (("shards", 2, "bytes"), -1, "shards.2.bytes: Input should be greater than or equal to 0"),
        (("shards", 0, "num_samples"), 3.0, "shards.0.num_samples: Input should be a valid integer"),
        (("shards", 1, "class_counts"), {"04": 3}, "shards.1.class_counts.04.[key]: String should match pattern"),
        (("shards", 1, "extra"), 1, "shards.1.extra: Extra inputs are not permitted"),
        (("shards", 1), "shard", "shards.1: Input should be a valid dictionary or instance of Shard"),
        (("shards",), {"0": 1}, "shards: Input should be a valid tuple"),
        (("licence",), sound()["shards"][0], "licence: Input should be a valid string"),
        (("shards", 1, "num_samples"), 4, "states 9 samples, its shards add up to 10"),
        (("num_samples",), 8, "states 8 samples, its shards add up to 9"),
        (("class_counts", "4"), 7, "the class counts are not the sums over the shards"),
        (("shards", 1, "name"), "shard-0.tar", "a shard name stands more than once"),
    ],
)
def test_what_is_wrong_is_said_where_it_is(place: tuple[Any, ...], value: Any, said: str, tmp_path: Path) -> None:
    """By the path in the file, one line, whatever was sound before and after it."""
    content: Any = sound()
    inside = content
    for step in place[:-1]:
        inside = inside[step]
    inside[place[-1]] = value
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ManifestError) as refused:
        load_manifest(path)
    assert str(refused.value).startswith(f"{path}: {said}")
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_ten_thousand_shards_are_no_objects(tmp_path: Path) -> None:
    """Opened, digested, planned: a million class counts in at most 70 MiB, of which the text of 16 MB is there twice (an object each took 250)."""
    make_dataset(tmp_path / "dataset", num_shards=10_000, classes_a_shard=100)
    found = start(tmp_path / "dataset")
    assert found.memory_mib < 70.0
    assert found.jump_s < 1.0
    assert found.index_s < 0.5
