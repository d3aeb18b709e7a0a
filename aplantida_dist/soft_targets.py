"""Soft targets: what the files of soft labels say of a sample in the student's classes, and whether they cover a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.data.classmap import ClassMap
from aplantida_dist.data.dataset import Split
from aplantida_dist.files import digest
from aplantida_dist.lineage import Descent, Identities, Lineage
from aplantida_dist.soft_label_file import SoftLabelError, SoftLabelFile, open_soft_labels

MIN_MASS = 0.01
"""Probability that a teacher must give to the student's classes; below it, what it says of them would be noise made large."""
_CHECKED_AT_ONCE = 2**14
_KEYS_TOLD = 3


@dataclass(frozen=True)
class SoftTarget:
    """What one teacher says of some samples, over the student's classes; the rows of samples that are not there hold zeros.

    is_there: bool [b]. class_indices: int64 [b, k], the student's, `num_classes` for a class that it does not have.
    probabilities: float32 [b, k]. elsewhere: float32 [b], the probability of each other class that both have: what the teacher
    gave to all classes beyond its k likeliest is spread evenly over them. mass: float32 [b], the probability that the teacher
    gave to the student's classes, by which the others have been divided: a row sums to 1.
    """

    is_there: NDArray[np.bool_]
    class_indices: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    elsewhere: NDArray[np.float32]
    mass: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Teacher:
    """A file of soft labels, read by a student whose classes may be others: they are told by name."""

    file: SoftLabelFile
    class_map: ClassMap

    @cached_property
    def student_index(self) -> NDArray[np.int64]:
        """int64 [teacher's classes], the student's class index; `num_classes` where the student lacks the class."""
        unknown, index_of = self.class_map.num_classes, self.class_map.index_of
        return np.array([index_of.get(name, unknown) for name in self.file.facts.class_names], dtype=np.int64)

    @cached_property
    def is_shared(self) -> NDArray[np.bool_]:
        """bool [student's classes], which of them the teacher knows."""
        return np.isin(np.arange(self.class_map.num_classes), self.student_index)

    def target(self, identities: Identities) -> SoftTarget:
        """The soft target of each sample: int64 [b] in."""
        stored = self.file.look_up(identities)
        class_indices = self.student_index[stored.class_indices]
        is_ours = class_indices < self.class_map.num_classes
        num_others = len(self.student_index) - stored.class_indices.shape[1]
        each = stored.rest / np.float32(max(num_others, 1))
        num_elsewhere = self.is_shared.sum() - is_ours.sum(1)
        probabilities = stored.probabilities * is_ours
        mass = probabilities.sum(1) + each * num_elsewhere.astype(np.float32)
        is_there = stored.is_there & (mass >= MIN_MASS)
        scale = np.divide(is_there, mass, where=is_there, out=np.zeros_like(mass))
        return SoftTarget(is_there, class_indices, probabilities * scale[:, None], each * scale, mass)


@dataclass(frozen=True)
class Coverage:
    """What soft labels give a split: the samples without one, and what to tell on the screen."""

    num_missing: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class SoftTargets:
    """The files that a student learns from, each with its weight; the weights sum to 1."""

    teachers: tuple[Teacher, ...]
    weights: tuple[float, ...]

    @property
    def temperature(self) -> float:
        """At which all teachers were softened, and the student must be."""
        return self.teachers[0].file.facts.temperature

    @property
    def digest(self) -> str:
        """Who the files are, in their order."""
        return digest([teacher.file.digest for teacher in self.teachers])

    def parents(self) -> list[tuple[Descent, Lineage]]:
        """The teachers, as ancestors of the student."""
        return [teacher.file.parentage() for teacher in self.teachers]

    def targets(self, identities: Identities) -> list[SoftTarget]:
        """What each teacher says of the samples: int64 [b] in. A sample that one of them lacks is missing in all."""
        targets = [teacher.target(identities) for teacher in self.teachers]
        is_there = np.logical_and.reduce([target.is_there for target in targets])
        return [
            SoftTarget(
                is_there,
                target.class_indices,
                target.probabilities * is_there[:, None],
                target.elsewhere * is_there,
                target.mass,
            )
            for target in targets
        ]

    def require_cover(self, split: Split, *, missing_budget: int) -> Coverage:
        """Look every sample of a split up, as training will; no picture is read. For the main process.

        Raises SoftLabelError where more than the budget have no soft label.
        """
        identities = split.identities
        is_there = np.zeros(len(identities), dtype=np.bool_)
        masses = np.zeros(len(self.teachers))
        for first in range(0, len(identities), _CHECKED_AT_ONCE):
            here = slice(first, first + _CHECKED_AT_ONCE)
            targets = self.targets(identities[here])
            is_there[here] = targets[0].is_there
            masses += [target.mass[target.is_there].sum(dtype=np.float64) for target in targets]
        missing = np.flatnonzero(~is_there)
        if len(missing) > missing_budget:
            keys = ", ".join(_key_at(split, int(place)) for place in missing[:_KEYS_TOLD])
            raise SoftLabelError(
                f"soft_labels.files: {len(missing)} of {len(identities)} {split.name} samples have no soft label ({keys}"
                f"{', …' if len(missing) > _KEYS_TOLD else ''}), soft_labels.missing_budget allows {missing_budget}; write soft labels "
                "of this dataset's split with `python -m aplantida_dist.soft_labels`"
            )
        num_found = len(identities) - len(missing)
        lines = [
            f"soft labels {teacher.file.path}: by {teacher.file.facts.teacher_path} without augmentation, top "
            f"{teacher.file.facts.num_kept} at temperature {teacher.file.facts.temperature:g}, weight {weight:.3g} · "
            f"{teacher.is_shared.sum()} of our {len(teacher.is_shared)} classes, {100 * mass / max(num_found, 1):.2f} % of its probability"
            for teacher, weight, mass in zip(self.teachers, self.weights, masses, strict=True)
        ]
        counted = f"soft labels: {num_found} of {len(identities)} {split.name} samples"
        return Coverage(len(missing), (*lines, counted + (f", {len(missing)} missing" if len(missing) else "")))


def open_soft_targets(paths: Sequence[Path], *, weights: Sequence[float] | None, class_map: ClassMap) -> SoftTargets:
    """Open the files for a student with these classes; without weights they count alike.

    Raises SoftLabelError where a file is not sound, shares no class with the student, or has another temperature than the first.
    """
    teachers = tuple(Teacher(open_soft_labels(path), class_map) for path in paths)
    for teacher in teachers:
        facts, first = teacher.file.facts, teachers[0].file
        if not teacher.is_shared.any():
            raise SoftLabelError(
                f"{teacher.file.path}: its teacher knows none of our {class_map.num_classes} classes (it has "
                f"{len(facts.class_names)}, such as {facts.class_names[0]!r}, ours are such as {class_map.class_names[0]!r}); "
                "use a teacher of the same plants"
            )
        if facts.temperature != first.facts.temperature:
            raise SoftLabelError(
                f"{teacher.file.path}: softened at temperature {facts.temperature:g}, {first.path} at "
                f"{first.facts.temperature:g}; soft labels that are mixed need one temperature: write one of them again"
            )
    chosen = [1.0] * len(teachers) if weights is None else list(weights)
    return SoftTargets(teachers, tuple(weight / sum(chosen) for weight in chosen))


def _key_at(split: Split, place: int) -> str:
    """The key of the sample at a place in the stored order."""
    ends = np.cumsum(split.shard_sizes)
    shard_index = int(np.searchsorted(ends, place, side="right"))
    return split.sample_keys(shard_index)[place - int(ends[shard_index] - split.shard_sizes[shard_index])]
