"""Mixing: which pictures of a micro-batch are blended, how, and what they are then to be taken for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aplantida_dist.objective import Targets
from aplantida_dist.seeds import derive


class Mixing(Protocol):
    """What is done to a micro-batch before it is normalized, so that teachers see what the student sees. What a slot gets depends on (seed, step, slot) alone."""

    def acts_at(self, step: int) -> bool:
        """Whether micro-batches of this step may be mixed, so that its hits are counted by the dominant label."""

    def __call__(self, images: Tensor, labels: Tensor, *, step: int, slot: int) -> tuple[Tensor, Targets]:
        """Mix a micro-batch: images uint8 [b, 3, h, w], labels int64 [b]; mixed images are float32, still 0 … 255."""


@dataclass(frozen=True)
class Unmixed:
    """No mixing: pictures stay what they are."""

    def acts_at(self, step: int) -> bool:
        return False

    def __call__(self, images: Tensor, labels: Tensor, *, step: int, slot: int) -> tuple[Tensor, Targets]:
        return images, Targets(labels)


class Box(NamedTuple):
    """A rectangle in pixels; its lower and right ends are outside of it."""

    upper: int
    lower: int
    left: int
    right: int


@dataclass(frozen=True)
class Mix:
    """What a slot draws, for all its pictures. `share` of each stays; the rest is of the picture `shift` places before it, cyclically.

    With a box its pixels are the partner's (CutMix); without one every pixel is blended (mixup).
    """

    shift: int
    share: float
    box: Box | None


@dataclass(frozen=True)
class MixupCutmix:
    """mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), one draw a micro-batch as in timm, up to `end_step`.

    Partners are the micro-batch shifted by a drawn number of places: in batches of any size nobody of two or more is its own
    partner, and a shift needs no copy to the device. Padding repeats samples of the same step, so it may be a partner: it has
    weight 0 as a sample, and what a slot holds never depends on ranks. Everything is drawn on the host; no call waits for the device.
    """

    seed: int
    mixup_alpha: float
    cutmix_alpha: float
    probability: float
    cutmix_probability: float
    end_step: int

    def acts_at(self, step: int) -> bool:
        return step < self.end_step

    def __call__(self, images: Tensor, labels: Tensor, *, step: int, slot: int) -> tuple[Tensor, Targets]:
        mix = self.draw(len(labels), height=images.shape[2], width=images.shape[3], step=step, slot=slot)
        if mix is None:
            return images, Targets(labels)
        images = images.to(torch.promote_types(images.dtype, torch.float32), copy=True)
        if mix.box is None:
            images = _blend(images, mix)
        else:
            inside = images[:, :, mix.box.upper : mix.box.lower, mix.box.left : mix.box.right]
            inside.copy_(inside.roll(mix.shift, 0))
        partners = labels.roll(mix.shift, 0)
        if mix.share < 0.5:
            return images, Targets(partners, labels, 1.0 - mix.share)
        return images, Targets(labels, partners, mix.share)

    def draw(self, num_samples: int, *, height: int, width: int, step: int, slot: int) -> Mix | None:
        """What the slot of `num_samples` (at least 2) pictures draws; None where it stays unmixed."""
        random = Random(derive(self.seed, "mixing", step, slot))
        if not self.acts_at(step) or random.random() >= self.probability:
            return None
        is_cutmix = random.random() < self.cutmix_probability
        shift = random.randrange(1, num_samples)
        alpha = self.cutmix_alpha if is_cutmix else self.mixup_alpha
        share = random.betavariate(alpha, alpha)
        if not is_cutmix:
            return Mix(shift, share, None)
        box = _draw_box(random, 1.0 - share, height=height, width=width)
        return Mix(shift, 1.0 - (box.lower - box.upper) * (box.right - box.left) / (height * width), box)


def _blend(images: Tensor, mix: Mix) -> Tensor:
    """Every picture with its partner, as `lerp(images, images.roll(shift))` gives it, without the pass over memory that rolling takes."""
    blended, shift = torch.empty_like(images), mix.shift
    torch.lerp(images[shift:], images[:-shift], 1.0 - mix.share, out=blended[shift:])
    torch.lerp(images[:shift], images[-shift:], 1.0 - mix.share, out=blended[:shift])
    return blended


def _draw_box(random: Random, area: float, *, height: int, width: int) -> Box:
    """A box of the picture's ratio and this share of its area, its centre anywhere in the picture; what stands out is cut off."""
    box_height, box_width = int(height * math.sqrt(area)), int(width * math.sqrt(area))
    upper = random.randrange(height) - box_height // 2
    left = random.randrange(width) - box_width // 2
    return Box(max(upper, 0), min(upper + box_height, height), max(left, 0), min(left + box_width, width))
