"""One rectangle of a picture as RGB pixels. Of a plain JPEG no more is decoded than that takes; Pillow decodes everything else.

The pixels are those of `decode`, bit for bit, by whatever way they come: libjpeg-turbo is beneath each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from aplantida_dist.data.decode import open_picture, orientation, to_rgb

try:
    from aplantida_dist.data._jpeg_region import decode_region as _decode_region
except ImportError:  # no compiler or no headers where the package was installed
    IS_COMPILED = False
else:
    IS_COMPILED = True

Pixels = NDArray[np.uint8]
Size = tuple[int, int]
Box = tuple[int, int, int, int]
"""Left, upper, right, lower; a pixel belongs to a box from left and upper on, up to right and lower, which are outside."""

JpegDecoder = Callable[[bytes, Size, Box], Pixels]
"""The content of a plain JPEG, its size and a box in; uint8 [height, width, 3] of the box out.

Raises ValueError where anything about the content is odd, which Pillow is then asked to judge.
"""


def decode_and_cut(content: bytes, size: Size, box: Box) -> Pixels:
    """By a wheel: decode the whole and cut. A `JpegDecoder`."""
    whole = _decode_whole(content, size)
    left, upper, right, lower = box
    # To copy costs less than it takes torch to resize what is not contiguous.
    return np.ascontiguousarray(whole[upper:lower, left:right])


def decode_the_box(content: bytes, size: Size, box: Box) -> Pixels:
    """By the compiled extension: what lies beside the box is entropy-decoded, and no more. A `JpegDecoder`."""
    left, upper, right, lower = box
    pixels = np.empty((lower - upper, right - left, 3), np.uint8)
    _decode_region(content, size, box, pixels)
    return pixels


FASTEST: JpegDecoder = decode_the_box if IS_COMPILED else decode_and_cut


@dataclass(frozen=True)
class Picture:
    """A picture whose header is read. `image` is upright and RGB; where it `is_plain`, its pixels are not decoded yet."""

    content: bytes
    image: Image.Image
    is_plain: bool

    @property
    def size(self) -> Size:
        """Width and height, upright."""
        return self.image.size

    def whole(self) -> Image.Image:
        """The whole picture, as `decode` gives it. Raises DecodeError."""
        if not self.is_plain:
            return self.image
        try:
            return Image.fromarray(_decode_whole(self.content, self.size))
        except ValueError:
            return to_rgb(self.image)

    def region(self, box: Box, *, by: JpegDecoder) -> Pixels:
        """This box of it: uint8 [height, width, 3], contiguous. Raises DecodeError, also for damage beside the box."""
        if not self.is_plain:
            return np.array(self.image.crop(box))
        try:
            return by(self.content, self.size, box)
        except ValueError:
            return np.array(to_rgb(self.image).crop(box))


def read_header(content: bytes) -> Picture:
    """Read the size of a picture, and decode it at once where it is no plain JPEG: baseline, in colour, not turned by EXIF.

    Raises DecodeError.
    """
    image = open_picture(content)
    is_plain = (
        image.format == "JPEG"
        and image.mode == "RGB"
        and "progressive" not in image.info
        and orientation(image) == 1
    )
    return Picture(content, image if is_plain else to_rgb(image), is_plain)


def _decode_whole(content: bytes, size: Size) -> Pixels:
    """All of a plain JPEG. Raises ValueError for what libjpeg-turbo warns of, and where Pillow is to judge how it ends."""
    pixels: Pixels = simplejpeg.decode_jpeg(content)
    if pixels.shape[1::-1] != size:
        raise ValueError(f"the picture is {pixels.shape[1]} × {pixels.shape[0]}")
    if 127 <= pixels[-1].min() and pixels[-1].max() <= 128:
        raise ValueError("ends in grey")
    return pixels
