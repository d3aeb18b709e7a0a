"""The objective: what training minimises, as the loss of each sample against its target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from aplantida_dist.loss import binary_cross_entropy, cross_entropy


@dataclass(frozen=True)
class Targets:
    """What the pictures of a micro-batch are to be taken for. labels: int64 [b]; the totals count hits by them.

    Where pictures are mixed, partners: int64 [b] are the other pictures' labels, and `labels` the dominant ones: they have the
    larger share, 0.5 to 1. teacher_logits: what each teacher made of the same pictures, float [b, its classes]; empty without any.
    identities: int64 [b], who the samples are, on the CPU, where an objective may look them up.
    """

    labels: Tensor
    partners: Tensor | None = None
    share: float = 1.0
    teacher_logits: tuple[Tensor, ...] = ()
    identities: Tensor | None = None

    def blend(self, losses_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The losses of the labels and of the partners by their shares, as mixup's authors take it; returns [b].

        losses_of: labels int64 [b] → [b]. A loss that is linear in its target has this value for the blended target, too.
        """
        own = losses_of(self.labels)
        return own if self.partners is None else self.share * own + (1.0 - self.share) * losses_of(self.partners)


class Objective(Protocol):
    """The loss of each sample, never averaged: logits float [b, classes] in, float32 [b] out, whatever precision the logits have."""

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy, with a share of the target spread over all classes (Szegedy et al. 2016)."""

    label_smoothing: float

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        return targets.blend(lambda labels: cross_entropy(logits, labels, label_smoothing=self.label_smoothing))


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """A yes or no for each class, the mean over the classes (Wightman et al. 2021, as in timm); smoothing as above."""

    label_smoothing: float

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        return targets.blend(lambda labels: binary_cross_entropy(logits, labels, label_smoothing=self.label_smoothing))
