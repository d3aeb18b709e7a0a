"""The train transform in one process beside torchvision's and timm's, and beside nothing but decoding, on the same pictures."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import simplejpeg
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from aplantida_dist.data.images import TrainTransform
from aplantida_dist.data.manifest import Reencoding
from aplantida_dist.shards.reencode import DEFAULT_QUALITY, Encoded, reencode
from bench.finding import Finding, Goal, compare, cpu_ms_of, interleave
from bench.loader import CROP_RATIO, CROP_SCALE, FLIP, MEAN, STD

NUM_PICTURES = 256
MAX_SIDES = {224: 320, 384: 448}
"""To which longer side a dataset would be re-encoded, with `shards/build.py --max-side`, to train at an image size."""
CANONICAL_GOALS = {224: 2.6, 384: 2.9}
DECODE_GOALS = {224: 1.1, 384: 1.5}

Transform = Callable[[bytes, int], Any]
"""The bytes of a picture and a seed in; whatever the model is given out."""


def bench_decode(folder: Path, *, repeats: int, what: str) -> list[Finding]:
    """Compare CPU time a picture over the first JPEG files below a folder; the first round of each is not counted."""
    contents = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:NUM_PICTURES]]
    return [finding for side in CANONICAL_GOALS for finding in _bench_side(contents, side, repeats=repeats, what=what)]


def _bench_side(contents: Sequence[bytes], side: int, *, repeats: int, what: str) -> list[Finding]:
    reencoding = Reencoding(max_side=MAX_SIDES[side], quality=DEFAULT_QUALITY)
    smaller = [reencode(Encoded(content, "jpg"), reencoding=reencoding).image for content in contents]
    ways: dict[str, tuple[Transform, Sequence[bytes]]] = {
        "ours": (TrainTransform(side, CROP_SCALE, CROP_RATIO, FLIP, 0.0, "bilinear"), contents),
        "torchvision": (_canonical(side), contents),
        "timm": (_timm(side), contents),
        "libjpeg-turbo alone": (_decode_alone, contents),
        "Pillow's decode alone": (_decode_by_pillow, contents),
        f"ours on --max-side {MAX_SIDES[side]}": (
            TrainTransform(side, CROP_SCALE, CROP_RATIO, FLIP, 0.0, "bilinear"),
            smaller,
        ),
    }
    measures = [
        cpu_ms_of(functools.partial(_pass, transform, pictures=pictures)) for transform, pictures in ways.values()
    ]
    rounds = interleave(measures, repeats=repeats + 1)
    cpu_ms = {
        name: [spent / len(contents) for spent in spent_ms[1:]] for name, spent_ms in zip(ways, rounds, strict=True)
    }
    goals = {
        "torchvision": Goal("at most", round(1 / CANONICAL_GOALS[side], 3)),
        "timm": Goal("at most", 0.5),
        "libjpeg-turbo alone": Goal("at most", DECODE_GOALS[side]),
        "Pillow's decode alone": Goal("at most", DECODE_GOALS[side]),
        f"ours on --max-side {MAX_SIDES[side]}": Goal("at least", 1.0),
    }
    return [
        compare(
            f"train transform, {what}, at {side}", "CPU ms", cpu_ms["ours"], cpu_ms[name], peer_name=name, goal=goal
        )
        for name, goal in goals.items()
    ]


def _pass(transform: Transform, *, pictures: Sequence[bytes]) -> None:
    for seed, content in enumerate(pictures):
        transform(content, seed)


def _canonical(side: int) -> Transform:
    """The canonical recipe: Pillow, and floats that are normalised in the worker."""
    steps = transforms.Compose(
        [
            transforms.RandomResizedCrop(side, scale=CROP_SCALE, ratio=CROP_RATIO),
            transforms.RandomHorizontalFlip(FLIP),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return lambda content, seed: steps(Image.open(io.BytesIO(content)).convert("RGB"))


def _timm(side: int) -> Transform:
    """timm's, with nothing but crop and flip; like ours it ships uint8, for its prefetcher to normalise."""
    steps = create_transform(
        side,
        is_training=True,
        use_prefetcher=True,
        scale=CROP_SCALE,
        ratio=CROP_RATIO,
        hflip=FLIP,
        color_jitter=0.0,
        interpolation="bilinear",
    )
    return lambda content, seed: steps(Image.open(io.BytesIO(content)).convert("RGB"))


def _decode_alone(content: bytes, seed: int) -> Any:
    return simplejpeg.decode_jpeg(content)


def _decode_by_pillow(content: bytes, seed: int) -> Any:
    return Image.open(io.BytesIO(content)).load()
