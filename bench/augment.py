"""Each augmentation on a picture of 224 beside timm's or torchvision's of the same name: torchvision v2 on uint8 tensors, the others on PIL."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision import transforms
from torchvision.transforms import v2

from aplantida_dist.data.augment import (
    Augmentation,
    Blur,
    ColorJitter,
    RandAugment,
    Rotation,
    TrivialAugment,
    VerticalFlip,
)
from aplantida_dist.data.augment_ops import FILL
from bench.finding import Finding, Goal, compare, cpu_ms_of, interleave
from bench.pictures import Pictures

SIDE = 224
NUM_PICTURES = 64
ROUNDS = 4
SEED = 0
GOAL = Goal("at most", 1.0)
BILINEAR = transforms.InterpolationMode.BILINEAR
V2, PIL = "torchvision v2, uint8 tensor", "torchvision, PIL"
OURS: dict[str, Augmentation] = {
    "randaugment": RandAugment(2, 9.0, 0.0),
    "trivialaugment": TrivialAugment(),
    "colour jitter": ColorJitter(0.4),
    "rotation": Rotation(20.0),
    "blur": Blur(1.0),
    "vertical flip": VerticalFlip(0.5),
}


def peers_of(name: str) -> dict[str, Callable[..., object]]:
    """What others offer for it, with the same strength. A blur of 13 pixels is one of three standard deviations.

    The magnitude is 9 of 10, which is 27 of torchvision's 30, and no other: near 10 timm posterizes to 0 bits, which Pillow 12 refuses.
    """
    fill = list(FILL)
    match name:
        case "randaugment":
            timm = rand_augment_transform("rand-m9-n2-inc1", {"img_mean": FILL, "interpolation": 2})
            return {"timm": timm, V2: v2.RandAugment(2, 27, interpolation=BILINEAR, fill=fill)}
        case "trivialaugment":
            return {
                PIL: transforms.TrivialAugmentWide(interpolation=BILINEAR, fill=fill),
                V2: v2.TrivialAugmentWide(interpolation=BILINEAR, fill=fill),
            }
        case "colour jitter":
            return {PIL: transforms.ColorJitter(0.4, 0.4, 0.4), V2: v2.ColorJitter(0.4, 0.4, 0.4)}
        case "rotation":
            return {
                PIL: transforms.RandomRotation(20.0, BILINEAR, fill=fill),
                V2: v2.RandomRotation(20.0, BILINEAR, fill=fill),
            }
        case "blur":
            return {V2: v2.GaussianBlur(13, (0.1, 2.0))}
        case _:
            return {PIL: transforms.RandomVerticalFlip(0.5), V2: v2.RandomVerticalFlip(0.5)}


def bench_augment(pictures: Pictures, *, repeats: int) -> list[Finding]:
    """Compare the CPU time a picture. All draw anew at each call; what they draw is their own."""
    files = sorted(pictures.folder.rglob("*.jpg"))[:NUM_PICTURES]
    images = [Image.open(path).convert("RGB").resize((SIDE, SIDE)) for path in files]
    tensors = [transforms.functional.pil_to_tensor(image) for image in images]
    random.seed(SEED)
    torch.manual_seed(SEED)
    findings = []
    for name, ours in OURS.items():
        peers = peers_of(name)
        acts = [functools.partial(_augment, images, ours)]
        acts += [functools.partial(_call, tensors if peer == V2 else images, act) for peer, act in peers.items()]
        mine, *theirs = interleave([_ms_a_picture(act, len(images)) for act in acts], repeats=repeats + 1)
        findings += [
            compare(f"augment: {name}", "CPU ms", mine[1:], took_ms[1:], peer_name=peer, goal=GOAL)
            for peer, took_ms in zip(peers, theirs, strict=True)
        ]
    return findings


def _augment(images: Sequence[Image.Image], ours: Augmentation) -> None:
    for number in range(ROUNDS * len(images)):
        ours(images[number % len(images)], number)


def _call(pictures: Sequence[object], peer: Callable[[object], object]) -> None:
    for number in range(ROUNDS * len(pictures)):
        peer(pictures[number % len(pictures)])


def _ms_a_picture(act: Callable[[], None], num_pictures: int) -> Callable[[int], float]:
    measure = cpu_ms_of(act)
    return lambda repeat: measure(repeat) / (ROUNDS * num_pictures)
