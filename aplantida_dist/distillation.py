"""Distillation: the loss of a student that learns from labels and from what frozen teachers make of the same pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from aplantida_dist.data.classmap import ClassMap
from aplantida_dist.objective import Objective, Targets


@dataclass(frozen=True)
class SharedClasses:
    """The classes that a teacher and the student both have, by name, in the student's order.

    student, teacher: int64 [shared], where each stands in their heads. is_known: bool [student's classes], whether the teacher
    has it too.
    """

    student: Tensor
    teacher: Tensor
    is_known: Tensor


def share_classes(teacher: ClassMap, student: ClassMap, *, device: torch.device) -> SharedClasses:
    """Match two class maps by name; what only one of them has is in neither list."""
    names = student.shared_with(teacher)
    return SharedClasses(
        student=torch.tensor([student.index_of[name] for name in names], dtype=torch.int64, device=device),
        teacher=torch.tensor([teacher.index_of[name] for name in names], dtype=torch.int64, device=device),
        is_known=torch.tensor([name in teacher.index_of for name in student.class_names], device=device),
    )


@dataclass(frozen=True)
class Distillation:
    """soft_share · T² · KL(teacher ‖ student) + label_share · the label loss, at temperature T (Hinton et al. 2015).

    Both sides of the KL are softmaxes over the shared classes alone: a teacher's silence about a class is no evidence
    against it, so the soft loss moves no logit of a class that the teacher does not have. Several teachers: the mean of their
    KLs by `weights`, over those that know the sample's label. A sample whose label no teacher knows has the label loss alone,
    with the soft loss's share added to its own, so that it counts as much as any other.
    """

    label_objective: Objective
    teachers: tuple[SharedClasses, ...]
    weights: tuple[float, ...]
    temperature: float
    soft_share: float
    label_share: float

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        label_losses = self.label_objective(logits, targets)
        soft_losses, is_taught = self._soft_losses(logits, targets)
        taught = self.soft_share * self.temperature**2 * soft_losses + self.label_share * label_losses
        return torch.where(is_taught, taught, (self.soft_share + self.label_share) * label_losses)

    def _soft_losses(self, logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """The mean KL of each sample, float32 [b], and whether any teacher knows its label, bool [b]."""
        weighted_sum = weight_sum = torch.zeros(len(logits), device=logits.device)
        for shared, teacher_logits, weight in zip(self.teachers, targets.teacher_logits, self.weights, strict=True):
            weights = weight * shared.is_known[targets.labels]
            weighted_sum = weighted_sum + weights * soft_loss(
                logits, teacher_logits, shared=shared, temperature=self.temperature
            )
            weight_sum = weight_sum + weights
        is_taught = weight_sum > 0
        return weighted_sum / torch.where(is_taught, weight_sum, 1.0), is_taught


def soft_loss(logits: Tensor, teacher_logits: Tensor, *, shared: SharedClasses, temperature: float) -> Tensor:
    """KL(teacher ‖ student) a sample over the shared classes, both softened by the temperature, without the factor T².

    logits: float [b, student's classes]; teacher_logits: float [b, teacher's classes]; returns float32 [b], float64 where both are.
    """
    ours = _softened(logits, shared.student, temperature)
    theirs = _softened(teacher_logits, shared.teacher, temperature)
    return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)


def _softened(logits: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """The logarithms of the probabilities over these classes; half precision is cast first."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.log_softmax(precise.index_select(1, classes) / temperature, dim=1)
