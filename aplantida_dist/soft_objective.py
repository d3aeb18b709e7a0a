"""The objective of a student of stored soft labels: its divergence from what the teachers said, and the loss on its labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from aplantida_dist.objective import Objective, Targets
from aplantida_dist.soft_targets import SoftTarget, SoftTargets


@dataclass(frozen=True)
class SoftLabelLoss:
    """soft_share · T² · KL(teachers ‖ student at temperature T) + label_share · the label's loss (Hinton, Vinyals & Dean 2015).

    The teachers' distribution is the weighted mean of theirs. A sample without a soft label has the second term alone. The soft
    labels are of the picture as it is, whatever crop of it the student sees. is_shared: for each teacher bool [classes], on the
    logits' device.
    """

    soft_targets: SoftTargets
    is_shared: tuple[Tensor, ...]
    label_objective: Objective
    soft_share: float
    label_share: float

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        assert targets.identities is not None
        temperature = self.soft_targets.temperature
        taught = self.taught_distribution(targets.identities, device=logits.device)
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # A row of zeros, which is what a missing soft label gives, has no divergence and no gradient.
        divergence = functional.kl_div((precise / temperature).log_softmax(1), taught, reduction="none").sum(1)
        label_losses = self.label_objective(logits, targets)
        return self.soft_share * temperature**2 * divergence + self.label_share * label_losses

    def taught_distribution(self, identities: Tensor, *, device: torch.device) -> Tensor:
        """The weighted mean of the teachers' distributions: float32 [b, classes], rows of 1, or of 0 for samples without.

        identities: int64 [b], on the CPU: looked up there while the device computes.
        """
        said = self.soft_targets.targets(identities.numpy())
        parts = zip(self.soft_targets.weights, said, self.is_shared, strict=True)
        return torch.stack([weight * _spread_out(target, shared, device) for weight, target, shared in parts]).sum(0)


def soft_label_loss(
    soft_targets: SoftTargets,
    *,
    label_objective: Objective,
    soft_share: float,
    label_share: float,
    device: torch.device,
) -> SoftLabelLoss:
    """The loss for logits on a device."""
    is_shared = tuple(torch.from_numpy(teacher.is_shared).to(device) for teacher in soft_targets.teachers)
    return SoftLabelLoss(soft_targets, is_shared, label_objective, soft_share, label_share)


def _spread_out(target: SoftTarget, is_shared: Tensor, device: torch.device) -> Tensor:
    """One teacher's distribution over all classes of the student, float32 [b, classes]."""
    everywhere = _ship(target.elsewhere, device)[:, None] * is_shared
    # One column more takes what the student has no class for.
    columns = functional.pad(everywhere, (0, 1))
    return columns.scatter(1, _ship(target.class_indices, device), _ship(target.probabilities, device))[:, :-1]


def _ship(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device; from pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
