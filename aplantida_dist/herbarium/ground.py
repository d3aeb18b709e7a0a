"""What a leaf lies on: soil, grass, rock, wood, litter or a paper sheet, drawn from noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels = NDArray[np.float32]
"""float32 [3, height, width] in about [0, 1] (planes, because numpy is slow over an innermost axis of 3); masks and noise [height, width]."""


def draw_ground(rng: np.random.Generator, *, width: int, height: int) -> Pixels:
    """Draw one of the grounds; float32 [3, height, width]."""
    draw: Callable[..., Pixels] = _GROUNDS[int(rng.integers(len(_GROUNDS)))]
    return draw(rng, width=width, height=height)


def cloud(
    rng: np.random.Generator, *, width: int, height: int, cells: tuple[float, float], octaves: int, fade: float
) -> Pixels:
    """Smooth noise of mean 0 and deviation about 1, float32 [height, width].

    `cells` is the coarsest grid across and down a square of the shorter side; each octave doubles it and is `fade` as
    strong. Octaves finer than the pixels are left out.
    """
    side = min(width, height)
    total = np.zeros((height, width), np.float32)
    power = 0.0
    for octave in range(octaves):
        across, down = (math.ceil(2**octave * count) for count in cells)
        if octave and min(across, down) > side:
            break
        grid = (min(math.ceil(down * height / side) + 1, height), min(math.ceil(across * width / side) + 1, width))
        coarse = Image.fromarray(rng.standard_normal(grid, dtype=np.float32) * np.float32(fade**octave))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
        power += fade ** (2 * octave)
    return np.asarray(total / np.float32(0.7 * math.sqrt(power)))


def plane_of(colour: Pixels | tuple[float, ...]) -> Pixels:
    """A colour, float32 [3, 1, 1], so that it spreads over a picture."""
    return np.asarray(colour, np.float32).reshape(3, 1, 1)


def to_pixels(image: Image.Image) -> Pixels:
    """An RGB image as pixels."""
    return np.stack([to_mask(band) for band in image.split()])


def to_mask(image: Image.Image) -> Pixels:
    """A grey image as float32 [height, width] in [0, 1]."""
    return np.asarray(image, np.float32) / np.float32(255)


def to_image(pixels: Pixels) -> Image.Image:
    """Pixels as an RGB image; values beyond [0, 1] are clipped."""
    planes = (pixels * np.float32(255)).clip(0, 255).astype(np.uint8)
    return Image.merge("RGB", [Image.fromarray(plane) for plane in planes])


def _soil(rng: np.random.Generator, *, width: int, height: int) -> Pixels:
    grain = cloud(rng, width=width, height=height, cells=(5, 5), octaves=7, fade=0.97)
    dark, light = (
        _between(rng, (0.16, 0.10, 0.07), (0.26, 0.19, 0.13)),
        _between(rng, (0.42, 0.30, 0.20), (0.60, 0.47, 0.35)),
    )
    pixels = _ramp(0.45 + 0.20 * grain, dark, light)
    return _pebbles(rng, pixels, tint=(0.62, 0.56, 0.50), count=int(rng.integers(4, 26)), size=(0.006, 0.035))


def _rock(rng: np.random.Generator, *, width: int, height: int) -> Pixels:
    rough = cloud(rng, width=width, height=height, cells=(3, 3), octaves=8, fade=0.86)
    cracks = np.exp(-18 * np.abs(cloud(rng, width=width, height=height, cells=(2, 2), octaves=3, fade=0.5)))
    dark, light = (
        _between(rng, (0.25, 0.25, 0.27), (0.40, 0.36, 0.32)),
        _between(rng, (0.62, 0.61, 0.58), (0.80, 0.78, 0.74)),
    )
    pixels = _ramp(0.5 + 0.18 * rough, dark, light) * (1 - 0.45 * cracks)
    return _pebbles(rng, pixels, tint=(0.66, 0.68, 0.38), count=int(rng.integers(0, 12)), size=(0.015, 0.06))


def _wood(rng: np.random.Generator, *, width: int, height: int) -> Pixels:
    cells = (1.5, 26.0) if rng.random() < 0.5 else (26.0, 1.5)
    grain = cloud(rng, width=width, height=height, cells=cells, octaves=5, fade=0.95)
    tone = cloud(rng, width=width, height=height, cells=(2, 2), octaves=2, fade=0.5)
    dark, light = (
        _between(rng, (0.25, 0.15, 0.09), (0.36, 0.29, 0.22)),
        _between(rng, (0.55, 0.38, 0.24), (0.74, 0.65, 0.52)),
    )
    return _ramp(0.5 + 0.17 * grain + 0.10 * tone, dark, light)


def _paper(rng: np.random.Generator, *, width: int, height: int) -> Pixels:
    fibre = cloud(rng, width=width, height=height, cells=(40, 40), octaves=4, fade=1.0)
    stain = cloud(rng, width=width, height=height, cells=(2, 2), octaves=2, fade=0.5)
    pixels = _ramp(
        0.6 + 0.16 * fibre + 0.16 * stain, (0.78, 0.72, 0.60), _between(rng, (0.90, 0.86, 0.76), (0.96, 0.95, 0.91))
    )
    if rng.random() < 0.5:
        _stick_label(rng, pixels)
    return pixels


def _stick_label(rng: np.random.Generator, pixels: Pixels) -> None:
    """A collector's label in a corner: a pale slip with lines of writing."""
    height, width = pixels.shape[1:]
    side = min(height, width)
    high, wide = int(side * rng.uniform(0.12, 0.18)), int(side * rng.uniform(0.22, 0.34))
    top = (height - high - side // 32) if rng.random() < 0.7 else side // 32
    left = (width - wide - side // 32) if rng.random() < 0.7 else side // 32
    slip = pixels[:, top : top + high, left : left + wide]
    slip[:] = 0.35 * slip + 0.65 * np.float32(0.97)
    slip[:, [0, -1]] = 0.45
    slip[:, :, [0, -1]] = 0.45
    for line in range(1, 4):
        row = high * line // 4
        ink = slip[:, row : row + max(side // 128, 1), wide // 10 : int(wide * rng.uniform(0.5, 0.9))]
        ink *= np.asarray(rng.uniform(0.25, 0.9, ink.shape[2]), np.float32)


def _grass(rng: np.random.Generator, *, width: int, height: int) -> Pixels:
    image = Image.new("RGB", (width, height), tuple(int(255 * c) for c in (0.10, 0.16, 0.06)))
    pen = ImageDraw.Draw(image)
    side, count = min(width, height), int(150 * width * height / min(width, height) ** 2)
    x, y = rng.uniform(-0.1, 1.1, count) * width, rng.uniform(-0.05, 1.25, count) * height
    length, lean = rng.uniform(0.2, 0.55, count) * side, rng.normal(rng.normal(0.0, 0.3), 0.4, count)
    half = rng.uniform(0.004, 0.013, count) * side
    shade = rng.uniform(0.35, 1.0, count)[:, None] * _between(rng, (0.30, 0.42, 0.12), (0.46, 0.58, 0.22))
    colours = (255 * np.sort(shade, axis=0) * rng.uniform(0.85, 1.1, (count, 3))).clip(0, 255).astype(int).tolist()
    tips = np.stack([x + np.sin(lean) * length, y - np.cos(lean) * length], axis=-1)
    corners = np.stack([x - half, y, x + half, y, tips[:, 0], tips[:, 1]], axis=-1)
    for corner, colour in zip(corners.tolist(), colours, strict=True):
        pen.polygon(corner, fill=tuple(colour))
    fine = cloud(rng, width=width, height=height, cells=(6, 6), octaves=7, fade=0.9)
    return to_pixels(image) * (1 + 0.14 * fine)


def _litter(rng: np.random.Generator, *, width: int, height: int) -> Pixels:
    """Last year's leaves: overlapping brown ovals with a midrib, on soil."""
    image = to_image(_soil(rng, width=width, height=height))
    pen = ImageDraw.Draw(image)
    side, count = min(width, height), int(16 * width * height / min(width, height) ** 2)
    t = np.linspace(0, np.pi, 14)
    for _ in range(count):
        length, slim, turn = side * rng.uniform(0.14, 0.34), rng.uniform(0.2, 0.42), rng.uniform(0, 2 * np.pi)
        along = np.concatenate([-np.cos(t), np.cos(t)]) * length / 2
        aside = np.concatenate([np.sin(t), -np.sin(t)]) * length * slim / 2 * (1 - 0.3 * along / length)
        x = rng.uniform(0, width) + along * np.cos(turn) - aside * np.sin(turn)
        y = rng.uniform(0, height) + along * np.sin(turn) + aside * np.cos(turn)
        tone = _between(rng, (0.30, 0.19, 0.10), (0.62, 0.43, 0.24)) * 255
        pen.polygon(np.stack([x, y], -1).ravel().tolist(), fill=tuple(tone.astype(int).tolist()))
        pen.line([x[0], y[0], x[13], y[13]], fill=tuple((tone * 0.65).astype(int).tolist()), width=max(side // 128, 1))
    fine = cloud(rng, width=width, height=height, cells=(8, 8), octaves=6, fade=0.9)
    return to_pixels(image) * (0.95 + 0.12 * fine)


def _pebbles(
    rng: np.random.Generator, pixels: Pixels, *, tint: tuple[float, float, float], count: int, size: tuple[float, float]
) -> Pixels:
    """Scatter ovals over the ground: stones on soil, lichen on rock."""
    height, width = pixels.shape[1:]
    side = min(width, height)
    mask = Image.new("L", (width, height))
    pen = ImageDraw.Draw(mask)
    for x, y, radius, flat, strength in rng.random((count, 5)).tolist():
        across = side * (size[0] + (size[1] - size[0]) * radius**2)
        down = across * (0.6 + 0.4 * flat)
        box = (x * width - across, y * height - down, x * width + across, y * height + down)
        pen.ellipse(box, fill=int(90 + 130 * strength))
    share = to_mask(mask)
    shade = pixels[1] / pixels[1].mean()
    return np.asarray(pixels + share * (plane_of(tint) * (0.4 + 0.6 * shade) - pixels))


def _ramp(level: Pixels, dark: Pixels | tuple[float, ...], light: Pixels | tuple[float, ...]) -> Pixels:
    """Colour from dark (level 0) to light (level 1)."""
    low, high = plane_of(dark), plane_of(light)
    return np.asarray(low + level.clip(-0.3, 1.3) * (high - low))


def _between(rng: np.random.Generator, one: tuple[float, ...], other: tuple[float, ...]) -> Pixels:
    low, high = np.asarray(one, np.float32), np.asarray(other, np.float32)
    return np.asarray(low + np.float32(rng.random()) * (high - low))


_GROUNDS = (_soil, _rock, _wood, _paper, _grass, _litter)
