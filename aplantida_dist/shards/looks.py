"""The look of a picture: 64 bits that survive another encoding or size. The one file that knows imagehash."""

from __future__ import annotations

import imagehash
import numpy as np
from PIL import Image

LOOK_BITS = 64


def look_of(image: Image.Image) -> int:
    """The perceptual hash of a picture (imagehash's pHash: signs of its lowest 8 × 8 cosine frequencies), as an integer."""
    return int.from_bytes(np.packbits(imagehash.phash(image).hash.flatten()).tobytes(), "big")
