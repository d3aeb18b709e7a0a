"""The split: growth keeps what was there, every class is measured where it can be, and the shares are 80/10/10."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from pictures import build, draw, fill, put

from aplantida_dist.data.manifest import SPLITS
from aplantida_dist.errors import UserError
from aplantida_dist.shards.audit import sample_key_of
from aplantida_dist.shards.earlier import read_splits
from aplantida_dist.shards.split import split_by_class, split_of_digest


def keys_drawn(num_keys: int, *, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [f"{generator.getrandbits(96):024x}" for _ in range(num_keys)]


def split(keys: list[str], *, seed: int = 0, kept: dict[str, str] | None = None) -> dict[str, str]:
    return split_by_class([(key, "oak") for key in keys], seed=seed, kept=kept)


def changed(before: dict[str, str], after: dict[str, str]) -> dict[str, tuple[str, str]]:
    """key → (split before, split after) of those that moved."""
    return {key: (old, after[key]) for key, old in before.items() if after[key] != old}


def test_digests_fall_into_tenths() -> None:
    """Eight tenths of all 63-bit digests train, the ninth validates, the tenth tests, to the last digest."""
    for tenth, expected in enumerate(["train"] * 8 + ["val", "test"]):
        first, last = -(-(tenth << 63) // 10), -(-((tenth + 1) << 63) // 10) - 1
        assert split_of_digest(first) == split_of_digest(last) == expected


@pytest.mark.parametrize("num_photographs", range(60))
def test_no_split_that_a_class_can_fill_is_empty(num_photographs: int) -> None:
    """1 → train; 2 → train, val; 3 and more → all three, whatever the digests say."""
    for seed in range(20):
        chosen = split(keys_drawn(num_photographs, seed=seed), seed=seed)
        assert len(chosen) == num_photographs
        assert set(chosen.values()) == set(SPLITS[:num_photographs])
        assert num_photographs != 3 or len(set(chosen.values())) == 3


def test_shares_are_80_10_10() -> None:
    """Over 20,000 photographs of one class, and over classes of 30, each share is within a percentage point."""
    for class_size in (30, 20_000):
        pairs = [(key, str(index // class_size)) for index, key in enumerate(keys_drawn(20_000, seed=class_size))]
        counts = Counter(split_by_class(pairs, seed=0).values())
        shares = [counts[name] / len(pairs) for name in SPLITS]
        assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


def test_split_follows_the_photograph_and_not_its_name() -> None:
    """Who goes where depends on keys, classes and seed; the order in which they come does not matter."""
    pairs = [(sample_key_of(bytes([number])), f"class {number % 3}") for number in range(100)]
    chosen = split_by_class(pairs, seed=3)
    assert split_by_class(reversed(pairs), seed=3) == chosen
    assert split_by_class(pairs, seed=4) != chosen


@pytest.mark.parametrize("seed", range(12))
def test_growth_moves_only_what_stood_in_for_another(seed: int) -> None:
    """A class that grows from 1 to 200: who belongs in a split by its own digest is moved only to fill an empty one.

    From three photographs on, of which one belongs in train, none ever leaves train: no photograph that was trained on is
    measured on. Once each split has one that belongs there, nothing moves at all.
    """
    keys = keys_drawn(200, seed=seed)
    own = {key: split_of_digest_of(key, seed) for key in keys}
    before: dict[str, str] = {}
    for size in range(1, len(keys) + 1):
        after, settled = split(keys[:size], seed=seed), {own[key] for key in keys[: size - 1]}
        moved = changed(before, after)
        assert not moved or settled != set(SPLITS)
        if size > 3 and "train" in settled:
            assert all(old != "train" for old, _ in moved.values())
        assert sum(after[key] != own[key] for key in keys[:size]) <= 2
        before = after
    assert {own[key] for key in keys} == set(SPLITS)
    assert before == own


def split_of_digest_of(key: str, seed: int) -> str:
    """Where a photograph goes among so many others that none need stand in."""
    crowd = [other for other in keys_drawn(200, seed=-1) if other != key]
    return split([*crowd, key], seed=seed)[key]


@pytest.mark.parametrize("seed", range(12))
def test_kept_splits_never_change(seed: int) -> None:
    """With the earlier splits kept, growth by any steps and under any seed moves nothing, and fills what is empty."""
    generator = random.Random(seed)
    keys, kept, size = keys_drawn(200, seed=seed), dict[str, str](), 0
    while size < len(keys):
        size += generator.choice([1, 1, 1, 2, 3, 10])
        after = split(keys[:size], seed=generator.randrange(100), kept=kept)
        assert not changed(kept, after)
        assert set(after.values()) == set(SPLITS[: len(after)])
        kept = after


def test_a_kept_split_holds_where_it_empties_train() -> None:
    """Kept photographs do not move, whatever is left of their class; a new one fills train first."""
    one, two, three, four = keys_drawn(4, seed=0)
    assert split([one, two], kept={one: "val", two: "test"}) == {one: "val", two: "test"}
    for seed in range(20):
        assert split([one, two, three], seed=seed, kept={one: "val", two: "test"})[three] == "train"
        assert set(split([one, three, four], seed=seed, kept={one: "test"}).values()) == set(SPLITS)


def test_a_grown_folder_keeps_the_splits_of_its_dataset(tmp_path: Path) -> None:
    """Build, add photographs, build again with another seed: every photograph of the first stands where it stood."""
    source = tmp_path / "source"
    first = fill(source, {"birch": 1, "elm": 2, "oak": 3, "pine": 30})
    build(source, tmp_path / "one", seed=1)
    earlier = read_splits(tmp_path / "one")
    assert len(earlier) == 36
    (source / "pine" / f"{first - 1}.jpg").unlink()
    fill(source, {"birch": 3, "elm": 5, "oak": 40, "pine": 2, "yew": 4}, first=first)
    account = build(source, tmp_path / "two", seed=2, keep_splits_of=tmp_path / "one")
    later = read_splits(tmp_path / "two")
    gone = sample_key_of(draw(first - 1))
    assert not changed({key: name for key, name in earlier.items() if key != gone}, later)
    assert len(later) == 89
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["kept_splits"] == {"num_kept": 35, "num_gone": 1}
    assert "35 photographs keep the split" in (tmp_path / "two" / "report.md").read_text()
    assert all(manifest.class_counts.keys() == set("01234") for manifest in account.manifests)


def test_a_dataset_is_replaced_by_its_growth(tmp_path: Path) -> None:
    """The dataset whose splits are kept may be the one that is replaced."""
    fill(tmp_path / "source", {"oak": 5})
    build(tmp_path / "source", tmp_path / "set")
    earlier = read_splits(tmp_path / "set")
    fill(tmp_path / "source", {"oak": 5}, first=5)
    build(tmp_path / "source", tmp_path / "set", seed=9, replace=True, keep_splits_of=tmp_path / "set")
    assert not changed(earlier, read_splits(tmp_path / "set"))
    assert len(read_splits(tmp_path / "set")) == 10


@pytest.mark.parametrize("fault", ["absent", "given splits", "cut shard", "two splits"])
def test_splits_that_cannot_be_kept_are_an_error(tmp_path: Path, fault: str) -> None:
    """Nothing is kept by half: the build stops, says why, and leaves nothing behind."""
    earlier, source = tmp_path / "earlier", tmp_path / "source"
    fill(source, {"oak": 5})
    build(source, earlier)
    expected = {
        "absent": "no dataset here",
        "given splits": "decides them itself",
        "two splits": "stands in train and in",
    }
    match fault:
        case "absent":
            earlier = tmp_path / "no such"
        case "given splits":
            source = tmp_path / "splits"
            put(source / "train" / "oak" / "1.jpg", draw(1))
        case "cut shard":
            path = earlier / "val" / "shard-000000.idx"
            path.write_bytes(path.read_bytes()[:-1])
        case "two splits":
            for path in (earlier / "train").iterdir():
                (earlier / "val" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=expected.get(fault, "index holds 19 bytes")):
        build(source, tmp_path / "set", keep_splits_of=earlier)
    assert not (tmp_path / "set").exists()
