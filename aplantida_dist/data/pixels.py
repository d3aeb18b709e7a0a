"""The pixels of a picture as an array: of a plain JPEG by simplejpeg, of anything else by Pillow.

They are those of `decode`, bit for bit, by whichever of the two: libjpeg-turbo is beneath both. simplejpeg takes two thirds of
Pillow's time, and hears of damage what Pillow drops.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from aplantida_dist.data.decode import MID_GREY, open_picture, orientation, to_rgb

Pixels = NDArray[np.uint8]


def decode_pixels(content: bytes) -> Pixels:
    """Decode a whole picture: uint8 [height, width, 3], maybe read-only. What it holds, and what it raises, see `decode`."""
    image = open_picture(content)
    if _is_plain_jpeg(image):
        try:
            return _decode_plain_jpeg(content, image)
        except ValueError:
            pass  # Pillow is the judge of anything odd.
    return np.asarray(to_rgb(image))


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Whether an opened picture is a JPEG, baseline, in colour, and not turned by its EXIF orientation."""
    is_baseline = image.format == "JPEG" and "progressive" not in image.info
    return is_baseline and image.mode == "RGB" and orientation(image) == 1


def _decode_plain_jpeg(content: bytes, image: Image.Image) -> Pixels:
    """Raises ValueError for all that libjpeg-turbo warns of, which Pillow drops, and where the last row may stand for missing ones."""
    pixels: Pixels = simplejpeg.decode_jpeg(content)
    if pixels.shape != (image.height, image.width, 3):
        raise ValueError(f"two sizes: {image.size}, and {pixels.shape[1::-1]}")
    if MID_GREY[0] <= pixels[-1].min() and pixels[-1].max() <= MID_GREY[1]:
        raise ValueError("the last row is mid-grey")
    return pixels
