"""The long tail: what makes rare classes count, as objectives around another one and as a shift of a model's logits.

All of it goes by `train_counts`, the train samples of each class index. A class without any counts as one of one sample, so
that its prior is not 0 and its weight not infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from aplantida_dist.objective import Objective, Targets

SMALLEST_FACTOR = 1e-12
"""1 − p of the focal loss is held above this: at 0 the slope of its power below 1 is infinite, and 0 · ∞ is NaN."""


@dataclass(frozen=True)
class LogitAdjusted:
    """Another objective on logits + shift, where shift is τ · log prior: float32 [classes] (Menon et al. 2021, eq. 10).

    A rare class has to win by a margin in training, so at evaluation, without the shift, it wins more often. With τ = 1 this
    is balanced softmax (Ren et al. 2020): softmax of z + log n is n·e^z / Σ n·e^z, and a common factor of n drops out.
    """

    objective: Objective
    shift: Tensor

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        return self.objective(_precise(logits) + self.shift, targets)


@dataclass(frozen=True)
class ClassWeighted:
    """Another objective's loss, times the weight of the label's class: float32 [classes].

    The weight is part of ℓ, not of w: w says which samples are there, so the step's divisor stays the plan's number of
    samples and the gradient that of Σ w·ℓ / Σ w over the global batch, on any number of ranks.
    """

    objective: Objective
    class_weights: Tensor

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        return targets.blend(lambda labels: self.objective(logits, Targets(labels)) * self.class_weights[labels])


@dataclass(frozen=True)
class Focal:
    """Another objective's loss, times (1 − p)^gamma, where p is the softmax probability of the label (Lin et al. 2017, eq. 4).

    gamma > 0. The gradient flows through the factor. Around cross-entropy it is the focal loss of several classes;
    label smoothing stays inside, the factor sees the label alone.
    """

    objective: Objective
    gamma: float

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        log_probabilities = functional.log_softmax(_precise(logits), dim=1)

        def losses_of(labels: Tensor) -> Tensor:
            missing = -torch.expm1(log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1))
            return missing.clamp_min(SMALLEST_FACTOR) ** self.gamma * self.objective(logits, Targets(labels))

        return targets.blend(losses_of)


class ShiftedLogits(nn.Module):
    """A model whose logits, in float32, are shifted by float32 [classes]: post hoc logit adjustment is −τ · log prior."""

    shift: Tensor

    def __init__(self, model: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return _precise(self.model(images)) + self.shift


def log_prior(train_counts: Sequence[int]) -> Tensor:
    """The natural logarithm of each class's share of the train samples: float32 [classes]."""
    counts = _at_least_one(train_counts)
    return torch.from_numpy(np.log(counts / counts.sum())).float()


def effective_number_weights(train_counts: Sequence[int], *, beta: float) -> Tensor:
    """Class weights (1 − β) / (1 − β^n), scaled so that their mean over the train samples is 1: float32 [classes].

    β in [0, 1): 0 weighs all classes alike, towards 1 by 1 / n (Cui et al. 2019, eq. 4; they scale to a mean over classes,
    which would change the size of the loss with the tail, and with it the meaning of the learning rate).
    """
    counts = _at_least_one(train_counts)
    weights = (1.0 - beta) / (1.0 - beta**counts)
    samples = np.asarray(train_counts, dtype=np.float64)
    return torch.from_numpy(weights * (samples.sum() / (weights @ samples))).float()


def _at_least_one(train_counts: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.maximum(np.asarray(train_counts, dtype=np.float64), 1.0)


def _precise(logits: Tensor) -> Tensor:
    """Half precision as float32; float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
