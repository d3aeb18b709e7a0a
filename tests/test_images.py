"""Bytes to pixels."""

from __future__ import annotations

import io
from random import Random

import numpy as np
import pytest
from PIL import Image

from aplantida_dist.data.decode import MAX_PIXELS, DecodeError, decode
from aplantida_dist.data.images import EvaluationTransform, TrainTransform
from tests.pictures import draw

TRAIN = TrainTransform(32, (0.35, 1.0), (0.75, 1.3333), 0.5, 0.0, "bicubic")


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (64, 64), (1000, 10), (10, 1000), (1, 1), (3, 2)])
def test_crops_lie_inside_the_picture_and_cover_their_share(size: tuple[int, int]) -> None:
    """Every crop is legal, and unless the picture is too slim for any, so is its area."""
    width, height = size
    for seed in range(300):
        left, upper, right, lower = TRAIN._crop_box(width, height, Random(seed))
        assert 0 <= left < right <= width
        assert 0 <= upper < lower <= height
        if width >= 64 and height >= 64:
            assert 0.33 < (right - left) * (lower - upper) / (width * height) <= 1.0
            assert 0.72 < (right - left) / (lower - upper) < 1.4


def test_the_same_seed_gives_the_same_pixels_and_another_one_others() -> None:
    """What is drawn depends on the seed alone."""
    content = draw(1, width=80, height=60)
    first = TRAIN(content, 7)
    TRAIN(content, 8)
    assert np.array_equal(first, TRAIN(content, 7))
    assert len({TRAIN(content, seed).tobytes() for seed in range(20)}) == 20
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8


def test_half_of_the_pictures_are_flipped() -> None:
    """A left half that is dark comes out on the right about every second time."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, 20:] = 255
    content = encode(Image.fromarray(pixels), "PNG")
    whole = TrainTransform(32, (1.0, 1.0), (1.0, 1.0), 0.5, 0.0, "bilinear")
    flipped = sum(bool(whole(content, seed)[16, 2, 0] > 128) for seed in range(400))
    assert 150 < flipped < 250


def test_evaluation_takes_the_central_square() -> None:
    """The crop is that of PIL's own crop and resize where it falls on whole pixels."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
    content = encode(image, "PNG")
    found = EvaluationTransform(30, 1.0, "bicubic")(content, 0)
    expected = np.asarray(image.resize((30, 30), Image.Resampling.BICUBIC, box=(20, 0, 80, 60)))
    assert np.array_equal(found, expected)
    half = EvaluationTransform(30, 0.5, "bilinear")(content, 0)
    assert np.array_equal(half, np.asarray(image.resize((30, 30), Image.Resampling.BILINEAR, box=(35, 15, 65, 45))))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    """Grey, palette, alpha, print and 16-bit pictures are decoded to three channels."""
    image = Image.new("RGB", (20, 10), (200, 40, 90))
    image = Image.new("I;16", (20, 10), 700) if mode == "I;16" else image.convert(mode)
    image_format = "JPEG" if mode == "CMYK" else "PNG"
    decoded = decode(encode(image, image_format))
    assert decoded.mode == "RGB"
    assert decoded.size == (20, 10)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation: int) -> None:
    """The EXIF orientation is applied, so that training sees what a person sees."""
    image = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encode(image, "JPEG", exif=exif))
    assert decoded.size == ((40, 20) if orientation <= 4 else (20, 40))


def test_what_is_not_a_whole_picture_is_refused() -> None:
    """Cut, empty, text, and a header that claims more pixels than memory: an error that says which."""
    whole = draw(3, width=100, height=100)
    for content in (b"", b"<html>not found</html>", whole[: len(whole) // 2], whole[:30]):
        with pytest.raises(DecodeError, match="does not decode"):
            decode(content)
    bomb = bytearray(encode(Image.new("RGB", (8, 8)), "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    with pytest.raises(DecodeError, match=r"60000 × 60000 pixels, more than|does not decode"):
        decode(bytes(bomb))
    assert MAX_PIXELS < 60_000**2
