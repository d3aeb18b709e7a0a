"""The selection of a subset: which samples of the parent stay, decided from their metadata before any picture is read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.data.dataset import Dataset, Split
from aplantida_dist.data.index import read_key, read_metadata
from aplantida_dist.data.manifest import SPLITS
from aplantida_dist.errors import UserError
from aplantida_dist.pace import with_pace
from aplantida_dist.shards.fields import Fields
from aplantida_dist.shards.licence import UNKNOWN, Licence, Requirement, licence_of, stated_licence
from aplantida_dist.shards.place import Place
from aplantida_dist.shards.record import LeftOut, Reason
from aplantida_dist.shards.where import Condition


class SelectionError(UserError):
    """Conditions that leave no subset."""


@dataclass(frozen=True)
class Criteria:
    """What a photograph must meet: its class is one of these labels of the parent, every condition, and the licence.

    `texts` says what was asked for, as it was written.
    """

    texts: tuple[str, ...]
    labels: frozenset[int]
    conditions: tuple[Condition, ...]
    licence: Requirement


@dataclass(frozen=True)
class SelectedSplit:
    """What of a split stays: for each shard the positions in its index, int64, ascending; and the licences of these samples.

    The samples that no one asked for are counted and not listed, since a region of a million leaves most of it out.
    """

    split: Split
    members: tuple[NDArray[np.int64], ...]
    labels: frozenset[int]
    licences: Counter[Licence | None]
    left_out: tuple[LeftOut, ...]
    num_not_selected: int

    @property
    def num_samples(self) -> int:
        return sum(len(members) for members in self.members)


@dataclass(frozen=True)
class Selection:
    """What of a dataset stays. `num_without_field` counts the samples that lack a field of a condition, where any do."""

    splits: tuple[SelectedSplit, ...]
    labels: tuple[int, ...]
    num_without_field: dict[str, int]


@dataclass(frozen=True)
class SelectionUse:
    """What a subset asked of its parent, as it was written, and what that left.

    `num_not_selected` samples were not asked for; they are counted and not listed. `absent_splits` are those of the parent of
    which nothing stays. `num_without_field` counts samples of the parent that lack a field of a condition.
    """

    criteria: tuple[str, ...]
    num_classes: int
    num_parent_classes: int
    num_not_selected: int
    num_without_field: dict[str, int]
    untrained_classes: tuple[str, ...]
    absent_splits: tuple[str, ...]

    def remarks(self, *, num_left_out: int) -> list[str]:
        """What a reader of the report must know of it, one line each."""
        everything = "" if num_left_out else ", which every sample of the parent meets"
        lines = [
            f"asked for: {' and '.join(self.criteria)}{everything}",
            f"{self.num_classes:,} of the {self.num_parent_classes:,} classes of the parent stay, in its order",
        ]
        if names := self.untrained_classes:
            shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
            lines.append(
                f"{len(names):,} classes keep photographs in val or test but none in train, so these are left out: {shown}"
            )
        lines += [f"nothing of {split} stays, so there is no {split}" for split in self.absent_splits]
        lines += [f"{count:,} samples of the parent have no {field}" for field, count in self.num_without_field.items()]
        return lines


def select(parent: Dataset, *, criteria: Criteria) -> Selection:
    """Read the metadata of every sample once and decide which stay; no picture is read and no metadata is kept.

    `labels` of the result are the parent's labels that train still holds, ascending: a photograph of val or test of another
    class is left out as `untrained_class`. Raises WhereError where a condition names what no sample has, SelectionError where
    train keeps nothing.
    """
    fields = Fields(criteria.conditions)
    train = _select_split(parent, "train", criteria=criteria, trained=criteria.labels, fields=fields)
    # A folder without its manifest is a damaged split, which is an error; absent is only what is not there at all.
    others = [split for split in SPLITS if split != "train" and (parent.dataset_dir / split).exists()]
    measured = [
        _select_split(parent, split, criteria=criteria, trained=train.labels, fields=fields) for split in others
    ]
    fields.require()
    if not train.num_samples:
        raise SelectionError(
            f"{parent.dataset_dir}: not one sample of train meets {' and '.join(criteria.texts)}, so there is no class to train; "
            "ask for less (several values of one field are written FIELD=A,B)"
        )
    lacking = {condition.field: fields.num_without(condition.field) for condition in criteria.conditions}
    return Selection(
        splits=(train, *measured),
        labels=tuple(sorted(train.labels)),
        num_without_field={field: count for field, count in lacking.items() if count},
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One sample of the parent; its shard is open until the next one is asked for."""

    shard_index: int
    member_index: int
    label: int
    metadata: dict[str, Any]
    descriptor: int
    entry: Any

    def left_out(self, split: Split, reason: Reason, class_name: str) -> LeftOut:
        path = split.shard_path(self.shard_index)
        key = read_key(self.descriptor, self.entry, shard_path=path)
        place = Place(str(path), int(self.entry["offset"]), int(self.entry["length"]))
        detail = stated_licence(self.metadata) if reason == "licence" else ""
        return LeftOut(f"{split.name}/{key}", class_name, reason, detail, place)


def _select_split(
    parent: Dataset, name: str, *, criteria: Criteria, trained: frozenset[int], fields: Fields
) -> SelectedSplit:
    split = parent.open_split(name)
    members: list[list[int]] = [[] for _ in split.manifest.shards]
    labels: set[int] = set()
    licences: Counter[Licence | None] = Counter()
    left_out: list[LeftOut] = []
    num_not_selected = 0
    paced = with_pace(_read_candidates(split), total=split.num_samples, doing=f"reading the metadata of {name}")
    for candidate in paced:
        fields.add(candidate.metadata)
        reason = _why_left_out(candidate, criteria=criteria, trained=trained)
        if reason is None:
            members[candidate.shard_index].append(candidate.member_index)
            labels.add(candidate.label)
            licences[licence_of(candidate.metadata)] += 1
        elif reason == "not_selected":
            num_not_selected += 1
        else:
            left_out.append(candidate.left_out(split, reason, parent.class_map.class_names[candidate.label]))
    return SelectedSplit(
        split=split,
        members=tuple(np.array(positions, dtype=np.int64) for positions in members),
        labels=frozenset(labels),
        licences=licences,
        left_out=tuple(left_out),
        num_not_selected=num_not_selected,
    )


def _read_candidates(split: Split) -> Iterator[_Candidate]:
    """Every sample of a split in the manifest's order, with its metadata."""
    for shard_index in range(len(split.manifest.shards)):
        index = split.read_index(shard_index)
        descriptor = split.open_shard(shard_index)
        try:
            for member_index, entry in enumerate(index):
                metadata = read_metadata(descriptor, index, member_index)
                yield _Candidate(shard_index, member_index, int(entry["label"]), metadata, descriptor, entry)
        finally:
            os.close(descriptor)


def _why_left_out(candidate: _Candidate, *, criteria: Criteria, trained: frozenset[int]) -> Reason | None:
    """The first reason for which a sample does not stay; None where it does."""
    asked_for = candidate.label in criteria.labels
    if not asked_for or not all(condition.is_met_by(candidate.metadata) for condition in criteria.conditions):
        return "not_selected"
    if not criteria.licence.is_met_by(licence_of(candidate.metadata) or UNKNOWN):
        return "licence"
    return None if candidate.label in trained else "untrained_class"
