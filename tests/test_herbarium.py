"""The herbarium: a picture depends on its own coordinates alone, and the collection is what was asked for."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aplantida_dist.herbarium import MAX_SPECIES, draw_herbarium, draw_leaf, encode_jpeg, make_species
from aplantida_dist.herbarium.collection import HeldOut, HerbariumError, count_pictures
from aplantida_dist.herbarium.names import latin_name
from aplantida_dist.herbarium.records import make_record


def _draw(out_dir: Path, **changes: Any) -> dict[str, bytes]:
    """Draw a small herbarium and return its files by relative path."""
    asked: dict[str, Any] = {"num_species": 3, "num_pictures": 40, "width": 32, "height": 32, "seed": 0, "workers": 1}
    draw_herbarium(out_dir, **(asked | changes))
    return {str(path.relative_to(out_dir)): path.read_bytes() for path in out_dir.rglob("*") if path.is_file()}


def test_any_number_of_workers_draws_the_same_bytes(tmp_path: Path) -> None:
    """Two processes write what one writes, metadata included."""
    assert _draw(tmp_path / "one", workers=1) == _draw(tmp_path / "two", workers=2)


def test_a_picture_does_not_depend_on_what_else_is_drawn(tmp_path: Path) -> None:
    """Every picture of a small herbarium stands, byte for byte, in one with more species and more pictures."""
    small = _draw(tmp_path / "small")
    large = _draw(tmp_path / "large", num_species=7, num_pictures=150)
    pictures = [name for name in small if name.endswith(".jpg")]
    assert len(pictures) == 40
    assert all(small[name] == large[name] for name in pictures)


def test_another_seed_draws_another_herbarium(tmp_path: Path) -> None:
    """The seed reaches names and pixels."""
    one, other = _draw(tmp_path / "one"), _draw(tmp_path / "other", seed=1)
    assert not set(one) - {"metadata.jsonl"} & set(other)
    assert not set(one.values()) & set(other.values())


def test_every_picture_of_a_species_is_another(tmp_path: Path) -> None:
    """No two files hold the same bytes."""
    files = _draw(tmp_path / "herbarium", num_pictures=60)
    assert len(set(files.values())) == len(files) == 61


def test_metadata_describes_every_picture_once(tmp_path: Path) -> None:
    """One line a file, in the order of the species, with every field filled in; the files are pictures of the size asked for."""
    files = _draw(tmp_path / "herbarium", width=48, height=36)
    records = [json.loads(line) for line in files.pop("metadata.jsonl").splitlines()]
    assert sorted(record["image_path"] for record in records) == sorted(files)
    for record in records:
        assert all(isinstance(value, str) and value for value in record.values())
        assert record["image_path"].split("/")[0] == record["latin_name"].replace(" ", "_")
        assert record["image_source"] == "herbarium"
    for content in files.values():
        image = Image.open(io.BytesIO(content))
        assert (image.format, image.size, image.mode) == ("JPEG", (48, 36), "RGB")


def test_held_out_pictures_are_further_ones_and_as_many_of_every_species(tmp_path: Path) -> None:
    """train/ holds what a herbarium without them holds; val/ and test/ the pictures with the numbers that follow."""
    plain = _draw(tmp_path / "plain", even_share=0.0)
    files = _draw(tmp_path / "held_out", even_share=0.0, held_out=HeldOut(val=2, test=3))
    more = _draw(tmp_path / "more", num_pictures=150, even_share=0.0)
    of_train = {name.removeprefix("train/"): content for name, content in files.items() if name.startswith("train/")}
    assert of_train == {name: content for name, content in plain.items() if name.endswith(".jpg")}
    counts = Counter(name.split("/")[0] for name in of_train)
    for species, count in counts.items():
        for split, numbers in (("val", range(count, count + 2)), ("test", range(count + 2, count + 5))):
            expected = {f"{split}/{species}/{number:04d}.jpg" for number in numbers}
            assert {name for name in files if name.startswith(f"{split}/{species}/")} == expected
            for name in expected & {f"{split}/{other}" for other in more}:
                assert files[name] == more[name.removeprefix(f"{split}/")]
    records = [json.loads(line) for line in files["metadata.jsonl"].splitlines()]
    assert sorted(record["image_path"] for record in records) == sorted(files.keys() - {"metadata.jsonl"})


@pytest.mark.parametrize("even_share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    ("num_species", "num_pictures"), [(1, 1), (1, 9), (3, 3), (12, 1500), (100, 101), (7120, 7120), (7120, 15_000)]
)
def test_counts_are_exact_and_long_tailed(num_species: int, num_pictures: int, even_share: float) -> None:
    """They sum to what was asked, never rise, never fall below the even share, and follow Zipf's law above it."""
    counts = count_pictures(num_species=num_species, num_pictures=num_pictures, even_share=even_share)
    assert counts.shape == (num_species,)
    assert counts.sum() == num_pictures
    assert (np.diff(counts) <= 0).all()
    least = max(int(even_share * num_pictures) // num_species, 1)
    assert counts.min() >= least
    zipf = 1 / np.arange(1, num_species + 1)
    expected = least + (num_pictures - least * num_species) * zipf / zipf.sum()
    assert np.abs(counts - expected).max() <= 1.0


def test_no_two_species_share_a_name() -> None:
    """All names are distinct, and safe as names of folders on any system."""
    names = [latin_name(3, index) for index in range(MAX_SPECIES)]
    assert len(set(names)) == MAX_SPECIES >= 7120
    assert all(re.fullmatch(r"[A-Z][a-z]+ [a-z]+", name) for name in names)


def test_no_two_species_look_alike() -> None:
    """7,120 species have 7,120 shapes and colours."""
    species = [make_species(0, index) for index in range(7120)]
    assert len({(one.shape, one.colour, one.vein_colour) for one in species}) == 7120


def test_the_first_species_are_of_all_forms() -> None:
    """A demo of a dozen species shows a dozen forms of leaf: forms are dealt like cards, not drawn with repetition."""
    nouns = [make_species(5, index).common_name.split()[-1] for index in range(26)]
    assert len(set(nouns[:13])) == len(set(nouns[13:])) == 13


def test_licences_are_mixed() -> None:
    """The free licences and the unfree ones all occur, CC-BY-NC most often; look-alike names stand side by side."""
    species = make_species(0, 0)
    counts = Counter(make_record(species, index).license for index in range(1000))
    assert {"cc0", "cc-by", "cc-by-sa", "cc-by-nc"} <= set(counts)
    assert counts.most_common(1)[0][0] == "cc-by-nc"


def test_benchmark_pictures_are_as_heavy_as_photographs() -> None:
    """500 × 375 pictures take the 50 to 100 kB that photographs of that size take at quality 90."""
    sizes = [len(encode_jpeg(draw_leaf(make_species(0, index), index, width=500, height=375))) for index in range(16)]
    assert 50_000 <= np.mean(sizes) <= 100_000


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_species": 41}, "40 pictures are too few for 41 species"),
        ({"num_species": 0}, "0 species asked for"),
        ({"num_species": MAX_SPECIES + 1, "num_pictures": MAX_SPECIES + 1}, f"it can draw 1 to {MAX_SPECIES}"),
        ({"height": 8}, "8 pixels is too small"),
        ({"workers": 0}, "0 workers"),
        ({"even_share": 1.5}, "1.5 is no share"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    """The error says what was asked and what is possible, and nothing is left behind."""
    with pytest.raises(HerbariumError, match=text):
        _draw(tmp_path / "herbarium", **changes)
    assert not (tmp_path / "herbarium").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    """The command answers with one line and exit code 2, and touches nothing."""
    (tmp_path / "note.txt").write_text("mine")
    command = [sys.executable, "-m", "aplantida_dist.herbarium", "--out", str(tmp_path), "--pictures", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}: the folder is not empty; delete what it holds or choose another one\n"
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("arguments", [["--pictures", "5"], ["--pictures", "0"], ["--side", "big"], ["--sides", "64"]])
def test_bad_arguments_get_one_line(arguments: list[str], tmp_path: Path) -> None:
    """Exit code 2, one line on stderr that names what was asked, no traceback."""
    command = [sys.executable, "-m", "aplantida_dist.herbarium", "--out", str(tmp_path / "herbarium"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert arguments[1] in done.stderr


def test_the_command_draws_and_tells(tmp_path: Path) -> None:
    """`python -m aplantida_dist.herbarium` draws what was asked and reports progress on stderr alone."""
    command = [sys.executable, "-m", "aplantida_dist.herbarium", "--out", str(tmp_path), "--side", "32"]
    done = subprocess.run([*command, "--pictures", "20", "--species", "4"], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "20 of 20 pictures" in done.stderr
    assert len(list(tmp_path.glob("*/*.jpg"))) == 20
