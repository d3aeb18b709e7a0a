"""Groups: pictures that look nearly the same are found, and never stand on two sides of a split."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from pictures import build, put
from PIL import Image
from test_build import run_build

from aplantida_dist.data.manifest import SPLITS
from aplantida_dist.shards.audit import audit_picture, sample_key_of
from aplantida_dist.shards.earlier import read_splits
from aplantida_dist.shards.groups import MAX_DISTANCE, number_groups


def photograph(number: int) -> Image.Image:
    """A picture with the smooth light and shade of a photograph, different for every number."""
    coarse = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((120, 160), Image.Resampling.BICUBIC)


def encoded(number: int, *, quality: int = 90, scale: float = 1.0) -> bytes:
    """The photograph of this number as JPEG, at this quality and size."""
    image, buffer = photograph(number), io.BytesIO()
    image.resize((round(120 * scale), round(160 * scale))).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


COPIES = {"again": {"quality": 60}, "small": {"scale": 0.5}, "middle": {"quality": 80, "scale": 0.75}}


def fill_with_copies(folder: Path, numbers: range) -> None:
    """Every photograph thrice: as it is and twice as a near copy."""
    for number in numbers:
        put(folder / f"{number}.jpg", encoded(number))
        put(folder / f"{number} again.jpg", encoded(number, quality=60))
        put(folder / f"{number} small.jpg", encoded(number, scale=0.5))


def look(content: bytes) -> int:
    picture = audit_picture(content, with_looks=True)
    return picture.look  # type: ignore[union-attr]


@pytest.mark.parametrize("copy", COPIES)
def test_looks_survive_another_encoding(copy: str) -> None:
    """Re-encoded and resized copies are within two bits of their original, other pictures far away."""
    for number in range(20):
        mine = look(encoded(number))
        assert (mine ^ look(encoded(number, **COPIES[copy]))).bit_count() <= 2  # type: ignore[arg-type]
        assert (mine ^ look(encoded(number + 100))).bit_count() > 8


@pytest.mark.parametrize("distance", range(MAX_DISTANCE + 1))
def test_the_index_finds_what_comparing_every_pair_finds(distance: int) -> None:
    """Bands miss no pair, wherever its bits differ; chains become one group; numbers follow no order of arrival."""
    generator = random.Random(distance)
    looks = [generator.getrandbits(64) for _ in range(150)]
    for _ in range(450):
        flips = generator.sample(range(64), generator.randint(0, 4))
        looks.append(generator.choice(looks) ^ sum(1 << flip for flip in flips))
    expected = list(range(len(looks)))
    for one in range(len(looks)):
        for other in range(one):
            if (looks[one] ^ looks[other]).bit_count() <= distance and expected[one] != expected[other]:
                old, new = expected[one], expected[other]
                expected = [new if number == old else number for number in expected]
    found = number_groups(np.array(looks, dtype=np.uint64), distance=distance).tolist()
    assert len(set(zip(expected, found, strict=True))) == len(set(expected)) == len(set(found))


def test_no_group_spans_two_splits(tmp_path: Path) -> None:
    """Near copies count as one photograph and go together, also where they stand under other classes; off leaves them apart."""
    fill_with_copies(tmp_path / "source" / "oak", range(25))
    fill_with_copies(tmp_path / "source" / "elm", range(25, 50))
    put(tmp_path / "source" / "elm" / "0 middle.jpg", encoded(0, quality=80, scale=0.75))
    build(tmp_path / "source", tmp_path / "set")
    build(tmp_path / "source", tmp_path / "apart", near_distance=None)
    num_apart = 0
    for number in range(50):
        keys = [sample_key_of(path.read_bytes()) for path in (tmp_path / "source").rglob(f"{number}[ .]*")]
        splits, apart = (({read_splits(tmp_path / name)[key] for key in keys}) for name in ("set", "apart"))
        assert len(keys) == (4 if number == 0 else 3)
        assert len(splits) == 1
        assert number != 0 or splits == {"train"}
        num_apart += len(apart) > 1
    assert num_apart > 5
    assert set(read_splits(tmp_path / "set").values()) == set(SPLITS)
    groups = json.loads((tmp_path / "set" / "report.json").read_text())["groups"]
    assert (groups["distance"], groups["num_groups"], groups["num_photographs"]) == (2, 50, 151)
    assert groups["disagreeing"] == [["elm/0 middle.jpg", "oak/0 again.jpg", "oak/0 small.jpg", "oak/0.jpg"]]
    assert "1 of these groups stand under several classes" in (tmp_path / "set" / "report.md").read_text()


def test_near_copies_of_given_splits_are_leaks(tmp_path: Path) -> None:
    """A photograph of test stays, its near copies in val and train are left out, and the report names which one stays."""
    source = tmp_path / "source"
    for number in range(10):
        put(source / "train" / "oak" / f"{number}.jpg", encoded(number))
    put(source / "val" / "oak" / "small.jpg", encoded(1, scale=0.5))
    put(source / "val" / "oak" / "own.jpg", encoded(20))
    put(source / "test" / "oak" / "again.jpg", encoded(1, quality=60))
    put(source / "train" / "oak" / "20.jpg", encoded(20, scale=0.75))
    account = build(source, tmp_path / "set")
    assert {(file.source, file.reason, file.detail) for file in account.left_out} == {
        ("train/oak/1.jpg", "leak", "looks nearly the same as test/oak/again.jpg"),
        ("val/oak/small.jpg", "leak", "looks nearly the same as test/oak/again.jpg"),
        ("train/oak/20.jpg", "leak", "looks nearly the same as val/oak/own.jpg"),
    }
    assert account.num_files == account.num_samples + len(account.left_out) == 14
    assert build(source, tmp_path / "off", near_distance=None).num_samples == 14


@pytest.mark.parametrize("seed", range(3))
def test_new_near_copies_follow_the_kept_split(tmp_path: Path, seed: int) -> None:
    """A near copy that arrives later goes where its photograph was kept; no photograph of the earlier dataset moves."""
    source = tmp_path / "source"
    for number in range(20):
        put(source / "oak" / f"{number}.jpg", encoded(number))
    build(source, tmp_path / "one", seed=seed)
    fill_with_copies(source / "oak", range(20))
    build(source, tmp_path / "two", seed=seed + 1, keep_splits_of=tmp_path / "one")
    earlier, later = read_splits(tmp_path / "one"), read_splits(tmp_path / "two")
    assert len(later) == 60
    for number in range(20):
        kept = earlier[sample_key_of(encoded(number))]
        copies = (encoded(number), encoded(number, quality=60), encoded(number, scale=0.5))
        assert {later[sample_key_of(copy)] for copy in copies} == {kept}


def test_a_group_kept_on_two_sides_is_left_out_on_one(tmp_path: Path) -> None:
    """Where an earlier build without groups drew near copies apart, those outside test, else val, are leaks now: none moves."""
    source = tmp_path / "source"
    fill_with_copies(source / "oak", range(20))
    build(source, tmp_path / "one", near_distance=None)
    account = build(source, tmp_path / "two", keep_splits_of=tmp_path / "one")
    earlier, later = read_splits(tmp_path / "one"), read_splits(tmp_path / "two")
    assert all(earlier[key] == split for key, split in later.items())
    assert account.left_out_by_reason["leak"] == len(earlier) - len(later) > 0
    for number in range(20):
        copies = (encoded(number), encoded(number, quality=60), encoded(number, scale=0.5))
        assert len({later[key] for key in map(sample_key_of, copies) if key in later}) == 1


@pytest.mark.parametrize("distance", ["-1", "4", "near", "2.0", "²"])
def test_a_distance_that_is_none_is_told(tmp_path: Path, distance: str) -> None:
    """One line, exit code 2, and the range."""
    done = run_build("--from-folder", tmp_path, "--out", tmp_path / "set", f"--near-duplicates={distance}")
    assert done.returncode == 2
    assert f"0 to {MAX_DISTANCE}, or off" in done.stderr
