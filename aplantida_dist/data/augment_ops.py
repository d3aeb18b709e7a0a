"""The ops of RandAugment and TrivialAugment: each alters an RGB picture by one number, and draws nothing.

The numbers that their levels stand for are timm's (`timm/data/auto_augment.py`, the `inc1` set) and torchvision's
(`TrivialAugmentWide`). Shears and turns are bilinear; shifts are by whole pixels, which costs a copy instead of a resampling (26 µs at 224, not 1,000).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageEnhance, ImageOps

FILL = (124, 116, 104)
"""What comes in at the edges: the mean of ImageNet, as timm fills."""


@dataclass(frozen=True)
class Op:
    """`act` alters a picture by a number that `number_of` makes of a level in [0, 1], or in [-1, 1] where the op is signed."""

    act: Callable[[Image.Image, float], Image.Image]
    number_of: Callable[[float], float] = float
    is_signed: bool = False


def rotate(picture: Image.Image, degrees: float) -> Image.Image:
    """Turn about the middle, counter-clockwise."""
    return picture.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=FILL)


def shear_x(picture: Image.Image, factor: float) -> Image.Image:
    """Move each row to the left by `factor` times its distance from the top."""
    return _affine(picture, (1, factor, 0, 0, 1, 0))


def shear_y(picture: Image.Image, factor: float) -> Image.Image:
    """Move each column up by `factor` times its distance from the left."""
    return _affine(picture, (1, 0, 0, factor, 1, 0))


def shift_x(picture: Image.Image, share: float) -> Image.Image:
    """Move to the left by a share of the width, rounded to a pixel."""
    return _affine(picture, (1, 0, round(share * picture.width), 0, 1, 0), Image.Resampling.NEAREST)


def shift_y(picture: Image.Image, share: float) -> Image.Image:
    """Move up by a share of the height, rounded to a pixel."""
    return _affine(picture, (1, 0, 0, 0, 1, round(share * picture.height)), Image.Resampling.NEAREST)


def brightness(picture: Image.Image, factor: float) -> Image.Image:
    """0 is black, 1 the picture."""
    return ImageEnhance.Brightness(picture).enhance(factor)


def contrast(picture: Image.Image, factor: float) -> Image.Image:
    """0 is the mean of its grey, 1 the picture."""
    return ImageEnhance.Contrast(picture).enhance(factor)


def color(picture: Image.Image, factor: float) -> Image.Image:
    """0 is grey, 1 the picture."""
    return ImageEnhance.Color(picture).enhance(factor)


def sharpness(picture: Image.Image, factor: float) -> Image.Image:
    """0 is smoothed, 1 the picture, 2 sharpened."""
    return ImageEnhance.Sharpness(picture).enhance(factor)


def solarize(picture: Image.Image, threshold: float) -> Image.Image:
    """Turn the values that are not below the threshold into their negative."""
    return ImageOps.solarize(picture, math.ceil(threshold))


def solarize_add(picture: Image.Image, amount: float) -> Image.Image:
    """Make the darker half of the values brighter."""
    table = [min(255, value + int(amount)) if value < 128 else value for value in range(256)]
    return picture.point(3 * table)


def posterize(picture: Image.Image, bits: float) -> Image.Image:
    """Keep the uppermost bits of each value; 8 is the picture."""
    return picture if bits >= 8 else ImageOps.posterize(picture, int(bits))


def _enhancements(number_of: Callable[[float], float]) -> tuple[Op, ...]:
    return tuple(Op(act, number_of, is_signed=True) for act in (color, contrast, brightness, sharpness))


def _movements(*, shear: float, shift: float, degrees: float) -> tuple[Op, ...]:
    return (
        *(Op(act, lambda level: shear * level, is_signed=True) for act in (shear_x, shear_y)),
        *(Op(act, lambda level: shift * level, is_signed=True) for act in (shift_x, shift_y)),
        Op(rotate, lambda level: degrees * level, is_signed=True),
    )


_AUTO_CONTRAST = Op(lambda picture, _: ImageOps.autocontrast(picture))
_EQUALIZE = Op(lambda picture, _: ImageOps.equalize(picture))

RANDAUGMENT = (
    _AUTO_CONTRAST,
    _EQUALIZE,
    Op(lambda picture, _: ImageOps.invert(picture)),
    # timm keeps 0 bits at level 1, which is black, and which Pillow refuses since 12.
    Op(posterize, lambda level: max(1, 4 - int(4 * level))),
    Op(solarize, lambda level: 256 - int(256 * level)),
    Op(solarize_add, lambda level: int(110 * level)),
    *_enhancements(lambda level: max(0.1, 1 + 0.9 * level)),
    *_movements(shear=0.3, shift=0.45, degrees=30),
)
"""Cubuk et al. 2020, with timm's `inc1` numbers: the fifteen ops that are stronger the higher the level."""

TRIVIALAUGMENT = (
    Op(lambda picture, _: picture),
    _AUTO_CONTRAST,
    _EQUALIZE,
    Op(posterize, lambda level: 8 - round(6 * level)),
    Op(solarize, lambda level: 255 * (1 - level)),
    *_enhancements(lambda level: 1 + 0.99 * level),
    *_movements(shear=0.99, shift=32 / 224, degrees=135),
)
"""Müller and Hutter 2021, the wide space, with torchvision's numbers. Its shift of 32 pixels is that of a side of 224, and of others in proportion."""


def _affine(
    picture: Image.Image, matrix: tuple[float, ...], resampling: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resample=resampling, fillcolor=FILL)
