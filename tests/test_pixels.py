"""Pixels by the fast way are Pillow's, and what is broken is found by either."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from random import Random

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFilter

from aplantida_dist.data.decode import MID_GREY, DecodeError, decode
from aplantida_dist.data.images import EvaluationTransform, Interpolation, TrainTransform, resize
from aplantida_dist.data.pixels import Pixels, decode_pixels

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def photograph(number: int, *, width: int = 160, height: int = 120) -> Image.Image:
    """A picture with edges, areas and texture, about as much of each as photographs have."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 0)
    noise = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return Image.blend(coarse, noise, 0.15).filter(ImageFilter.GaussianBlur(0.7))


def encode(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def is_plain(content: bytes) -> bool:
    """Whether the fast way takes it: then Pillow's pixels are never asked for."""
    before = Image.Image.load
    asked: list[str] = []

    def load(image: Image.Image) -> object:
        asked.append("pixels")
        return before(image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "load", load)
        decode_pixels(content)
    return not asked


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("size", [(160, 120), (161, 119), (16, 16), (17, 3), (1, 1), (8, 200)])
def test_plain_jpegs_have_pillows_pixels_bit_for_bit(subsampling: str, size: tuple[int, int]) -> None:
    """Any subsampling, any size, any quality, with restart marks and optimized tables, colours stored as RGB."""
    image = photograph(1, width=size[0], height=size[1])
    for options in ({"quality": 30}, {"quality": 97, "optimize": True}, {"restart_marker_blocks": 3}):
        content = encode(image, subsampling=subsampling, **options)
        assert np.array_equal(decode_pixels(content), np.asarray(decode(content)))
        assert np.array_equal(simplejpeg.decode_jpeg(content), np.asarray(decode(content)))
    kept = encode(image, keep_rgb=True)
    assert np.array_equal(decode_pixels(kept), np.asarray(decode(kept)))


ODD = {
    "png": encode(photograph(2), "PNG"),
    "transparent png": encode(photograph(2).convert("RGBA").resize((50, 40)), "PNG"),
    "webp": encode(photograph(2), "WEBP"),
    "cmyk": encode(photograph(2).convert("CMYK")),
    "progressive": encode(photograph(2), progressive=True),
    "greyscale": encode(photograph(2).convert("L")),
} | {f"orientation {number}": encode(photograph(2), exif=turned(number)) for number in range(2, 9)}


@pytest.mark.parametrize("kind", ODD)
def test_everything_else_is_pillows(kind: str) -> None:
    """The reference decodes what is no plain JPEG: the same pixels, upright, in three channels."""
    expected = np.asarray(decode(ODD[kind]))
    assert np.array_equal(decode_pixels(ODD[kind]), expected)
    assert expected.shape[2] == 3


def test_plain_means_what_the_fast_way_decodes() -> None:
    """JPEGs as cameras and builds write them take it, with an EXIF block too; nothing odd does."""
    assert is_plain(encode(photograph(3)))
    assert is_plain(encode(photograph(3), exif=turned(1)))
    assert not any(is_plain(content) for content in ODD.values())


def test_what_is_broken_is_told_as_before() -> None:
    """Cut anywhere, cut and closed, rotten, and stored anew with a grey end: the flaw and the text are the reference's."""
    whole = encode(photograph(4))
    broken = [whole[:length] for length in range(0, len(whole), len(whole) // 60)]
    broken += [content + b"\xff\xd9" for content in broken[1:]]
    grey = np.asarray(photograph(5)).copy()
    grey[60:] = MID_GREY[1]
    broken.append(encode(Image.fromarray(grey), quality=95))
    for seed in range(300):
        flipped = bytearray(whole)
        for _ in range(3):
            flipped[Random(seed).randrange(len(whole))] ^= 1 << seed % 8
        broken.append(bytes(flipped))
    told = [outcome(decode_pixels, content) for content in broken]
    assert told == [outcome(lambda content: np.asarray(decode(content)), content) for content in broken]
    assert 60 < sum(isinstance(one, str) for one in told) < len(told)


def outcome(by: object, content: bytes) -> str | bytes:
    try:
        return by(content).tobytes()  # type: ignore[operator, no-any-return]
    except DecodeError as error:
        return f"{error.flaw}: {error.detail}"


def test_evaluation_sees_pillows_pixels() -> None:
    """To the last bit: soft labels that were stored, and scores that were told, stay as they are."""
    for number, kind in enumerate(("JPEG", "PNG", "WEBP")):
        content = encode(photograph(number), kind)
        box = (160 - 108) / 2, (120 - 108) / 2, (160 + 108) / 2, (120 + 108) / 2
        for interpolation, resampling in RESAMPLING.items():
            found = EvaluationTransform(64, 0.9, interpolation)(content, 0)  # type: ignore[arg-type]
            assert np.array_equal(found, np.asarray(decode(content).resize((64, 64), resampling, box=box)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [32, 224, 384])
def test_training_sees_the_reference_within_50_db(interpolation: Interpolation, side: int) -> None:
    """The median over crops, made smaller and larger, is far above; the worst of them is above 50, too."""
    train = TrainTransform(side, (0.08, 1.0), (0.75, 1.3333), 0.5, 0.0, interpolation)
    found = []
    for seed in range(20):
        content = encode(photograph(seed, width=320, height=240))
        found.append(psnr(train(content, seed), reference(content, train, seed)))
    assert np.median(found) > 65
    assert min(found) > 50


def reference(content: bytes, train: TrainTransform, seed: int) -> Pixels:
    """By Pillow alone: decode, cut, resize, mirror, as torchvision's transforms do, with the draws of the seed."""
    random = Random(seed)
    image = decode(content)
    crop = image.crop(train._crop_box(image.width, image.height, random))
    square = crop.resize((train.image_size, train.image_size), RESAMPLING[train.interpolation])
    is_flipped = random.random() < train.horizontal_flip
    return np.asarray(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped else square)


def psnr(one: Pixels, other: Pixels) -> float:
    """Peak signal to noise in decibels; 150 where nothing differs."""
    mean_square = float(((one.astype(float) - other) ** 2).mean())
    return 150.0 if mean_square == 0 else 10 * float(np.log10(255**2 / mean_square))


def test_a_resize_to_the_same_size_is_the_crop() -> None:
    """And a flip mirrors it, exactly; the strides are those of a picture by rows, for the copy into the batch."""
    crop = np.asarray(photograph(1))[10:74, 20:84]
    assert np.array_equal(resize(crop, 64, interpolation="bicubic"), crop)
    flipped = resize(crop, 64, interpolation="bilinear", is_flipped=True)
    assert np.array_equal(flipped, crop[:, ::-1])
    assert flipped.flags.c_contiguous
    assert flipped.flags.writeable


@pytest.mark.slow
def test_every_kind_of_cpu_gives_the_same_pixels() -> None:
    """torch's resize counts in whole numbers: with and without the newer instructions it comes to the same."""
    code = (
        "import hashlib\n"
        "from aplantida_dist.data.images import TrainTransform\n"
        "from tests.test_pixels import encode, photograph\n"
        "digest = hashlib.sha256()\n"
        "for interpolation in ('bilinear', 'bicubic'):\n"
        "    for side in (48, 200):\n"
        "        train = TrainTransform(side, (0.1, 1.0), (0.7, 1.4), 0.5, 0.5, interpolation)\n"
        "        digest.update(b''.join(train(encode(photograph(i)), i).tobytes() for i in range(4)))\n"
        "print(digest.hexdigest())\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for capability in ("default", "avx2")
    }
    assert len(said) == 1
