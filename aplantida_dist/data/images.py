"""Bytes to pixels: decode, choose the crop, one antialiased resize to uint8, flip. Normalizing is the device's work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aplantida_dist.data.augment import Augmentation
from aplantida_dist.data.decode import decode

Pixels = NDArray[np.uint8]
Interpolation = Literal["bicubic", "bilinear"]

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_CROP_ATTEMPTS = 10
_ERASING_ATTEMPTS = 10
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_LOG_RATIO = (math.log(0.3), -math.log(0.3))


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop (Szegedy et al. 2015, as in torchvision), horizontal flip, augmentations, random erasing (Zhong et al. 2017).

    crop_scale: share of the picture's area, smallest and largest. crop_ratio: width / height, drawn log-uniformly.
    horizontal_flip and random_erasing are probabilities. augmentations act in their order, each on what the one before left.
    """

    image_size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    horizontal_flip: float
    random_erasing: float
    interpolation: Interpolation
    augmentations: tuple[Augmentation, ...] = ()

    def __call__(self, content: bytes, seed: int) -> Pixels:
        """Return uint8 [image_size, image_size, 3]; what is drawn depends on the seed alone."""
        image = decode(content)
        random = Random(seed)
        box = self._crop_box(image.width, image.height, random)
        resized = _resize(image, box, self.image_size, self.interpolation)
        is_flipped = random.random() < self.horizontal_flip
        # Pillow mirrors in 30 µs; copying an array with a negative stride takes 240.
        picture = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped else resized
        for augmentation in self.augmentations:
            picture = augmentation(picture, seed)
        # Drawn last, so that crop and flip are the same with and without it.
        if random.random() < self.random_erasing:
            _erase(picture, random)
        return _pixels(picture)

    def _crop_box(self, width: int, height: int, random: Random) -> tuple[int, int, int, int]:
        """Draw a crop (left, upper, right, lower); after ten that do not fit, the largest central one of a legal ratio."""
        for _ in range(_CROP_ATTEMPTS):
            area = width * height * random.uniform(*self.crop_scale)
            ratio = math.exp(random.uniform(math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left, upper = random.randint(0, width - crop_width), random.randint(0, height - crop_height)
                return left, upper, left + crop_width, upper + crop_height
        ratio = min(max(width / height, self.crop_ratio[0]), self.crop_ratio[1])
        crop_width, crop_height = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, upper = (width - crop_width) // 2, (height - crop_height) // 2
        return left, upper, left + max(crop_width, 1), upper + max(crop_height, 1)


@dataclass(frozen=True)
class EvaluationTransform:
    """The central square of `crop_fraction` of the shorter side, resized; no randomness."""

    image_size: int
    crop_fraction: float
    interpolation: Interpolation

    def __call__(self, content: bytes, seed: int) -> Pixels:
        """Return uint8 [image_size, image_size, 3]; the seed is not used."""
        image = decode(content)
        side = min(image.size) * self.crop_fraction
        left, upper = (image.width - side) / 2, (image.height - side) / 2
        return _pixels(_resize(image, (left, upper, left + side, upper + side), self.image_size, self.interpolation))


Transform = TrainTransform | EvaluationTransform


def _erase(image: Image.Image, random: Random) -> None:
    """Fill a random rectangle with random pixels, in place; after ten that do not fit, none. Area and ratio as in timm."""
    for _ in range(_ERASING_ATTEMPTS):
        area = image.width * image.height * random.uniform(*_ERASED_AREA)
        ratio = math.exp(random.uniform(*_ERASED_LOG_RATIO))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width < image.width and 0 < height < image.height:
            left, upper = random.randint(0, image.width - width), random.randint(0, image.height - height)
            noise = Image.frombytes("RGB", (width, height), random.randbytes(3 * width * height))
            image.paste(noise, (left, upper))
            return


def _resize(
    image: Image.Image, box: tuple[float, float, float, float], side: int, interpolation: Interpolation
) -> Image.Image:
    return image.resize((side, side), _RESAMPLING[interpolation], box=box)


def _pixels(image: Any) -> Pixels:
    """The pixels of an RGB image, uint8 [height, width, 3]."""
    return np.asarray(image)
