"""The builder: a folder of pictures becomes a dataset. The one file that puts source, audit, split, writer and account together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aplantida_dist.data.classmap import CLASSES_FILE, ClassMap
from aplantida_dist.data.manifest import SPLITS, Manifest
from aplantida_dist.errors import UserError
from aplantida_dist.seeds import derive
from aplantida_dist.shards.account import Account, GroupsUse, SplitsUse, save_account
from aplantida_dist.shards.audit import Candidate, Fault, audit_files, drop_copies, sample_key_of
from aplantida_dist.shards.earlier import read_splits
from aplantida_dist.shards.folder import Folder, read_folder
from aplantida_dist.shards.groups import Group, find_groups, leave_out_leaks, split_by_group
from aplantida_dist.shards.pace import with_pace
from aplantida_dist.shards.placement import placed, require_free_place
from aplantida_dist.shards.record import LeftOut, Record
from aplantida_dist.shards.writer import Sample, ShardLimits, write_split


class BuildError(UserError):
    """These pictures do not make a dataset."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build. `num_workers` processes decode (0: this one); the dataset's bytes do not depend on them.

    `keep_splits_of` is an earlier dataset whose photographs keep their split. Pictures whose looks differ in at most
    `near_distance` bits form a group, which stays in one split; None looks for no groups.
    """

    seed: int
    limits: ShardLimits
    num_workers: int
    replace: bool
    keep_splits_of: Path | None = None
    near_distance: int | None = None


def build_from_folder(folder_dir: Path, dataset_dir: Path, *, options: BuildOptions) -> Account:
    """Build a dataset from a folder of classes, whole or not at all; returns the account of it.

    Two passes over the files: the first decodes and hashes each, the second writes those that stay. No picture is held
    between them, so memory grows by the names and the metadata only.
    """
    folder_dir, dataset_dir = folder_dir.absolute(), dataset_dir.absolute()
    _require_apart(folder_dir, dataset_dir)
    require_free_place(dataset_dir, replace=options.replace)
    folder = read_folder(folder_dir)
    if not folder.records:
        raise BuildError(f"{folder_dir}: no class folder with a file in it; give one folder of pictures a class")
    kept = _read_kept_splits(folder, options=options)
    candidates, left_out = _audit(folder.records, options=options)
    groups = () if options.near_distance is None else find_groups(candidates, distance=options.near_distance)
    candidates, leaks = leave_out_leaks(candidates, groups=groups, kept=kept)
    candidates_of_split = _assign_splits(candidates, folder=folder, groups=groups, kept=kept, seed=options.seed)
    class_map = _class_map_of(candidates_of_split, folder, folder_dir=folder_dir)
    with placed(dataset_dir, replace=options.replace) as partial_dir:
        class_map.save(partial_dir / CLASSES_FILE)
        account = Account(
            source_name=folder_dir.name,
            seed=options.seed,
            num_files=len(folder.records) + len(folder.outside),
            class_names=class_map.class_names,
            classes_without_samples=tuple(sorted(set(folder.class_names) - set(class_map.class_names))),
            manifests=tuple(_write(candidates_of_split, partial_dir, class_map=class_map, options=options)),
            left_out=tuple(sorted((*folder.outside, *left_out, *leaks), key=lambda file: file.source)),
            metadata=folder.metadata,
            kept_splits=None if options.keep_splits_of is None else _use_of_splits(kept, candidates),
            groups=None if options.near_distance is None else _use_of_groups(groups, distance=options.near_distance),
        )
        save_account(account, partial_dir)
    return account


def _require_apart(folder_dir: Path, dataset_dir: Path) -> None:
    """The dataset must not lie among the pictures, nor the pictures inside a dataset that a replacement would delete."""
    source, out = folder_dir.resolve(), dataset_dir.resolve()
    if source == out or source in out.parents or out in source.parents:
        raise BuildError(
            f"{dataset_dir}: lies inside {folder_dir}, or around it; choose an --out that is apart from the pictures"
        )


def _read_kept_splits(folder: Folder, *, options: BuildOptions) -> dict[str, str]:
    """The sample key → split of the earlier dataset, empty where none is kept."""
    if options.keep_splits_of is None:
        return {}
    if folder.splits:
        raise BuildError(
            f"{options.keep_splits_of}: its splits cannot be kept, since the folder of pictures decides them itself; "
            "leave out --keep-splits, or give one folder a class"
        )
    return read_splits(options.keep_splits_of)


def _use_of_splits(kept: Mapping[str, str], candidates: Sequence[Candidate]) -> SplitsUse:
    num_kept = sum(candidate.picture.sample_key in kept for candidate in candidates)
    return SplitsUse(num_kept=num_kept, num_gone=len(kept) - num_kept)


def _use_of_groups(groups: Sequence[Group], *, distance: int) -> GroupsUse:
    return GroupsUse(
        distance=distance,
        num_groups=len(groups),
        num_photographs=sum(len(group.members) for group in groups),
        disagreeing=tuple(
            tuple(sorted(member.record.source for member in group.members))
            for group in groups
            if len(group.class_names) > 1
        ),
    )


def _audit(records: Sequence[Record], *, options: BuildOptions) -> tuple[list[Candidate], list[LeftOut]]:
    """Decode every record; return those that stay, one of each picture, and those that do not."""
    candidates: list[Candidate] = []
    left_out: list[LeftOut] = []
    paths = [record.path for record in records]
    findings = audit_files(paths, num_workers=options.num_workers, with_looks=options.near_distance is not None)
    paced = with_pace(findings, total=len(records), doing="decoding every picture")
    for record, finding in zip(records, paced, strict=True):
        if isinstance(finding, Fault):
            left_out.append(LeftOut(record.source, record.class_name, finding.reason, finding.detail))
        else:
            candidates.append(Candidate(record, finding))
    kept, copies = drop_copies(candidates)
    return kept, left_out + copies


def _assign_splits(
    candidates: Sequence[Candidate], *, folder: Folder, groups: Sequence[Group], kept: Mapping[str, str], seed: int
) -> dict[str, list[Candidate]]:
    """The candidates of each split, in the order in which they will be written: by a digest, so that classes are mixed."""
    chosen: dict[str, str] = {}
    if not folder.splits:
        chosen = split_by_group(candidates, groups=groups, kept=kept, seed=seed)
    of_split: defaultdict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        of_split[candidate.record.split or chosen[candidate.picture.sample_key]].append(candidate)
    for members in of_split.values():
        members.sort(key=lambda member: (derive(seed, "order", member.picture.sample_key), member.picture.sample_key))
    return {split: of_split[split] for split in SPLITS if split in of_split}


def _class_map_of(of_split: dict[str, list[Candidate]], folder: Folder, *, folder_dir: Path) -> ClassMap:
    """The sorted names of the classes that train holds. BuildError where a split is empty or holds a class that train does not."""
    empty = [split for split in ("train", *folder.splits) if not of_split.get(split)]
    if empty:
        raise BuildError(
            f"{folder_dir}: not one picture of {empty[0]} can be used; check the folder, and try one file with an image viewer"
        )
    classes = {split: {member.record.class_name for member in members} for split, members in of_split.items()}
    unknown = sorted(set().union(*classes.values()) - classes["train"])
    if unknown:
        raise BuildError(
            f"{folder_dir}: no usable picture is left in train for {len(unknown)} classes of val or test ({', '.join(unknown[:10])}); "
            "add train pictures of them that are in no other split, or remove these classes"
        )
    return ClassMap(tuple(sorted(classes["train"])))


def _write(
    of_split: dict[str, list[Candidate]], dataset_dir: Path, *, class_map: ClassMap, options: BuildOptions
) -> Iterator[Manifest]:
    for split, members in of_split.items():
        samples = read_samples(members, class_map)
        yield write_split(
            with_pace(samples, total=len(members), doing=f"writing {split}"),
            dataset_dir / split,
            split=split,
            class_map_digest=class_map.digest,
            limits=options.limits,
        )


def read_samples(members: Sequence[Candidate], class_map: ClassMap) -> Iterator[Sample]:
    """Read the pictures again, one at a time. BuildError where a file is no longer what was audited."""
    for member in members:
        path, picture = Path(member.record.path), member.picture
        try:
            image = path.read_bytes()
        except OSError as error:
            raise BuildError(
                f"{path}: cannot be read any more: {error.strerror}; leave the pictures alone and build again"
            ) from error
        if sample_key_of(image) != picture.sample_key:
            raise BuildError(f"{path}: changed while the dataset was built; leave the pictures alone and build again")
        label = class_map.index_of[member.record.class_name]
        yield Sample(picture.sample_key, picture.suffix, image, label, member.record.metadata)
