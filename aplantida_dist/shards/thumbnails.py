"""Thumbnails: what a file shows, small enough for a page: its picture, or else the words that it opens with."""

from __future__ import annotations

import codecs
import io
import warnings
from dataclasses import dataclass

from PIL import Image

from aplantida_dist.data.decode import MAX_PIXELS, to_rgb
from aplantida_dist.data.index import MAX_PICTURE_BYTES
from aplantida_dist.shards.place import Place

THUMBNAIL_SIDE = 128
MAX_THUMBNAIL_BYTES = 4_000
QUALITIES = (80, 65, 50, 35, 20, 5)
"""The first at which a thumbnail is small enough; photographs mostly are at 65 or above."""
SHOWN_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats whose decoders are safe to run on anything; Pillow starts Ghostscript for EPS."""
OPENING_BYTES = 1024
OPENING_CHARACTERS = 160


@dataclass(frozen=True)
class Thumbnail:
    """A small JPEG of a picture, and the sides of the whole picture, upright."""

    jpeg: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Opening:
    """The first words of a file that is text and no picture, such as the page that a server sent in its place."""

    text: str


Preview = Thumbnail | Opening


def preview_of(place: Place) -> Preview | None:
    """What the bytes at a place show; None where that is nothing. Never raises for what the bytes are, or are no more."""
    try:
        num_bytes = place.size()  # None for a pipe, from which a read would wait for ever
        if not num_bytes or num_bytes > MAX_PICTURE_BYTES:
            return None
        content = place.read()
    except OSError:
        return None
    return thumbnail_of(content) or opening_of(content)


def thumbnail_of(content: bytes) -> Thumbnail | None:
    """The picture, at most 128 pixels a side and about 4 kB; None where it does not decode whole, or is too large to try."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow's words on odd metadata and large pictures: the audit has dealt with those.
        try:
            with Image.open(io.BytesIO(content), formats=SHOWN_FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    return None
                image = to_rgb(opened)
        except Exception:  # opening damaged bytes raises nearly every built-in exception.
            return None
        width, height = image.size
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    image.info.clear()  # Pillow would copy a comment of up to 64 kB
    return Thumbnail(_small_jpeg(image), width, height)


def _small_jpeg(image: Image.Image) -> bytes:
    content = b""
    for quality in QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        content = buffer.getvalue()
        if len(content) <= MAX_THUMBNAIL_BYTES:
            break
    return content


def opening_of(content: bytes) -> Opening | None:
    """The first words of UTF-8 text; None where the bytes are no text or blank."""
    try:
        # The incremental decoder leaves a character that the cut goes through for later.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content[:OPENING_BYTES])
    except UnicodeDecodeError:
        return None
    words = " ".join(text.split())
    return Opening(words[:OPENING_CHARACTERS]) if words and words.isprintable() else None
