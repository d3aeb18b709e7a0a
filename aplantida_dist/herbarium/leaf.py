"""The geometry of one leaf: outlines, midribs and veins of its blades, in the leaf's own coordinates.

The stalk ends at (0, 0), the tip points to (0, 1), x runs across. Every array is rectangular, [pieces, points, 2], so that a
leaf of 27 leaflets is placed in as few numpy calls as a leaf of one blade.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.herbarium.species import Shape

Points = NDArray[np.float64]
_RIB_POINTS = 12
_VEIN_POINTS = 6


@dataclass(frozen=True)
class Leaf:
    """Polygons (`blades`, and their right `halves`) and polylines (`ribs`, `veins`, `stalks`), each float64 [pieces, points, 2]."""

    blades: Points
    halves: Points
    ribs: Points
    veins: Points
    stalks: Points

    def moved(self, move: Callable[[Points], Points]) -> Leaf:
        """The leaf with every point moved."""
        return Leaf(**{field.name: move(getattr(self, field.name)) for field in fields(self)})


def grow_leaf(shape: Shape, rng: np.random.Generator) -> Leaf:
    """Grow one individual of this shape: the same plan, other proportions."""
    shape = _individual(shape, rng)
    match shape.architecture:
        case "simple":
            return _with_stalk(_simple(shape, rng), shape.stalk)
        case "palmate":
            return _with_stalk(_palmate(shape, rng), shape.stalk)
        case "pinnate":
            return _pinnate(shape, rng)
        case "digitate":
            return _digitate(shape, rng)


def _individual(shape: Shape, rng: np.random.Generator) -> Shape:
    vary = 1.0 + 0.07 * np.clip(rng.standard_normal(8), -2.0, 2.0)
    return replace(
        shape,
        width=shape.width * vary[0],
        base_power=shape.base_power * vary[1],
        tip_power=shape.tip_power * vary[2],
        heart=shape.heart * vary[3],
        tilt=shape.tilt * vary[4],
        depth=min(shape.depth * vary[5], 0.9),
        span=shape.span * vary[6],
        stalk=shape.stalk * vary[7],
        teeth=max(shape.teeth + int(rng.integers(-1, 2)), 3) if shape.teeth else 0,
        vein_pairs=shape.vein_pairs + int(rng.integers(-1, 2)),
    )


def _simple(shape: Shape, rng: np.random.Generator) -> Leaf:
    """One blade about a straight midrib: half-width t^base (1 − t)^tip along it, lobed, toothed, tilted forward."""

    def across(t: Points) -> Points:
        peak = shape.base_power / (shape.base_power + shape.tip_power)
        top = peak**shape.base_power * (1 - peak) ** shape.tip_power
        width = shape.width * t**shape.base_power * (1 - t) ** shape.tip_power / top
        return np.asarray(width * (1 - shape.depth * (0.5 + 0.5 * np.cos(2 * np.pi * shape.parts * t))))

    def along(t: Points) -> Points:
        return t - shape.heart * np.sin(np.pi * np.minimum(t / 0.45, 1.0))

    t = np.linspace(0.0, 1.0, max(72, 6 * shape.teeth + 1))
    taper = np.minimum(1.0, 6.0 * t * (1 - t))
    wobble = _wobble(t, rng)
    x = across(t) * (1 + wobble) + shape.tooth_depth * taper * _tooth(shape, t)
    right = np.stack([x, along(t) + shape.tilt * x], axis=-1)
    rib = np.stack([np.zeros(_RIB_POINTS), np.linspace(0.0, 1.0, _RIB_POINTS)], axis=-1)
    return _mirrored(right, rib, _simple_veins(shape, across=across, along=along))


def _simple_veins(shape: Shape, *, across: Callable[[Points], Points], along: Callable[[Points], Points]) -> Points:
    """Veins of the right side, from the midrib to just short of the margin; those of a lobed leaf end in its lobes."""
    pairs = shape.parts or shape.vein_pairs
    ends = (np.arange(pairs) + 0.5) / pairs if shape.parts else np.linspace(0.14, 0.92, pairs)
    starts = ends * 0.9 if shape.parts else ends - 0.11
    s = np.linspace(0.0, 1.0, _VEIN_POINTS)
    x = 0.94 * across(ends)[:, None] * s
    y = starts[:, None] + (along(ends) - starts)[:, None] * s**1.4 + shape.tilt * x
    return np.stack([x, y], axis=-1)


def _palmate(shape: Shape, rng: np.random.Generator) -> Leaf:
    """One blade about the stalk's end, in polar coordinates: lobes fan out from the tip to ±span."""
    angles = np.linspace(-shape.span, shape.span, shape.parts)
    reach = 1.0 - 0.28 * (np.abs(angles) / np.pi) ** 1.2 * (2.0 if shape.depth > 0.2 else 0.6)
    gap = angles[1] - angles[0]

    def radius(theta: Points) -> Points:
        lobe = np.exp(-((np.abs(theta[:, None] - angles) / (shape.width * gap)) ** shape.tip_power))
        return np.asarray((reach * (1 - shape.depth * (1 - lobe))).max(axis=1))

    last = min(shape.span + 0.55 * gap, 0.96 * np.pi)
    t = np.linspace(1.0, 0.0, max(120, 12 * shape.teeth + 1))
    theta = last * t
    close = np.minimum(1.0, (last - theta) / (0.3 * gap) + 1e-9) ** 0.5
    teeth = 1 + 1.3 * shape.tooth_depth * _tooth(shape, 2.0 * (1 - t)) * np.minimum(1.0, 9 * t * (1 - t) + 0.1)
    r = radius(theta) * close * (1 + _wobble(t, rng)) * teeth
    right = np.stack([r * np.sin(theta), r * np.cos(theta)], axis=-1)
    rib = np.stack([np.zeros(_RIB_POINTS), np.linspace(0.0, float(r[-1]), _RIB_POINTS)], axis=-1)
    return _mirrored(right, rib, _palmate_veins(angles, reach=reach))


def _palmate_veins(angles: Points, *, reach: Points) -> Points:
    """A main vein into every lobe of the right side, and two side veins off each main vein."""
    right = angles > 1e-6 if len(angles) % 2 else angles >= 0
    s = np.linspace(0.0, 1.0, _VEIN_POINTS)
    main_angles = np.concatenate([angles[right], [0.0]])
    main_reach = np.concatenate([reach[right], [1.0]])
    mains = 0.93 * main_reach[:, None] * s
    lines = [np.stack([mains * np.sin(main_angles)[:, None], mains * np.cos(main_angles)[:, None]], axis=-1)]
    for start, turn in ((0.35, 0.55), (0.35, -0.55), (0.55, 0.5), (0.55, -0.5)):
        direction = main_angles + turn
        side = 0.26 * main_reach[:, None] * (1.1 - start) * 1.3 * s
        x = start * main_reach * np.sin(main_angles)
        y = start * main_reach * np.cos(main_angles)
        lines.append(
            np.stack(
                [x[:, None] + side * np.sin(direction)[:, None], y[:, None] + side * np.cos(direction)[:, None]], -1
            )
        )
    return np.concatenate(lines)


def _pinnate(shape: Shape, rng: np.random.Generator) -> Leaf:
    """Leaflets in pairs along a stalk, and one at its end."""
    pairs = shape.parts
    where = np.linspace(0.22, 0.88, pairs) if pairs < 8 else np.linspace(0.12, 0.94, pairs)
    size = (0.36 if pairs < 8 else 0.34) * np.sin(np.pi * np.clip(0.25 + 0.62 * where, 0, 1)) ** (
        0.8 if pairs < 8 else 1.6
    )
    lean = np.pi / 2 - shape.tilt * (0.6 + 0.5 * where)
    origins = np.concatenate([where, where + 0.012, [where[-1] + 0.04]])
    lengths = np.concatenate([size, size, [size[-1] * 1.15]]) * rng.uniform(0.92, 1.08, 2 * pairs + 1)
    turns = np.concatenate([lean, -lean, [0.0]]) + rng.normal(0.0, 0.06, 2 * pairs + 1)
    places = np.stack([np.zeros_like(origins), origins], axis=-1)
    stalk = np.stack([np.zeros(_RIB_POINTS), np.linspace(-0.12, origins[-1], _RIB_POINTS)], axis=-1)
    return replace(_arranged(_leaflet(shape, rng), places, turns, lengths), stalks=stalk[None])


def _digitate(shape: Shape, rng: np.random.Generator) -> Leaf:
    """Leaflets that spread from the stalk's end, the middle one longest."""
    turns = np.linspace(-shape.span, shape.span, shape.parts) + rng.normal(0.0, 0.06, shape.parts)
    lengths = (1.0 - 0.16 * np.abs(turns)) * rng.uniform(0.94, 1.06, shape.parts) * 0.72
    leaf = _arranged(_leaflet(shape, rng), np.zeros((shape.parts, 2)), turns, lengths)
    return _with_stalk(leaf, 0.3 + shape.stalk)


def _leaflet(shape: Shape, rng: np.random.Generator) -> Leaf:
    return _simple(replace(shape, parts=0, depth=0.0, tilt=0.25), rng)


def _arranged(leaflet: Leaf, places: Points, turns: Points, lengths: Points) -> Leaf:
    """Copies of a leaflet, one a place, turned clockwise from the tip and scaled."""
    cos, sin = lengths * np.cos(turns), lengths * np.sin(turns)
    matrices = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], axis=1)

    def copy(points: Points) -> Points:
        copies = np.einsum("pqi,kji->kpqj", points, matrices) + places[:, None, None, :]
        return np.asarray(copies.reshape(-1, *points.shape[1:]))

    return leaflet.moved(copy)


def _mirrored(right: Points, rib: Points, veins: Points) -> Leaf:
    """A blade from its right side, base to tip."""
    mirror = np.array([-1.0, 1.0])
    return Leaf(
        blades=np.concatenate([right, (right * mirror)[::-1]])[None],
        halves=np.concatenate([right, rib[::-1]])[None],
        ribs=rib[None],
        veins=np.concatenate([veins, veins * mirror]),
        stalks=np.empty((0, _RIB_POINTS, 2)),
    )


def _with_stalk(leaf: Leaf, length: float) -> Leaf:
    stalk = np.stack([np.zeros(_RIB_POINTS), np.linspace(-length, 0.02, _RIB_POINTS)], axis=-1)
    return replace(leaf, stalks=stalk[None])


def _wobble(t: Points, rng: np.random.Generator) -> Points:
    """Slow irregularity of an outline: no leaf is quite its plan."""
    waves = np.arange(2, 6)
    sizes = rng.normal(0.0, 0.02, waves.size)
    return np.asarray((sizes * np.sin(np.pi * waves * t[:, None] + rng.uniform(0, 2 * np.pi, waves.size))).sum(axis=1))


def _tooth(shape: Shape, t: Points) -> Points:
    """Height of the margin's teeth, 0 to 1, at t in [0, 1] from base to tip."""
    phase = (shape.teeth * t) % 1.0
    match shape.margin:
        case "entire":
            return np.zeros_like(t)
        case "serrate":
            return phase
        case "crenate":
            return np.asarray(np.sqrt(np.sin(np.pi * phase)))
        case "dentate":
            return np.asarray(1 - np.abs(2 * phase - 1))
        case "wavy":
            return np.asarray(np.sin(2 * np.pi * phase))
        case "spiny":
            return np.asarray((1 - np.abs(2 * phase - 1)) ** 2.5)
