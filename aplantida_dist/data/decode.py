"""Bytes to a picture: what is decoded, and to which pixels. The audit of a build goes by this file, training by `pixels`, which asks it."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

Flaw = Literal["not_a_picture", "other_format", "animated", "too_large", "undecodable"]

FORMATS = ("JPEG", "PNG", "WEBP")
"""What is decoded. A JPEG with further pictures behind the first (depth, the other eye) is an MPO; the first is the photograph."""
MAX_PIXELS = 100_000_000
"""Pictures that claim more are refused before their pixels are allocated (a photograph has 10⁷ to 10⁸)."""

MID_GREY = (127, 128)
"""What decoders put in the place of missing rows: 128, beside which 127 stands in CMYK, which comes inverted."""

_MISREAD_KEYS = ("L;2", "L;4", "RGB;16B")
"""Kinds of PNG pixels for which Pillow compares the transparent colour with the wrong values."""
_TURN_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(Exception):
    """These bytes are not a picture that can be decoded whole. The stream adds which sample it was."""

    def __init__(self, flaw: Flaw, detail: str) -> None:
        super().__init__(f"does not decode: {detail}")
        self.flaw: Flaw = flaw
        self.detail = detail


def decode(content: bytes) -> Image.Image:
    """Decode a whole picture to RGB, as a person sees it: upright by its EXIF orientation, what is transparent on white.

    Of 16 bits the upper 8 stay. CMYK is converted without a colour profile, and profiles are not applied. Raises DecodeError.
    """
    return to_rgb(open_picture(content))


def open_picture(content: bytes) -> Image.Image:
    """Read the header of a still JPEG, PNG or WebP of at most `MAX_PIXELS`, and none of its pixels. Raises DecodeError."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise _what_else(content) from None
    except Image.DecompressionBombError as error:
        raise DecodeError("too_large", _one_line(error)) from error
    except Exception as error:  # Pillow's readers raise nearly every built-in exception on damaged bytes.
        raise DecodeError("undecodable", _one_line(error)) from error
    if image.width * image.height > MAX_PIXELS:
        raise DecodeError("too_large", f"{image.width} × {image.height} pixels, more than {MAX_PIXELS:,}")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise DecodeError("animated", "more than one frame; convert the one that shows the subject")
    if "transparency" in image.info and any(part.args in _MISREAD_KEYS for part in image.tile):
        raise DecodeError("undecodable", "one transparent colour in other than 8 bits; convert it to 8 bits")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode the pixels of an opened picture; see `decode`. Raises DecodeError where they do not reach to its end."""
    try:
        image.load()
        if _ends_in_grey(image):
            raise DecodeError("undecodable", "ends in the even grey that decoders put in the place of missing rows")
        turn = _TURN_OF_ORIENTATION.get(orientation(image))
        image = _without_alpha(image)
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError("undecodable", _one_line(error)) from error
    return image if turn is None else image.transpose(turn)


def _what_else(content: bytes) -> DecodeError:
    """Name bytes that are no JPEG, PNG or WebP."""
    if not content:
        return DecodeError("not_a_picture", "empty file")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return DecodeError("other_format", f"{image.format}; convert it to JPEG, PNG or WebP")
    except UnidentifiedImageError:
        return DecodeError("not_a_picture", f"{len(content)} bytes that do not begin as any picture does")
    except Exception as error:
        return DecodeError("undecodable", _one_line(error))


def _ends_in_grey(image: Image.Image) -> bool:
    """Whether the last row is all mid-grey and the first is not.

    So libjpeg fills what a cut JPEG lacks where its end mark is there again, with a warning that Pillow drops; and a program
    that stores such a picture anew makes a sound file of it.
    """
    if image.mode not in ("L", "RGB", "CMYK"):
        return False
    width, height = image.size
    return _is_grey(image.crop((0, height - 1, width, height))) and not _is_grey(image.crop((0, 0, width, 1)))


def _is_grey(image: Image.Image) -> bool:
    return set(MID_GREY).issuperset(np.ravel(image.getextrema()).tolist())


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or the EXIF block is broken: viewers take such a picture as it is too."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's EXIF reader raises nearly every built-in exception; the pixels are whole by now.
        return 1


def _without_alpha(image: Image.Image) -> Image.Image:
    """RGB of any mode that JPEG, PNG and WebP have, laid on white where it is transparent."""
    if image.mode == "I;16":
        return _upper_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upper_bits(image: Image.Image) -> Image.Image:
    """RGB of a 16-bit grey PNG, whose values Pillow would cut at 255. 16-bit colour it reads this way by itself."""
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
