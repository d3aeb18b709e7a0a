"""The look of a picture: what is left of it at 32 × 32, 64 bits of that which survive another encoding or size, or nothing at all. The one file that knows imagehash."""

from __future__ import annotations

from typing import cast

import imagehash
from PIL import Image

LOOK_BITS = 64
SMALL_SIDE = 32
BLANK_SPREAD = 24
"""Levels of 255. Of 3,409 photographs of clothing the most even one has 64; noise of 10 levels around one colour at 200 × 150 has 15."""

_REDUCED_SIDE = 64


def shrink(image: Image.Image) -> Image.Image:
    """An RGB picture at 32 × 32, grey: its green, which is most of what is seen as light and half the cost of all three."""
    return _shrunk(image.getchannel("G"))


def is_blank(image: Image.Image, small: Image.Image) -> bool:
    """Whether an RGB picture, given with its shrunk one, is nearly of one colour: at 32 × 32 no channel spreads over BLANK_SPREAD levels."""
    # Hardly a picture is so even in green, so that all its colours are seldom looked at.
    return _spread(small) < BLANK_SPREAD and all(_spread(_shrunk(band)) < BLANK_SPREAD for band in image.split())


def mean_colour(image: Image.Image) -> str:
    """The mean colour of an RGB picture as #rrggbb."""
    return "#" + image.resize((1, 1), Image.Resampling.BOX).tobytes().hex()


def look_of(small: Image.Image) -> int:
    """The perceptual hash of a shrunk picture (imagehash's pHash: signs of its lowest 8 × 8 cosine frequencies), as an integer."""
    return int(str(imagehash.phash(small)), 16)


def _spread(small: Image.Image) -> int:
    lowest, highest = cast("tuple[int, int]", small.getextrema())
    return highest - lowest


def _shrunk(channel: Image.Image) -> Image.Image:
    """One channel at 32 × 32: means of square boxes first, as antialiasing every pixel would cost four times as much."""
    factor = max(1, min(channel.size) // _REDUCED_SIDE)
    # In fractions of a box, so that what is seen does not shift with the boxes that the last row and column fill in part.
    whole = (0.0, 0.0, channel.width / factor, channel.height / factor)
    reduced = channel.reduce(factor)
    return reduced.resize((SMALL_SIDE, SMALL_SIDE), Image.Resampling.BILINEAR, box=whole)
