"""Re-encoding: a picture that is longer than asked for becomes a smaller JPEG, once, while the dataset is built."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image

from aplantida_dist.data.decode import DecodeError, decode
from aplantida_dist.data.manifest import Reencoding

DEFAULT_QUALITY = 90
SUBSAMPLING = "4:2:0"
"""Half the colour resolution, as most photographs come: 4:4:4 takes more bytes for what a crop resized again does not show."""
REDUCING_GAP = 3.0
"""Whole-pixel averaging down to three times the size before the filter; from 3 on Pillow's result is as good as without."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded picture and the suffix of its format."""

    image: bytes
    suffix: str


def reencode(original: Encoded, *, reencoding: Reencoding) -> Encoded:
    """A picture whose longer side exceeds `max_side` as a JPEG of that side; any other byte for byte as it is.

    It is decoded as training will decode it, upright and to RGB, and resized antialiased in its proportions. Pixels alone
    stay: EXIF, colour profile and comments go, which training does not read. The same Pillow gives the same bytes.
    Raises DecodeError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in the audit, which has let this picture pass
        longer = longer_side_of(original.image)
        if longer <= reencoding.max_side:
            return original
        image = decode(original.image)
    width, height = (max(1, round(side * reencoding.max_side / longer)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
    resized.info.clear()  # Pillow would write the comment of the original again
    buffer = io.BytesIO()
    resized.save(buffer, "JPEG", quality=reencoding.quality, subsampling=SUBSAMPLING, optimize=True)
    return Encoded(buffer.getvalue(), "jpg")


def longer_side_of(image: bytes) -> int:
    """The pixels of the longer side of an encoded picture, from its first bytes; a turn by EXIF does not change it.

    Raises DecodeError where these are not those of a picture.
    """
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return max(opened.size)
    except Exception as error:  # Pillow's readers raise nearly every built-in exception on damaged bytes.
        raise DecodeError("undecodable", f"does not open: {error}") from error
