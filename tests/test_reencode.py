"""Re-encoding: long pictures become smaller, short ones keep every byte, and every sample keeps its key."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import build, digests_of, draw, fill, put
from PIL import Image, ImageOps

from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.manifest import MANIFEST_FILE, Reencoding, load_manifest
from aplantida_dist.shards.audit import sample_key_of
from aplantida_dist.shards.builder import BuildOptions, build_dataset
from aplantida_dist.shards.earlier import read_splits
from aplantida_dist.shards.folder import read_folder
from aplantida_dist.shards.licence import ANY_LICENCE
from aplantida_dist.shards.reencode import Encoded, reencode
from aplantida_dist.shards.verify import verify_dataset
from aplantida_dist.shards.writer import ShardLimits

ROOT = Path(__file__).parents[1]
SMALL = Reencoding(max_side=64, quality=90)


def smooth(width: int, height: int) -> Image.Image:
    """A picture without noise, so that its small version can be compared: red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def encode(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def small(source: Path, dataset_dir: Path, *, reencoding: Reencoding | None = SMALL, num_workers: int = 0) -> None:
    options = BuildOptions(
        seed=0,
        limits=ShardLimits(num_samples=10),
        num_workers=num_workers,
        replace=False,
        licence=ANY_LICENCE,
        near_distance=2,
        reencoding=reencoding,
    )
    build_dataset(read_folder(source), dataset_dir, options=options)


def images_of(dataset_dir: Path) -> dict[str, bytes]:
    """Member name → bytes of every image of a dataset."""
    images = {}
    for path in sorted(dataset_dir.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.name.endswith((".cls", ".json")):
                    images[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return images


@pytest.mark.parametrize("width", [1, 7, 63, 64, 65, 128, 1000])
@pytest.mark.parametrize("height", [1, 64, 65, 333])
def test_only_longer_pictures_change_and_keep_their_proportions(width: int, height: int) -> None:
    """The longer side is then exactly the limit, the shorter as near to proportion as pixels allow; all else keeps its bytes."""
    original = Encoded(encode(smooth(width, height), "PNG"), "png")
    encoded = reencode(original, reencoding=SMALL)
    if max(width, height) <= 64:
        assert encoded is original
        return
    assert encoded.suffix == "jpg"
    with Image.open(io.BytesIO(encoded.image)) as image:
        assert (image.format, image.mode, max(image.size)) == ("JPEG", "RGB", 64)
        longer = max(width, height)
        for side, before in zip(image.size, (width, height), strict=True):
            assert abs(side - before * 64 / longer) <= 0.5 or side == 1


def test_the_small_picture_is_the_large_one() -> None:
    """Antialiased and upright: nowhere far from the exact averages of the original."""
    image = smooth(640, 320)
    encoded = reencode(Encoded(encode(image, quality=95), "jpg"), reencoding=SMALL)
    found = np.asarray(Image.open(io.BytesIO(encoded.image)), dtype=float)
    exact = np.asarray(image, dtype=float).reshape(32, 10, 64, 10, 3).mean(axis=(1, 3))
    assert np.abs(found - exact).max() < 12
    # A pattern finer than the new pixels becomes grey: taking every tenth pixel would make it black or white.
    stripes = np.zeros((320, 640, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    encoded = reencode(Encoded(encode(Image.fromarray(stripes), "PNG"), "png"), reencoding=SMALL)
    found = np.asarray(Image.open(io.BytesIO(encoded.image)), dtype=float)
    assert np.abs(found[4:-4, 4:-4] - 127.5).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_everything_but_pixels_goes(orientation: int) -> None:
    """A turned photograph is stored upright, so that nobody turns it twice; EXIF, profile and comment are gone."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    original = encode(smooth(200, 100), exif=exif, comment=b"secret", icc_profile=b"profile")
    encoded = reencode(Encoded(original, "jpg"), reencoding=SMALL)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(original))).resize(
        (64, 32) if orientation < 5 else (32, 64)
    )
    with Image.open(io.BytesIO(encoded.image)) as image:
        assert not image.getexif()
        assert not {"exif", "comment", "icc_profile"} & image.info.keys()
        assert np.abs(np.asarray(image, dtype=float) - np.asarray(upright, dtype=float)).max() < 24


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_kind_of_pixel_becomes_rgb(mode: str) -> None:
    """What training would have decoded is what is stored."""
    image_format = "JPEG" if mode == "CMYK" else "PNG"
    original = encode(smooth(100, 50).convert(mode), image_format)
    with Image.open(io.BytesIO(reencode(Encoded(original, "x"), reencoding=SMALL).image)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 32))


def test_a_reduced_dataset_agrees_with_the_full_one(tmp_path: Path) -> None:
    """Same keys in the same splits and order: lineage and leak checks cannot tell them apart; the bytes are fewer and sound."""
    fill(tmp_path / "source", {"birch": 6, "oak": 6})
    originals = {}
    for number in range(100, 112):
        content = draw(number, width=90 + number, height=80, image_format="PNG" if number % 3 else "JPEG")
        put(tmp_path / "source" / ("birch" if number % 2 else "oak") / f"{number}.jpg", content)
        originals[sample_key_of(content)] = content
    build(tmp_path / "source", tmp_path / "full", limits=ShardLimits(num_samples=10))
    small(tmp_path / "source", tmp_path / "small")
    assert read_splits(tmp_path / "small") == read_splits(tmp_path / "full")
    for split in ("train", "val", "test"):
        full, reduced = (load_manifest(tmp_path / name / split / MANIFEST_FILE) for name in ("full", "small"))
        assert reduced.identity_digest == full.identity_digest
        assert (full.reencoding, reduced.reencoding) == (None, SMALL)
    before, after = images_of(tmp_path / "full"), images_of(tmp_path / "small")
    assert [name.split(".")[0] for name in before] == [name.split(".")[0] for name in after]
    for (name, original), (reduced_name, image) in zip(before.items(), after.items(), strict=True):
        if name.split(".")[0] in originals:
            assert reduced_name.endswith(".jpg")
            assert image != original
        else:
            assert (reduced_name, image) == (name, original)
    assert verify_dataset(tmp_path / "small").damages == ()
    open_dataset(tmp_path / "small").open_split("train")


def test_the_bytes_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    """Every file of the dataset is the same with no worker and with three."""
    for number in range(40):
        put(tmp_path / "source" / f"class {number % 2}" / f"{number}.jpg", draw(number, width=60 + number, height=50))
    small(tmp_path / "source", tmp_path / "none", num_workers=0)
    small(tmp_path / "source", tmp_path / "three", num_workers=3)
    assert digests_of(tmp_path / "none") == digests_of(tmp_path / "three")


def test_verification_finds_a_picture_that_was_not_made_smaller(tmp_path: Path) -> None:
    """A manifest that promises 64 pixels beside a picture of 90 is a lie, and is told."""
    for number in range(4):
        put(tmp_path / "source" / "oak" / f"{number}.jpg", draw(number, width=90))
    small(tmp_path / "source", tmp_path / "set", reencoding=None)
    path = tmp_path / "set" / "train" / MANIFEST_FILE
    content = json.loads(path.read_text())
    assert "reencoding" not in content
    path.write_text(json.dumps({**content, "reencoding": {"max_side": 64, "quality": 90}}))
    (damage,) = verify_dataset(tmp_path / "set").damages
    assert "a side is longer than the 64 pixels of the re-encoding (" in str(damage)


def run_build(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "shards" / "build.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_makes_pictures_smaller(tmp_path: Path) -> None:
    """--max-side and --quality reach the manifest and the report; a quality alone or out of range is one line."""
    for number in range(4):
        put(tmp_path / "source" / "oak" / f"{number}.jpg", draw(number, width=90))
    arguments = ("--from-folder", tmp_path / "source", "--workers", "0", "--out", tmp_path / "set")
    for options, says in (
        (("--quality", "90"), "belongs to --max-side"),
        (("--max-side", "64", "--quality", "96"), "give 1 to 95"),
        (("--max-side", "0"), "expected a positive whole number"),
    ):
        failed = run_build(*arguments, *options)
        assert failed.returncode == 2
        assert failed.stderr.count("\n") == 1
        assert says in failed.stderr
    done = run_build(*arguments, "--max-side", "64", "--quality", "50")
    assert done.returncode == 0, done.stderr
    assert "longer than 64 pixels became JPEGs of that side and quality 50" in done.stdout
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert report["reencoding"] == {"max_side": 64, "quality": 50}
