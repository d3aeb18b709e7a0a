"""What a species is: the form, margin, veins and colours that all of its leaves share."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Literal

import numpy as np

from aplantida_dist.herbarium.names import common_name, latin_name
from aplantida_dist.seeds import derive

Architecture = Literal["simple", "palmate", "pinnate", "digitate"]
Margin = Literal["entire", "serrate", "crenate", "dentate", "wavy", "spiny"]
Pattern = Literal["plain", "spots", "rim", "veins"]
Colour = tuple[float, float, float]
Range = tuple[float, float]

MARGINS: tuple[Margin, ...] = ("entire", "serrate", "crenate", "dentate", "wavy", "spiny")
_TEETH: dict[Margin, tuple[int, int]] = {
    "entire": (0, 1),
    "serrate": (10, 22),
    "crenate": (7, 15),
    "dentate": (10, 22),
    "wavy": (3, 6),
    "spiny": (5, 9),
}
"""From how many to (not including) how many teeth a margin has on each side."""

_TOOTH_DEPTH: dict[Margin, float] = {
    "entire": 0.0,
    "serrate": 0.040,
    "crenate": 0.035,
    "dentate": 0.045,
    "wavy": 0.030,
    "spiny": 0.085,
}

_GOLDEN = 0.6180339887498949
"""Steps of the golden ratio spread the hues of any number of consecutive species evenly."""


@dataclass(frozen=True)
class Shape:
    """The geometry of a leaf; lengths are in units of the leaf's own length, angles in radians.

    `width` is the half-width of a blade (simple), of a leaflet (pinnate, digitate), or of a lobe in units of the angle
    between lobes (palmate). `parts` counts lobes or leaflets; `depth` is how deep the lobes are cut, 0 to 1.
    `base_power` and `tip_power` bend the outline towards its ends, `heart` pulls the base below the stalk's end,
    `tilt` turns lobes and veins towards the tip, `span` is the angle from the tip to the last lobe or leaflet.
    """

    architecture: Architecture
    width: float
    base_power: float
    tip_power: float
    heart: float
    tilt: float
    parts: int
    depth: float
    span: float
    stalk: float
    margin: Margin
    teeth: int
    tooth_depth: float
    vein_pairs: int


@dataclass(frozen=True)
class Species:
    """One species of the herbarium: a function of (seed, index)."""

    seed: int
    index: int
    latin_name: str
    common_name: str
    shape: Shape
    colour: Colour
    vein_colour: Colour
    pattern: Pattern
    pattern_colour: Colour
    gloss: float

    @property
    def folder_name(self) -> str:
        """The latin name as the name of a folder, such as Salvoria_rubra."""
        return self.latin_name.replace(" ", "_")


@dataclass(frozen=True)
class _Form:
    """A kind of leaf, and the ends between which its species spread."""

    noun: str
    architecture: Architecture
    width: Range
    base_power: Range = (0.5, 0.9)
    tip_power: Range = (0.7, 1.2)
    heart: Range = (0.0, 0.0)
    tilt: Range = (0.1, 0.4)
    parts: Range = (0, 0)
    depth: Range = (0.0, 0.0)
    span: Range = (0.0, 0.0)


_FORMS = (
    _Form("spearleaf", "simple", width=(0.10, 0.17), base_power=(0.7, 1.1), tip_power=(0.8, 1.4)),
    _Form("eggleaf", "simple", width=(0.27, 0.36), base_power=(0.45, 0.6), tip_power=(0.8, 1.2)),
    _Form("spoonleaf", "simple", width=(0.20, 0.30), base_power=(1.3, 2.2), tip_power=(0.35, 0.5), tilt=(0.0, 0.2)),
    _Form("heartleaf", "simple", width=(0.38, 0.48), base_power=(0.4, 0.5), tip_power=(0.9, 1.3), heart=(0.24, 0.34)),
    _Form("oakling", "simple", (0.27, 0.36), (0.8, 1.2), (0.45, 0.6), parts=(4, 7), depth=(0.45, 0.7), tilt=(0.3, 0.6)),
    _Form("maplewort", "palmate", (0.24, 0.34), tip_power=(0.9, 1.3), parts=(5, 7), depth=(0.5, 0.68), span=(1.9, 2.3)),
    _Form("ivywort", "palmate", (0.34, 0.46), tip_power=(1.3, 1.9), parts=(3, 5), depth=(0.3, 0.5), span=(1.3, 1.9)),
    _Form("fanleaf", "palmate", (0.60, 0.90), tip_power=(2.5, 4.0), parts=(2, 4), depth=(0.25, 0.5), span=(0.6, 0.9)),
    _Form("coinleaf", "palmate", (0.50, 0.60), tip_power=(2.0, 2.5), parts=(7, 9), depth=(0.03, 0.12), span=(2.3, 2.6)),
    _Form("featherleaf", "pinnate", width=(0.18, 0.25), parts=(3, 5), tilt=(0.3, 0.6)),
    _Form("fernlet", "pinnate", (0.085, 0.115), (0.35, 0.5), (0.8, 1.1), parts=(9, 12), tilt=(0.1, 0.4)),
    _Form("handleaf", "digitate", (0.13, 0.18), (1.1, 1.7), (0.7, 1.0), parts=(5, 7), span=(1.7, 2.2)),
    _Form("trefoil", "digitate", (0.27, 0.34), (0.9, 1.3), (0.4, 0.6), parts=(3, 4), span=(1.8, 2.2)),
)


def make_species(seed: int, index: int) -> Species:
    """The species of this index. Any run of `len(_FORMS)` indices that starts at a multiple of it holds every form once."""
    rng = np.random.default_rng(derive(seed, "species", index))
    form = _FORMS[_dealt(seed, "form", index, len(_FORMS))]
    margin = MARGINS[_dealt(seed, "margin", index, len(MARGINS))]
    colour = _leaf_colour(rng, place=(derive(seed, "colour") / 2**63 + index * _GOLDEN) % 1.0)
    return Species(
        seed=seed,
        index=index,
        latin_name=latin_name(seed, index),
        common_name=common_name(seed, index, noun=form.noun),
        shape=_draw_shape(rng, form=form, margin=margin),
        colour=colour,
        vein_colour=_vein_colour(rng, colour),
        pattern=rng.choice(np.array(["plain", "plain", "plain", "spots", "rim", "veins"])).item(),
        pattern_colour=_pattern_colour(rng),
        gloss=float(rng.uniform(0.0, 0.3)),
    )


def _dealt(seed: int, what: str, index: int, count: int) -> int:
    """Deal 0 … count − 1 as from a shuffled pack: each one once before any comes again."""
    pack, place = divmod(index, count)
    return int(np.random.default_rng(derive(seed, what, pack)).permutation(count)[place])


def _draw_shape(rng: np.random.Generator, *, form: _Form, margin: Margin) -> Shape:
    few = form.architecture in ("pinnate", "digitate")
    num_teeth = int(rng.integers(*_TEETH[margin]))
    return Shape(
        architecture=form.architecture,
        width=float(rng.uniform(*form.width)),
        base_power=float(rng.uniform(*form.base_power)),
        tip_power=float(rng.uniform(*form.tip_power)),
        heart=float(rng.uniform(*form.heart)),
        tilt=float(rng.uniform(*form.tilt)),
        parts=int(rng.integers(int(form.parts[0]), int(form.parts[1]), endpoint=True)),
        depth=float(rng.uniform(*form.depth)),
        span=float(rng.uniform(*form.span)),
        stalk=float(rng.uniform(0.08, 0.3)),
        margin=margin,
        teeth=(num_teeth + 1) // 2 if few else num_teeth,
        tooth_depth=_TOOTH_DEPTH[margin] * float(rng.uniform(0.8, 1.3)) * (0.6 if few else 1.0),
        vein_pairs=int(rng.integers(4, 6) if few else rng.integers(5, 12)),
    )


def _leaf_colour(rng: np.random.Generator, *, place: float) -> Colour:
    """Mostly greens, from olive to blue-green; one species in four is red, purple, golden or grey-blue."""
    if place < 0.75:
        hue = 0.17 + 0.21 * place / 0.75
        return colorsys.hsv_to_rgb(hue, float(rng.uniform(0.38, 0.70)), float(rng.uniform(0.36, 0.62)))
    hue, saturation, value = ((0.97, 0.62, 0.5), (0.87, 0.4, 0.42), (0.12, 0.7, 0.72), (0.47, 0.25, 0.58))[
        min(int((place - 0.75) * 16), 3)
    ]
    return colorsys.hsv_to_rgb(
        (hue + float(rng.uniform(-0.02, 0.02))) % 1.0, saturation, value * float(rng.uniform(0.9, 1.1))
    )


def _vein_colour(rng: np.random.Generator, colour: Colour) -> Colour:
    """Paler than the leaf, or darker, or reddish."""
    kind = rng.random()
    if kind < 0.6:
        return _mix(colour, (0.93, 0.95, 0.70), 0.6)
    return _mix(colour, (0.08, 0.12, 0.04), 0.5) if kind < 0.8 else _mix(colour, (0.62, 0.16, 0.22), 0.7)


def _pattern_colour(rng: np.random.Generator) -> Colour:
    colours: tuple[Colour, ...] = ((0.93, 0.93, 0.78), (0.60, 0.13, 0.25), (0.90, 0.80, 0.36), (0.22, 0.12, 0.15))
    return colours[int(rng.integers(len(colours)))]


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    """`share` of the other colour in the one."""
    red, green, blue = (a + share * (b - a) for a, b in zip(one, other, strict=True))
    return red, green, blue
