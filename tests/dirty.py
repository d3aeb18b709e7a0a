"""Pictures of every kind that the audit meets, made byte by byte where no library writes them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

WIDTH, HEIGHT = 96, 72
END_OF_JPEG = b"\xff\xd9"


def photograph(number: int = 0, *, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A picture with the smooth light and shade of a photograph, different for every number."""
    coarse = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def pixels_of(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    values: NDArray[np.uint16], *, bits: int, colour: int, before: bytes = b"", size: tuple[int, int] | None = None
) -> bytes:
    """A PNG of 8 or 16 bits from values [h, w] or [h, w, channels]; `before` are chunks ahead of the pixels, `size` what it claims."""
    rows = values.astype(">u2" if bits == 16 else np.uint8)
    width, height = size or (values.shape[1], values.shape[0])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + before + data + chunk(b"IEND", b"")


def ycck_jpeg(image: Image.Image) -> bytes:
    """An RGB picture as Adobe's programs write print files: YCCK of its negative. Pillow writes CMYK only, so the Adobe flag is changed."""
    luma, blue, red = (
        channel.point(lambda value: 255 - value) for channel in ImageOps.invert(image).convert("YCbCr").split()
    )
    content = encode(
        Image.merge("CMYK", (luma, blue, red, Image.new("L", image.size, 0))), "JPEG", quality=98, subsampling=0
    )
    flag = content.index(b"Adobe") + 11
    assert content[flag] == 0
    return content[:flag] + b"\x02" + content[flag + 1 :]


def claiming(content: bytes, *, width: int, height: int) -> bytes:
    """A JPEG whose header says another size."""
    frame = content.index(b"\xff\xc0") + 5
    return content[:frame] + struct.pack(">HH", height, width) + content[frame + 4 :]
