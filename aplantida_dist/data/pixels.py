"""The pixels of a picture, or of a box of it: of a plain JPEG by libjpeg-turbo itself, of anything else by Pillow.

They are those of `decode`, bit for bit, by whatever way they come: libjpeg-turbo is beneath each. The direct ways take less of Pillow's
time, and hear of damage what Pillow drops.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from aplantida_dist.data.decode import open_picture, orientation, to_rgb
from aplantida_dist.data.jpeg_region import Box, JpegDecoder, Pixels, Size, decode_and_cut


@dataclass(frozen=True)
class Picture:
    """A picture whose size is known. A plain JPEG's pixels are not decoded yet; any other `image` is upright and RGB."""

    content: bytes
    image: Image.Image
    is_plain: bool

    @property
    def size(self) -> Size:
        return self.image.size

    def region(self, box: Box, *, by: JpegDecoder) -> Pixels:
        """This box of it: uint8 [height, width, 3], maybe not contiguous or read-only. Raises DecodeError, also for damage beside it."""
        if self.is_plain:
            try:
                return by(self.content, self.size, box)
            except ValueError:
                pass  # Pillow is the judge of anything odd.
        left, upper, right, lower = box
        # What is no plain JPEG went through to_rgb when it was read.
        image = to_rgb(self.image) if self.is_plain else self.image
        return np.asarray(image)[upper:lower, left:right]


def read_picture(content: bytes) -> Picture:
    """Read the header of a plain JPEG; decode anything else. What is decoded, and what it raises, see `decode`."""
    image = open_picture(content)
    is_plain = _is_plain_jpeg(image)
    return Picture(content, image if is_plain else to_rgb(image), is_plain)


def decode_pixels(content: bytes) -> Pixels:
    """Decode a whole picture: uint8 [height, width, 3], maybe read-only. What it holds, and what it raises, see `decode`."""
    picture = read_picture(content)
    return picture.region((0, 0, *picture.size), by=decode_and_cut)


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Whether an opened picture is a JPEG, baseline, in colour, and not turned by its EXIF orientation."""
    is_baseline = image.format == "JPEG" and "progressive" not in image.info
    return is_baseline and image.mode == "RGB" and orientation(image) == 1
