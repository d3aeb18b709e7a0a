"""The other classes: those of a run that a dataset lacks, and whether a hit has to win against them."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from aplantida_dist.data.classmap import ClassMap, ClassMapError

OtherClasses = Literal["count", "leave-out"]
"""`count`: a hit wins among all classes of the run. `leave-out`: among those of the dataset alone."""
CHOICES: tuple[OtherClasses, ...] = get_args(OtherClasses)


def labels_in_run(
    dataset: ClassMap, run: ClassMap, *, other_classes: OtherClasses | None, ours: str, theirs: str
) -> tuple[int, ...]:
    """The run's label of each class of the dataset, by name.

    Raises ClassMapError where the dataset has a class that the run lacks and, unless it is said what the run's other classes
    are to be, where the class maps differ at all. `ours` and `theirs` name the sources of run and dataset.
    """
    unknown = dataset.missing_in(run)
    if other_classes is None:
        if not unknown and dataset.digest != run.digest:
            raise ClassMapError(
                f"{theirs} has {dataset.num_classes} of the {run.num_classes} classes of {ours}, so its labels mean others; "
                "match them by name with --other-classes count, where a hit must win among all classes of the run, or "
                "--other-classes leave-out, where it must among those of the dataset"
            )
        run.require_same(dataset, ours=ours, theirs=theirs)
    elif unknown:
        raise ClassMapError(
            f"{theirs} has {len(unknown)} classes that {ours} was never taught, such as {unknown[0]!r}; --other-classes is for "
            "classes that the dataset lacks: evaluate on a dataset whose classes the run has"
        )
    return tuple(run.index_of[name] for name in dataset.class_names)


def without_others(labels: tuple[int, ...], *, num_classes: int) -> Tensor:
    """What to add to logits so that the classes with these labels compete alone: 0 for them, −∞ for all others; float32 [classes]."""
    shift = torch.full((num_classes,), -torch.inf)
    shift[list(labels)] = 0.0
    return shift
