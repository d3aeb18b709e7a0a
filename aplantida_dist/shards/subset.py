"""The subset: a dataset made of the samples of another that meet a condition. The one file that puts selection and writer together."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from aplantida_dist.data.classmap import CLASSES_FILE, ClassMap, Parent
from aplantida_dist.data.dataset import Dataset, Split, open_dataset
from aplantida_dist.data.index import ShardError, read_member, read_metadata, read_metadata_bytes
from aplantida_dist.data.manifest import Manifest
from aplantida_dist.errors import UserError
from aplantida_dist.files import canonical_json, sha256_of_file
from aplantida_dist.pace import with_pace
from aplantida_dist.shards.account import Account
from aplantida_dist.shards.claim import claimed
from aplantida_dist.shards.licence import ANY_LICENCE, Licence, Requirement, count_licences, licence_inside
from aplantida_dist.shards.placement import placed, require_apart, require_free_place
from aplantida_dist.shards.report import save_report
from aplantida_dist.shards.selection import Criteria, SelectedSplit, Selection, SelectionUse, select
from aplantida_dist.shards.where import Condition
from aplantida_dist.shards.writer import Sample, ShardLimits, write_split

SUFFIX_OF_START = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}
"""What tells the three formats apart that a dataset may hold."""


class SubsetError(UserError):
    """A subset that was not asked for as one."""


@dataclass(frozen=True)
class SubsetOptions:
    """What the subset is to hold and how it is written. At least one of `conditions`, `classes_path` and `licence` asks for something.

    `classes_path` is a file with the name of one class a line; None stands for all classes of the parent.
    """

    conditions: tuple[Condition, ...]
    limits: ShardLimits
    replace: bool
    licence: Requirement = ANY_LICENCE
    classes_path: Path | None = None


def build_subset(parent_dir: Path, dataset_dir: Path, *, options: SubsetOptions) -> Account:
    """Make a dataset of the parent's samples that meet the options, whole or not at all; returns the account of it.

    Every photograph keeps its key, its split, its bytes and its metadata; samples keep the parent's order. The classes are
    those of which train keeps something, in the parent's order. Two passes: one over the metadata, one that copies, so that no
    picture is held. A shard is compared with its sha256 before it is copied from, since nothing else guards the metadata.
    """
    parent_dir, dataset_dir = parent_dir.absolute(), dataset_dir.absolute()
    require_apart(parent_dir, dataset_dir)
    require_free_place(dataset_dir, replace=options.replace)
    parent = open_dataset(parent_dir)
    criteria = _criteria_of(parent, options)
    selection = select(parent, criteria=criteria)
    class_map = ClassMap(
        tuple(parent.class_map.class_names[label] for label in selection.labels),
        Parent(parent.class_map.digest, selection.labels),
    )
    with claimed(dataset_dir), placed(dataset_dir, replace=options.replace) as partial_dir:
        class_map.save(partial_dir / CLASSES_FILE)
        manifests = tuple(
            _write(selected, partial_dir, class_map=class_map, labels=selection.labels, limits=options.limits)
            for selected in selection.splits
            if selected.num_samples
        )
        account = _account_of(parent, selection, criteria=criteria, class_map=class_map, manifests=manifests)
        save_report(account, partial_dir)
    return account


def _criteria_of(parent: Dataset, options: SubsetOptions) -> Criteria:
    texts = [condition.text for condition in options.conditions]
    labels = frozenset(range(parent.class_map.num_classes))
    if options.classes_path is not None:
        labels = _read_labels(options.classes_path, parent.class_map)
        texts.append(f"one of the {len(labels):,} classes of {options.classes_path.name}")
    if options.licence != ANY_LICENCE:
        texts.append(f"licence {options.licence}")
    if not texts:
        raise SubsetError(
            f"{parent.dataset_dir}: a subset asks for something; give --where, --classes or --require-license"
        )
    return Criteria(tuple(texts), labels, options.conditions, options.licence)


def _read_labels(path: Path, class_map: ClassMap) -> frozenset[int]:
    """The labels of the classes that a file names, one a line; blank lines count for nothing."""
    try:
        names = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SubsetError(f"{path}: cannot be read as a list of classes: {error}; give one name a line") from None
    unknown = [name for name in names if name not in class_map.index_of]
    if unknown or not names:
        close = get_close_matches(unknown[0], class_map.class_names) if unknown else []
        found = f"{unknown[0]!r} is no class of the parent" if unknown else "names no class"
        hint = f" (close to it: {', '.join(close)})" if close else ""
        raise SubsetError(f"{path}: {found}{hint}; name classes as its classes.json does, one a line")
    return frozenset(class_map.index_of[name] for name in names)


def _write(
    selected: SelectedSplit, dataset_dir: Path, *, class_map: ClassMap, labels: tuple[int, ...], limits: ShardLimits
) -> Manifest:
    name = selected.split.name
    samples = _read_samples(selected, label_of={label: index for index, label in enumerate(labels)})
    return write_split(
        with_pace(samples, total=selected.num_samples, doing=f"writing {name}"),
        dataset_dir / name,
        split=name,
        class_map_digest=class_map.digest,
        limits=limits,
        licence=licence_inside(selected.licences),
        parent=selected.split.digest,
        reencoding=selected.split.manifest.reencoding,
    )


def _read_samples(selected: SelectedSplit, *, label_of: dict[int, int]) -> Iterator[Sample]:
    """The samples that stay, in the parent's order, one at a time, under their new labels."""
    split = selected.split
    for shard_index, members in enumerate(selected.members):
        _require_undamaged(split, shard_index)
        index, path = split.read_index(shard_index), split.shard_path(shard_index)
        descriptor = split.open_shard(shard_index)
        try:
            for member_index in members.tolist():
                entry = index[member_index]
                member = read_member(descriptor, entry, shard_path=path)
                metadata = read_metadata_bytes(descriptor, index, member_index)
                if not metadata.startswith(b"{"):  # foreign tars may hold none, or JSON that is no object
                    metadata = canonical_json(read_metadata(descriptor, index, member_index))
                suffix = _suffix_of(member.content, shard_path=path, sample_key=member.sample_key)
                yield Sample(member.sample_key, suffix, member.content, label_of[int(entry["label"])], metadata)
        finally:
            os.close(descriptor)


def _suffix_of(image: bytes, *, shard_path: Path, sample_key: str) -> str:
    """The suffix that the bytes of a picture call for; the name that it has in a foreign tar may be cut or wrong."""
    for start, suffix in SUFFIX_OF_START.items():
        if image.startswith(start):
            return suffix
    raise ShardError(f"{shard_path}: sample {sample_key} is neither JPEG, PNG nor WebP; build the parent again")


def _require_undamaged(split: Split, shard_index: int) -> None:
    path = split.shard_path(shard_index)
    try:
        sha256 = sha256_of_file(path)
    except OSError as error:
        raise ShardError(
            f"{path}: cannot be read any more: {error.strerror}; leave the parent alone meanwhile"
        ) from error
    if sha256 != split.manifest.shards[shard_index].sha256:
        raise ShardError(
            f"{path}: has changed (its sha256 is not the manifest's), so a subset would pass the damage on as sound; "
            "run `python shards/verify.py` on the parent, then copy or rebuild it"
        )


def _account_of(
    parent: Dataset,
    selection: Selection,
    *,
    criteria: Criteria,
    class_map: ClassMap,
    manifests: tuple[Manifest, ...],
) -> Account:
    left_out = tuple(left_out for selected in selection.splits for left_out in selected.left_out)
    licences: Counter[Licence | None] = sum((selected.licences for selected in selection.splits), Counter())
    untrained = {one.class_name for one in left_out if one.reason == "untrained_class" and one.class_name is not None}
    return Account(
        source_name=parent.dataset_dir.name,
        counted="samples",
        seed=None,
        num_files=sum(selected.split.num_samples for selected in selection.splits),
        class_names=class_map.class_names,
        min_samples=1,
        classes_without_samples=(),
        manifests=manifests,
        left_out=left_out,
        licence_counts=count_licences(licences.elements()),
        metadata=None,
        kept_splits=None,
        groups=None,
        selection=SelectionUse(
            criteria=criteria.texts,
            num_classes=class_map.num_classes,
            num_parent_classes=parent.class_map.num_classes,
            num_not_selected=sum(selected.num_not_selected for selected in selection.splits),
            num_without_field=selection.num_without_field,
            untrained_classes=tuple(sorted(untrained)),
            absent_splits=tuple(s.split.name for s in selection.splits if not s.num_samples),
        ),
    )
