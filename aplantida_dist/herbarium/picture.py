"""One picture of the herbarium: a leaf or two on a ground, under some light, through some camera."""

from __future__ import annotations

import colorsys
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from aplantida_dist.herbarium.ground import Pixels, cloud, draw_ground, plane_of, to_image, to_mask
from aplantida_dist.herbarium.leaf import Leaf, Points, grow_leaf
from aplantida_dist.herbarium.species import Species
from aplantida_dist.seeds import derive

_FINER = 2
"""Outlines and veins are drawn this many times larger and averaged down, which smooths their edges."""

_WITHERED = plane_of((0.55, 0.40, 0.16))
_YELLOWED = plane_of((0.80, 0.70, 0.22))


def draw_leaf(species: Species, picture_index: int, *, width: int, height: int) -> Image.Image:
    """Draw picture `picture_index` of a species, RGB: a function of (species, picture index, width, height) alone."""

    def generator(*what: str | int) -> np.random.Generator:
        return np.random.default_rng(derive(species.seed, "picture", species.index, picture_index, *what))

    chance = generator("scene")
    pixels = draw_ground(generator("ground"), width=width, height=height)
    sun = float(chance.uniform(0, 2 * np.pi))
    if chance.random() < 0.15:
        _lay_leaf(pixels, species, generator("leaf", 1), sun=sun)
    _lay_leaf(pixels, species, generator("leaf", 0), sun=sun)
    return _photograph(pixels, generator("camera"), sun=sun)


def encode_jpeg(image: Image.Image) -> bytes:
    """The picture as JPEG of quality 90."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@dataclass(frozen=True)
class _Masks:
    """Where the parts of a laid leaf are, float32 [height, width] in [0, 1].

    `half` is the right side of each blade, `inner` rises from the rim to the middle, `shadow` lies on the ground.
    """

    body: Pixels
    half: Pixels
    veins: Pixels
    spots: Pixels
    inner: Pixels
    shadow: Pixels


def _lay_leaf(pixels: Pixels, species: Species, rng: np.random.Generator, *, sun: float) -> None:
    """Lay one leaf of a species on the picture, in place."""
    height, width = pixels.shape[1:]
    leaf = grow_leaf(species.shape, rng)
    leaf = _posed(leaf, rng, width=width * _FINER, height=height * _FINER)
    masks = _draw_masks(leaf, rng, width=width, height=height, sun=sun)
    colour = _paint(species, masks, rng)
    pixels *= 1 - 0.55 * masks.shadow
    pixels += masks.body * (colour - pixels)


def _posed(leaf: Leaf, rng: np.random.Generator, *, width: int, height: int) -> Leaf:
    """Bend, fold, foreshorten, turn, and place a leaf; its coordinates become pixels."""
    bend, fold, squeeze = rng.normal(0.0, 0.16), rng.uniform(0.78, 1.0), rng.uniform(0.82, 1.0)
    turn, view = rng.uniform(0, 2 * np.pi, 2)
    size = min(width, height) * rng.uniform(0.68, 1.02)
    centre = np.array([width, height]) * (0.5 + rng.uniform(-0.09, 0.09, 2))
    squash = _rotation(view) @ np.diag([squeeze, 1.0]) @ _rotation(-view)
    matrix = _rotation(turn) @ squash

    def bent(points: Points) -> Points:
        x, y = points[..., 0], points[..., 1]
        folded = np.where(x < 0, x * fold, x)
        return np.stack([folded + bend * (y - 0.4) ** 2, -y], axis=-1) @ matrix.T

    leaf = leaf.moved(bent)
    low, high = leaf.blades.min(axis=(0, 1)), leaf.blades.max(axis=(0, 1))
    middle, extent = (low + high) / 2, float(np.hypot(*(high - low)) + (high - low).max()) / 2
    return leaf.moved(lambda points: (points - middle) * (size / extent) + centre)


def _rotation(angle: float) -> NDArray[np.float64]:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def _draw_masks(leaf: Leaf, rng: np.random.Generator, *, width: int, height: int, sun: float) -> _Masks:
    side = min(width, height)
    size = (width * _FINER, height * _FINER)
    body, half, veins, spots = (Image.new("L", size) for _ in range(4))
    line = side * _FINER / 256
    for polygon in leaf.blades:
        ImageDraw.Draw(body).polygon(polygon.ravel().tolist(), fill=255)
    for polygon in leaf.halves:
        ImageDraw.Draw(half).polygon(polygon.ravel().tolist(), fill=255)
    _draw_lines(veins, leaf.veins, strength=150, width=line * 1.2)
    _draw_lines(veins, leaf.ribs, strength=235, width=line * (2.6 if len(leaf.ribs) == 1 else 1.6))
    for target in (veins, body):
        _draw_lines(target, leaf.stalks, strength=255, width=line * 4.5)
    _bite(body, leaf, rng, side=side * _FINER)
    _dot(spots, leaf, rng, side=side * _FINER)
    whole = body.reduce(_FINER)
    blurred = whole.reduce(4).filter(ImageFilter.GaussianBlur(side / 128))
    near = blurred.resize((width, height), Image.Resampling.BILINEAR)
    aside, below = 0.035 * side * np.cos(sun), 0.035 * side * np.sin(sun)
    cast = near.transform((width, height), Image.Transform.AFFINE, (1, 0, -round(aside), 0, 1, -round(below)))
    return _Masks(
        body=to_mask(whole),
        half=to_mask(half.reduce(_FINER)),
        veins=to_mask(veins.reduce(_FINER)),
        spots=to_mask(spots.reduce(_FINER)),
        inner=(2 * to_mask(near) - 1).clip(0, 1),
        shadow=to_mask(cast),
    )


def _draw_lines(image: Image.Image, lines: Points, *, strength: int, width: float) -> None:
    pen = ImageDraw.Draw(image)
    for line in lines:
        pen.line(line.ravel().tolist(), fill=strength, width=max(round(width), 1), joint="curve" if width > 3 else None)


def _bite(body: Image.Image, leaf: Leaf, rng: np.random.Generator, *, side: int) -> None:
    """Take a caterpillar's bites out of some leaves' edges."""
    pen = ImageDraw.Draw(body)
    outline = leaf.blades.reshape(-1, 2)
    for _ in range(int(rng.poisson(0.7))):
        x, y = outline[int(rng.integers(len(outline)))] + rng.normal(0, 0.01 * side, 2)
        for _ in range(3):
            radius = side * rng.uniform(0.012, 0.035)
            x, y = x + rng.normal(0, 0.015) * side, y + rng.normal(0, 0.015) * side
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=0)


def _dot(spots: Image.Image, leaf: Leaf, rng: np.random.Generator, *, side: int) -> None:
    """Scatter spots over a leaf; whether they show is up to its species."""
    pen = ImageDraw.Draw(spots)
    low, high = leaf.blades.min(axis=(0, 1)), leaf.blades.max(axis=(0, 1))
    radii = side * rng.uniform(0.008, 0.024, 70)
    for (x, y), radius in zip(rng.uniform(low, high, (70, 2)).tolist(), radii.tolist(), strict=True):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=230)


def _paint(species: Species, masks: _Masks, rng: np.random.Generator) -> Pixels:
    """The leaf's own colour at every pixel, float32 [3, height, width]; only where its body is does it count."""
    height, width = masks.body.shape
    mottle = cloud(rng, width=width, height=height, cells=(3, 3), octaves=7, fade=0.72)
    colour = _individual_colour(species, rng) * (1 + 0.10 * mottle)
    contrast = np.float32(rng.uniform(0.12, 0.26) * rng.choice([-1, 1]))
    colour *= (1 + contrast * (masks.half - 0.5)) * (0.86 + 0.16 * masks.inner)
    accent = plane_of(species.pattern_colour)
    match species.pattern:
        case "spots":
            colour += masks.spots * 0.85 * (accent - colour)
        case "rim":
            rim = (1.6 - 3.2 * masks.inner + 0.35 * mottle).clip(0, 0.9)
            colour += rim * (accent - colour)
        case "veins":
            colour += (0.75 * masks.veins) * (accent - colour)
        case "plain":
            pass
    colour += 0.75 * masks.veins * (plane_of(species.vein_colour) - colour)
    colour = _aged(colour, masks, mottle, rng)
    return np.asarray(colour + np.float32(species.gloss) * (mottle - 0.6).clip(0, 1) * masks.inner)


def _individual_colour(species: Species, rng: np.random.Generator) -> Pixels:
    hue, saturation, value = colorsys.rgb_to_hsv(*species.colour)
    hue = (hue + rng.normal(0, 0.014)) % 1.0
    saturation = min(saturation * rng.uniform(0.85, 1.15), 1.0)
    return plane_of(colorsys.hsv_to_rgb(hue, saturation, value * rng.uniform(0.85, 1.15)))


def _aged(colour: Pixels, masks: _Masks, mottle: Pixels, rng: np.random.Generator) -> Pixels:
    """Yellow or wither some leaves from the rim inwards."""
    age = float(rng.random())
    if age < 0.65:
        return colour
    target = _YELLOWED if age < 0.85 else _WITHERED
    reach = rng.uniform(0.1, 1.0)
    amount = (reach - 1.1 * masks.inner + 0.45 * mottle).clip(0, 0.8)
    return np.asarray(colour + amount * (target - colour))


def _photograph(pixels: Pixels, rng: np.random.Generator, *, sun: float) -> Image.Image:
    """Light the scene from the sun's side, and take it with a camera that has a white balance, a focus and a sensor."""
    height, width = pixels.shape[1:]
    x = np.linspace(-1, 1, width, dtype=np.float32)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    slope, corner, noise = rng.uniform(0.0, 0.25), rng.uniform(0.0, 0.18), rng.uniform(0.010, 0.040)
    light = rng.uniform(0.88, 1.25) * (1 - slope * (np.cos(sun) * x + np.sin(sun) * y)) - corner * (x**2 + y**2)
    warmth = rng.normal(0, 0.04)
    exposed = pixels * light.astype(np.float32) * plane_of((1 + warmth, 1 + rng.normal(0, 0.015), 1 - warmth))
    exposed += np.float32(noise) * rng.standard_normal((height, width), dtype=np.float32)
    image = to_image(exposed)
    blur = 0.005 * rng.random() ** 3 * min(width, height)
    return image.filter(ImageFilter.GaussianBlur(blur)) if blur > 0.2 else image
