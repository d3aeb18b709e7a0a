"""Teachers: frozen models of other runs that look at the student's pictures, and how much of what it learns they know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aplantida_dist.ancestor import checkpoint_at, class_map_of, what_is_at
from aplantida_dist.checkpoint import Weights, load_model_state
from aplantida_dist.config import Config
from aplantida_dist.config_file import load_config
from aplantida_dist.data.classmap import CLASSES_FILE, ClassMap
from aplantida_dist.data.dataset import Split
from aplantida_dist.errors import UserError
from aplantida_dist.files import digest, write_json
from aplantida_dist.lineage import Descent, Lineage
from aplantida_dist.model import Normalize, PixelConvention, pixel_convention
from aplantida_dist.run_folder import CONFIG_FILE
from aplantida_dist.world import World

TEACHERS_FILE = "teachers.json"
MIN_SHARED = 2
"""Classes that a teacher must share with its student: over a single one its softmax is 1, whatever the picture."""


class TeacherError(UserError):
    """What distillation.teachers names is not there, cannot be built, or has nothing to teach this student."""


@dataclass(frozen=True)
class Coverage:
    """What a teacher knows of what its student learns: class names by who has them, and the train samples whose label it has."""

    shared: tuple[str, ...]
    student_only: tuple[str, ...]
    teacher_only: tuple[str, ...]
    known_samples: int
    num_samples: int


@dataclass(frozen=True)
class Teacher:
    """A frozen model in evaluation mode, as its own run trained it: its classes, its side in pixels, its pixel convention.

    `weight` is how much it counts beside the others, `coverage` what it knows of what this student learns.
    """

    descent: Descent
    lineage: Lineage
    class_map: ClassMap
    model: nn.Module
    model_name: str
    image_size: int
    pixels: PixelConvention
    weight: float
    coverage: Coverage


class Teachers:
    """Teachers at work on this rank's device. Without any, `look_at` returns an empty tuple and costs nothing."""

    def __init__(self, sights: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self.sights = sights

    def look_at(self, images: Tensor) -> tuple[Tensor, ...]:
        """What each teacher makes of the student's pictures, uint8 [b, 3, h, w]: logits float [b, its classes], without gradient."""
        with torch.no_grad():
            return tuple(sight(images) for sight in self.sights)


def open_teacher(
    path: Path,
    *,
    weights: Weights,
    weight: float,
    class_map: ClassMap,
    train_split: Split,
    build: Callable[[Config, int], nn.Module],
) -> Teacher:
    """Read a teacher from a run folder (its best checkpoint) or a folder below its checkpoints/, for a student of these classes.

    `weights` says which of the checkpoint's two sets. `build` makes the model of a config for so many classes; it gets the config and the number of the teacher's own run.
    Raises TeacherError.
    """
    try:
        checkpoint = checkpoint_at(path)
        if checkpoint is None:
            raise TeacherError(f"{path}: {what_is_at(path)}; name a run folder or a folder below its checkpoints/")
        run_dir = checkpoint.path.parent.parent
        own_map = class_map_of(checkpoint)
        if own_map is None:
            raise TeacherError(f"{run_dir / CLASSES_FILE} is missing; name a checkpoint below the folder of its run")
        config = load_config(run_dir / CONFIG_FILE)
        model = build(config, own_map.num_classes)
        load_model_state(model, checkpoint, weights)
        coverage = _cover(checkpoint.path, own_map, class_map=class_map, train_split=train_split)
    except UserError as error:
        raise TeacherError(f"distillation.teachers: {error}") from error
    return Teacher(
        descent=Descent(str(checkpoint.path), checkpoint.digest),
        lineage=checkpoint.lineage(),
        class_map=own_map,
        model=model.eval().requires_grad_(False),
        model_name=config.model.name,
        image_size=config.data.image_size,
        pixels=pixel_convention(model),
        weight=weight,
        coverage=coverage,
    )


def _cover(path: Path, own_map: ClassMap, *, class_map: ClassMap, train_split: Split) -> Coverage:
    """Hold a teacher's classes against what its student is to learn; TeacherError where it knows nothing of it."""
    shared = class_map.shared_with(own_map)
    counts = train_split.counts_of_classes(class_map.num_classes)
    known_samples = sum(counts[class_map.index_of[name]] for name in shared)
    if len(shared) < MIN_SHARED or known_samples == 0:
        raise TeacherError(
            f"{path} knows {len(shared)} of the student's {class_map.num_classes} classes and the labels of {known_samples} of "
            f"{train_split.num_samples} train samples, expected at least {MIN_SHARED} classes and one sample; classes are matched "
            "by name: name a teacher of these"
        )
    return Coverage(
        shared=shared,
        student_only=class_map.missing_in(own_map),
        teacher_only=own_map.missing_in(class_map),
        known_samples=known_samples,
        num_samples=train_split.num_samples,
    )


def digest_of(teachers: Sequence[Teacher]) -> str:
    """The sha256 that says who the teachers are, in their order; where they lie is no part of it."""
    return digest([teacher.descent.digest for teacher in teachers])


def seat(teachers: Sequence[Teacher], world: World) -> Teachers:
    """Put teachers on this rank's device, under the run's precision."""
    return Teachers([_sight(teacher, world) for teacher in teachers])


def _sight(teacher: Teacher, world: World) -> Callable[[Tensor], Tensor]:
    model, normalize = world.prepare_for_evaluation(teacher.model), Normalize(teacher.pixels, world.device)

    def look(images: Tensor) -> Tensor:
        fitted = resize(images, side=teacher.image_size, interpolation=teacher.pixels.interpolation)
        logits: Tensor = model(normalize(fitted))
        return logits

    return look


def resize(images: Tensor, *, side: int, interpolation: str) -> Tensor:
    """Pictures of another size, antialiased as PIL does it, 0 … 255 and unrounded: [b, 3, h, w] → float32 [b, 3, side, side].

    Pictures of this size come back as they are.
    """
    if images.shape[-2:] == (side, side):
        return images
    resized = functional.interpolate(images.float(), size=(side, side), mode=interpolation, antialias=True)
    return resized.clamp_(0.0, 255.0)  # bicubic overshoots at edges


def coverage_line(teacher: Teacher, *, image_size: int) -> str:
    """A teacher and its coverage, for the screen. `image_size` is the student's."""
    coverage = teacher.coverage
    resized = "" if teacher.image_size == image_size else f", resized from the student's {image_size}"
    return (
        f"teacher {teacher.descent.path} ({teacher.descent.digest[:12]}), weight {teacher.weight:g}: {teacher.model_name} at "
        f"{teacher.image_size} px{resized} · knows {len(coverage.shared)} of {len(coverage.shared) + len(coverage.student_only)} classes, "
        f"the labels of {coverage.known_samples} of {coverage.num_samples} train samples "
        f"({100 * coverage.known_samples / coverage.num_samples:.1f} %)"
    )


def write_teachers(run_dir: Path, teachers: Sequence[Teacher]) -> None:
    """Write teachers.json into the run folder: who they are, what they had seen, what they know. For the main process."""
    content = [
        {
            **asdict(teacher.descent),
            "model": teacher.model_name,
            "image_size": teacher.image_size,
            "weight": teacher.weight,
            "lineage": teacher.lineage.facts(),
            **_facts(teacher.coverage),
        }
        for teacher in teachers
    ]
    write_json(run_dir / TEACHERS_FILE, {"teachers": content})


def _facts(coverage: Coverage) -> dict[str, Any]:
    """Coverage as shares, and the names that only one side has; the shared ones are the others of classes.json."""
    return {
        "class_share": len(coverage.shared) / (len(coverage.shared) + len(coverage.student_only)),
        "sample_share": coverage.known_samples / coverage.num_samples,
        "num_shared_classes": len(coverage.shared),
        "known_samples": coverage.known_samples,
        "num_samples": coverage.num_samples,
        "student_only": list(coverage.student_only),
        "teacher_only": list(coverage.teacher_only),
    }
