"""The builder: a source of pictures becomes a dataset. The one file that puts source, audit, split, writer and account together."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aplantida_dist.data.classmap import CLASSES_FILE, ClassMap
from aplantida_dist.data.manifest import SPLITS, Manifest, Reencoding
from aplantida_dist.errors import UserError
from aplantida_dist.seeds import derive
from aplantida_dist.shards.account import Account, GroupsUse, SplitsUse, save_account
from aplantida_dist.shards.audit import Candidate, Fault, audit_places, drop_copies
from aplantida_dist.shards.claim import claimed
from aplantida_dist.shards.earlier import read_splits
from aplantida_dist.shards.groups import Group, find_groups, leave_out_leaks, split_by_group
from aplantida_dist.shards.licence import ANY_LICENCE, UNKNOWN, Requirement, licence_inside
from aplantida_dist.shards.pace import with_pace
from aplantida_dist.shards.placement import placed, require_free_place, require_room
from aplantida_dist.shards.record import LeftOut, Record
from aplantida_dist.shards.second_reading import Audited, read_again
from aplantida_dist.shards.source import Source
from aplantida_dist.shards.writer import Sample, ShardLimits, num_bytes_of_sample, write_split


class BuildError(UserError):
    """These pictures do not make a dataset."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build. `num_workers` processes decode (0: this one); the dataset's bytes do not depend on them.

    `keep_splits_of` is an earlier dataset whose photographs keep their split. Pictures whose looks differ in at most
    `near_distance` bits form a group, which stays in one split; None looks for no groups. `reencoding` makes pictures smaller
    as they are written, under the keys of their originals; None keeps every byte.
    """

    seed: int
    limits: ShardLimits
    num_workers: int
    replace: bool
    licence: Requirement = ANY_LICENCE
    keep_splits_of: Path | None = None
    near_distance: int | None = None
    reencoding: Reencoding | None = None


def build_dataset(source: Source, dataset_dir: Path, *, options: BuildOptions) -> Account:
    """Build a dataset from what a source lists, whole or not at all; returns the account of it.

    Two passes over the files: the first decodes and hashes each, the second writes those that stay. No picture is held
    between them, so memory grows by the names and the metadata only.
    """
    dataset_dir = dataset_dir.absolute()
    _require_apart(source.pictures_dir, dataset_dir)
    require_free_place(dataset_dir, replace=options.replace)
    with claimed(dataset_dir):
        return _build(source, dataset_dir, options=options)


def _build(source: Source, dataset_dir: Path, *, options: BuildOptions) -> Account:
    require_free_place(dataset_dir, replace=options.replace)
    if not source.records:
        raise BuildError(_told_of_nothing(source))
    kept = _read_kept_splits(source, options=options)
    licensed, unlicensed = _require_licence(source.records, options.licence)
    candidates, unusable = _audit(licensed, options=options)
    groups = () if options.near_distance is None else find_groups(candidates, distance=options.near_distance)
    candidates, leaks = leave_out_leaks(candidates, groups=groups, kept=kept)
    left_out = tuple(sorted((*source.outside, *unlicensed, *unusable, *leaks), key=_natural_order))
    of_split = _assign_splits(candidates, given=source.splits, groups=groups, kept=kept, seed=options.seed)
    class_map = _class_map_of(of_split, source, left_out=left_out)
    if options.reencoding is None:
        require_room(dataset_dir, num_bytes=_num_bytes_of(candidates))
    with placed(dataset_dir, replace=options.replace) as partial_dir:
        class_map.save(partial_dir / CLASSES_FILE)
        account = Account(
            source_name=source.name,
            counted=source.counted,
            seed=options.seed,
            num_files=len(source.records) + len(source.outside),
            class_names=class_map.class_names,
            classes_without_samples=tuple(sorted(set(source.class_names) - set(class_map.class_names))),
            manifests=tuple(_write(of_split, partial_dir, class_map=class_map, options=options)),
            left_out=left_out,
            licence_counts=_licence_counts_of(candidates),
            metadata=source.metadata,
            kept_splits=None if options.keep_splits_of is None else _use_of_splits(kept, candidates),
            groups=None if options.near_distance is None else _use_of_groups(groups, distance=options.near_distance),
        )
        save_account(account, partial_dir)
    return account


def _require_apart(pictures_dir: Path, dataset_dir: Path) -> None:
    """The dataset must not lie among the pictures, nor the pictures inside a dataset that a replacement would delete."""
    source, out = pictures_dir.resolve(), dataset_dir.resolve()
    if source == out or source in out.parents or out in source.parents:
        raise BuildError(
            f"{dataset_dir}: lies inside {pictures_dir}, or around it; choose an --out that is apart from the pictures"
        )


def _told_of_nothing(source: Source) -> str:
    if source.counted == "files":
        return f"{source.pictures_dir}: no class folder with a file in it; give one folder of pictures a class"
    example = f", first {source.outside[0].source}: {source.outside[0].detail}" if source.outside else ""
    return (
        f"{source.pictures_dir}: holds the picture of none of {len(source.outside)} records in {source.name}{example}; "
        "give their folder as --image-dir"
    )


def _natural_order(left_out: LeftOut) -> list[str | int]:
    """By name, figures by their value: line 9 before line 10."""
    parts: list[str | int] = list(re.split(r"([0-9]+)", left_out.source))
    parts[1::2] = map(int, parts[1::2])
    return parts


def _require_licence(records: Sequence[Record], requirement: Requirement) -> tuple[list[Record], list[LeftOut]]:
    """The records whose licence is accepted, and those that are left out with the text that their source states."""
    accepted: list[Record] = []
    left_out: list[LeftOut] = []
    for record in records:
        if requirement.is_met_by(record.licence or UNKNOWN):
            accepted.append(record)
        else:
            stated = json.loads(record.metadata).get("license")
            detail = str(stated) if stated else "no licence is stated"
            left_out.append(record.left_out("licence", detail))
    return accepted, left_out


def _read_kept_splits(source: Source, *, options: BuildOptions) -> dict[str, str]:
    """The sample key → split of the earlier dataset, empty where none is kept."""
    if options.keep_splits_of is None:
        return {}
    if source.splits:
        raise BuildError(
            f"{options.keep_splits_of}: its splits cannot be kept, since the source of pictures decides them itself; "
            "leave out --keep-splits, or give pictures without splits of their own"
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
    places = [record.place for record in records]
    findings = audit_places(places, num_workers=options.num_workers, with_looks=options.near_distance is not None)
    paced = with_pace(findings, total=len(records), doing="decoding every picture")
    for record, finding in zip(records, paced, strict=True):
        if isinstance(finding, Fault):
            left_out.append(record.left_out(finding.reason, finding.detail))
        else:
            candidates.append(Candidate(record, finding))
    kept, copies = drop_copies(candidates)
    return kept, left_out + copies


def _num_bytes_of(candidates: Sequence[Candidate]) -> int:
    """What the samples will take in tars."""
    return sum(
        num_bytes_of_sample(
            num_image_bytes=candidate.picture.num_bytes, num_metadata_bytes=len(candidate.record.metadata)
        )
        for candidate in candidates
    )


def _licence_counts_of(candidates: Sequence[Candidate]) -> dict[str, int]:
    """Samples of each licence, by its name; empty where no sample states one."""
    licences = [candidate.record.licence for candidate in candidates]
    counts = Counter((licence or UNKNOWN).name for licence in licences) if any(licences) else Counter[str]()
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _assign_splits(
    candidates: Sequence[Candidate],
    *,
    given: tuple[str, ...],
    groups: Sequence[Group],
    kept: Mapping[str, str],
    seed: int,
) -> dict[str, list[Candidate]]:
    """The candidates of each split, in the order in which they will be written: by a digest, so that classes are mixed."""
    chosen: dict[str, str] = {}
    if not given:
        chosen = split_by_group(candidates, groups=groups, kept=kept, seed=seed)
    of_split: defaultdict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        of_split[candidate.record.split or chosen[candidate.picture.sample_key]].append(candidate)
    for members in of_split.values():
        members.sort(key=lambda member: (derive(seed, "order", member.picture.sample_key), member.picture.sample_key))
    return {split: of_split[split] for split in SPLITS if split in of_split}


def _class_map_of(of_split: dict[str, list[Candidate]], source: Source, *, left_out: Sequence[LeftOut]) -> ClassMap:
    """The sorted names of the classes that train holds. BuildError where a split is empty or holds a class that train does not."""
    empty = [split for split in ("train", *source.splits) if not of_split.get(split)]
    if empty:
        reasons = ", ".join(
            f"{reason} {count:,}" for reason, count in Counter(one.reason for one in left_out).most_common()
        )
        raise BuildError(
            f"{source.pictures_dir}: not one picture of {empty[0]} can be used (left out: {reasons or 'nothing'}); "
            "check the source, and try one file with an image viewer"
        )
    classes = {split: {member.record.class_name for member in members} for split, members in of_split.items()}
    unknown = sorted(set().union(*classes.values()) - classes["train"])
    if unknown:
        raise BuildError(
            f"{source.pictures_dir}: no usable picture is left in train for {len(unknown)} classes of val or test ({', '.join(unknown[:10])}); "
            "add train pictures of them that are in no other split, or remove these classes"
        )
    return ClassMap(tuple(sorted(classes["train"])))


def _write(
    of_split: dict[str, list[Candidate]], dataset_dir: Path, *, class_map: ClassMap, options: BuildOptions
) -> Iterator[Manifest]:
    for split, members in of_split.items():
        samples = read_samples(members, class_map, reencoding=options.reencoding, num_workers=options.num_workers)
        yield write_split(
            with_pace(samples, total=len(members), doing=f"writing {split}"),
            dataset_dir / split,
            split=split,
            class_map_digest=class_map.digest,
            limits=options.limits,
            licence=licence_inside(member.record.licence for member in members),
            reencoding=options.reencoding,
        )


def read_samples(
    members: Sequence[Candidate], class_map: ClassMap, *, reencoding: Reencoding | None = None, num_workers: int = 0
) -> Iterator[Sample]:
    """Read the pictures again, a few at a time. ChangedError where a file is no longer what was audited."""
    audited = (Audited(member.record.place, member.picture.sample_key, member.picture.suffix) for member in members)
    images = read_again(audited, reencoding=reencoding, num_workers=num_workers)
    for member, encoded in zip(members, images, strict=True):
        label = class_map.index_of[member.record.class_name]
        yield Sample(member.picture.sample_key, encoded.suffix, encoded.image, label, member.record.metadata)
