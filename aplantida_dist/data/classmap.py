"""The class map: the ordered class names that every label of a dataset and every head of a model is an index into."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from aplantida_dist.data.address import Place
from aplantida_dist.errors import UserError
from aplantida_dist.files import digest, read_json, write_json

CLASSES_FILE = "classes.json"


class ClassMapError(UserError):
    """Two class maps differ, or a file is not a class map."""


@dataclass(frozen=True)
class Parent:
    """The class map that a subset's was taken from: its digest, and the label there of each class here, ascending."""

    digest: str
    labels: tuple[int, ...]


@dataclass(frozen=True)
class ClassMap:
    """Ordered, distinct class names; `class_names[label]` is what a label means. Never empty.

    `parent` is None but in a subset; it does not change what labels mean, and is no part of the digest.
    """

    class_names: tuple[str, ...]
    parent: Parent | None = None

    @cached_property
    def digest(self) -> str:
        """The sha256 of the ordered names: equal digests mean that every label means the same."""
        return digest(list(self.class_names))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def index_of(self) -> dict[str, int]:
        """class_name → class_index."""
        return {name: index for index, name in enumerate(self.class_names)}

    def shared_with(self, other: ClassMap) -> tuple[str, ...]:
        """The names that both have, in the order of this one."""
        return tuple(name for name in self.class_names if name in other.index_of)

    def missing_in(self, other: ClassMap) -> tuple[str, ...]:
        """The names that the other lacks, in the order of this one."""
        return tuple(name for name in self.class_names if name not in other.index_of)

    def save(self, path: Path) -> None:
        """Write classes.json, whole or not at all."""
        content = {"version": 1, "digest": self.digest, "classes": list(self.class_names)}
        if self.parent is not None:
            content["parent"] = {"digest": self.parent.digest, "labels": list(self.parent.labels)}
        write_json(path, content)

    def require_same(self, other: ClassMap, *, ours: str, theirs: str) -> None:
        """Raise ClassMapError unless both maps give every label the same meaning; `ours` and `theirs` name their sources."""
        if self.digest == other.digest:
            return
        pairs = zip(self.class_names, other.class_names, strict=False)
        where = next(
            (f"; the first difference is class {i}: {a!r} against {b!r}" for i, (a, b) in enumerate(pairs) if a != b),
            "",
        )
        raise ClassMapError(
            f"{theirs} has {other.num_classes} classes that are not the {self.num_classes} of {ours}{where}; "
            "labels would change their meaning: use the dataset that the model was trained on, or one built with its classes.json"
        )


def load_class_map(path: Place) -> ClassMap:
    """Read classes.json and check it against its own digest."""
    remedy = "build the dataset with `python shards/build.py`"
    content = read_json(path, what="class map", remedy=remedy)
    names = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ClassMapError(f"{path}: expected a non-empty list of names under 'classes'; {remedy}")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ClassMapError(f"{path}: class {twice!r} stands more than once; {remedy}")
    class_map = ClassMap(tuple(names), _parent_of(content, path, num_classes=len(names)))
    if content.get("digest") != class_map.digest:
        raise ClassMapError(f"{path}: the names do not match their digest, so the file was edited; {remedy}")
    return class_map


def _parent_of(content: dict[str, Any], path: Place, *, num_classes: int) -> Parent | None:
    """What classes.json declares of the class map it was taken from. Whether the names stand there only the parent can tell."""
    match content:
        case {"parent": {"digest": str(parent_digest), "labels": [*labels]}}:
            are_labels = len(labels) == num_classes and all(type(label) is int for label in labels)  # True is no label
            if are_labels and all(label < following for label, following in pairwise([-1, *labels])):
                return Parent(parent_digest, tuple(labels))
        case {"parent": _}:
            pass
        case _:
            return None
    raise ClassMapError(
        f"{path}: 'parent' must hold a digest and one ascending label of the parent for each of the {num_classes} classes; "
        "make the subset again with `python shards/build.py --from-dataset`"
    )
