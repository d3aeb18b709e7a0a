"""The objective: what training minimises, as the loss of each sample against its target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from aplantida_dist.loss import cross_entropy


@dataclass(frozen=True)
class Targets:
    """What the pictures of a micro-batch are to be taken for. labels: int64 [b]; the totals count hits by them.

    identities: int64 [b], who the samples are, on the CPU, where an objective may look them up.
    """

    labels: Tensor
    identities: Tensor


class Objective(Protocol):
    """The loss of each sample, never averaged: logits float [b, classes] in, float32 [b] out, whatever precision the logits have."""

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy, with a share of the target spread over all classes (Szegedy et al. 2016)."""

    label_smoothing: float

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        return cross_entropy(logits, targets.labels, label_smoothing=self.label_smoothing)
