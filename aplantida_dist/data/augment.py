"""Augmentations of a picture that is cropped, resized and mirrored already: what is drawn for each, and in which order they act.

Each draws from a generator of its own, derived from the sample's seed and its name: to turn one on changes nothing that another
one draws, nor crop, flip and erasing. They act one picture at a time, in the worker, on uint8: of a batch on the device each
picture would need an op of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Protocol

from PIL import Image, ImageFilter

from aplantida_dist.data.augment_ops import RANDAUGMENT, TRIVIALAUGMENT, Op, brightness, color, contrast, rotate
from aplantida_dist.seeds import derive

_WHOLE_MAGNITUDE = 10.0
_OP_PROBABILITY = 0.5
_TRIVIAL_LEVELS = 30
_BLUR_RADII = (0.1, 2.0)


class Augmentation(Protocol):
    """One kind of change: an RGB picture and the seed of its sample in, a picture of the same size out."""

    def __call__(self, picture: Image.Image, seed: int) -> Image.Image: ...


@dataclass(frozen=True)
class VerticalFlip:
    """Turned upside down with this probability."""

    probability: float

    def __call__(self, picture: Image.Image, seed: int) -> Image.Image:
        is_flipped = _random("vertical_flip", seed).random() < self.probability
        return picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if is_flipped else picture


@dataclass(frozen=True)
class Rotation:
    """Turned by an angle drawn evenly from -degrees to degrees."""

    degrees: float

    def __call__(self, picture: Image.Image, seed: int) -> Image.Image:
        return rotate(picture, _random("rotation", seed).uniform(-self.degrees, self.degrees))


@dataclass(frozen=True)
class RandAugment:
    """Cubuk et al. 2020 as timm's `rand-mM-nN-mstdS-inc1`: `num_ops` ops drawn with replacement, each taken with probability ½,
    at a magnitude drawn from a normal distribution and held within 0 and 10."""

    num_ops: int
    magnitude: float
    magnitude_std: float

    def __call__(self, picture: Image.Image, seed: int) -> Image.Image:
        random = _random("randaugment", seed)
        for _ in range(self.num_ops):
            op = random.choice(RANDAUGMENT)
            if random.random() < _OP_PROBABILITY:
                magnitude = random.gauss(self.magnitude, self.magnitude_std)
                picture = _act(op, picture, min(max(magnitude / _WHOLE_MAGNITUDE, 0.0), 1.0), random)
        return picture


@dataclass(frozen=True)
class TrivialAugment:
    """Müller and Hutter 2021, the wide space: one op at one of 31 levels, both drawn evenly."""

    def __call__(self, picture: Image.Image, seed: int) -> Image.Image:
        random = _random("trivialaugment", seed)
        op, level = random.choice(TRIVIALAUGMENT), random.randint(0, _TRIVIAL_LEVELS) / _TRIVIAL_LEVELS
        return _act(op, picture, level, random)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation, in a drawn order, each by a factor drawn evenly from 1 - strength to 1 + strength."""

    strength: float

    def __call__(self, picture: Image.Image, seed: int) -> Image.Image:
        random = _random("color_jitter", seed)
        for act in random.sample((brightness, contrast, color), 3):
            picture = act(picture, random.uniform(1 - self.strength, 1 + self.strength))
        return picture


@dataclass(frozen=True)
class Blur:
    """Blurred with this probability by a Gaussian of a radius from 0.1 to 2 pixels, as in SimCLR at 224 and timm."""

    probability: float

    def __call__(self, picture: Image.Image, seed: int) -> Image.Image:
        random = _random("blur", seed)
        is_blurred = random.random() < self.probability
        return picture.filter(ImageFilter.GaussianBlur(random.uniform(*_BLUR_RADII))) if is_blurred else picture


def _random(name: str, seed: int) -> Random:
    return Random(derive(seed, name))


def _act(op: Op, picture: Image.Image, level: float, random: Random) -> Image.Image:
    sign = random.choice((-1, 1)) if op.is_signed else 1
    return op.act(picture, op.number_of(sign * level))
