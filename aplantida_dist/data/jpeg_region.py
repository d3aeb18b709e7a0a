"""A rectangle of a plain JPEG, by one of two ways with the same pixels: decode the whole and cut, or decode little more than it.

The first needs a wheel. The second is ours, in C over libjpeg-turbo, and is there where a compiler and its headers were when this
package was installed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from aplantida_dist.data.decode import MID_GREY

try:
    from aplantida_dist.data._jpeg_region import decode_region as _decode_region
except ImportError:
    IS_COMPILED = False
else:
    IS_COMPILED = True

Pixels = NDArray[np.uint8]
Size = tuple[int, int]
"""Width and height."""
Box = tuple[int, int, int, int]
"""Left, upper, right, lower; right and lower are outside."""

JpegDecoder = Callable[[bytes, Size, Box], Pixels]
"""The content of a plain JPEG, its size and a box within it in; uint8 [height, width, 3] of the box out, maybe not contiguous.

Raises ValueError for all that libjpeg-turbo warns of, anywhere in the picture, for another size than this, and where the last row may
stand for missing ones: Pillow is the judge of anything odd.
"""


def decode_and_cut(content: bytes, size: Size, box: Box) -> Pixels:
    """Decode the whole picture by simplejpeg. A `JpegDecoder`."""
    left, upper, right, lower = box
    pixels: Pixels = simplejpeg.decode_jpeg(content)
    if pixels.shape != (size[1], size[0], 3):
        raise ValueError(f"two sizes: {size}, and {pixels.shape[1::-1]}")
    if MID_GREY[0] <= pixels[-1].min() and pixels[-1].max() <= MID_GREY[1]:
        raise ValueError("the last row is mid-grey")
    return pixels[upper:lower, left:right]


def decode_the_box(content: bytes, size: Size, box: Box) -> Pixels:
    """Decode the box alone, and what is beside it as far as finding damage takes, by the compiled extension. A `JpegDecoder`."""
    left, upper, right, lower = box
    strip = np.empty((lower - upper, size[0], 3), np.uint8)
    _decode_region(content, size, box, strip)
    return strip[:, left:right]


FASTEST: JpegDecoder = decode_the_box if IS_COMPILED else decode_and_cut
HOW_FASTEST = "only the crop (compiled)" if IS_COMPILED else "whole (the extension was not built)"
"""Of training's JPEGs, for people."""
