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
from aplantida_dist.pace import with_pace
from aplantida_dist.seeds import derive
from aplantida_dist.shards.account import Account, GroupsUse, SplitsUse
from aplantida_dist.shards.audit import MIN_SIDE, Candidate, Fault, audit_places, keys_of_places
from aplantida_dist.shards.claim import claimed
from aplantida_dist.shards.copies import drop_copies, leave_out_refused, part_by_licence
from aplantida_dist.shards.earlier import read_splits
from aplantida_dist.shards.groups import Group, find_groups, leave_out_leaks, split_by_group
from aplantida_dist.shards.licence import ANY_LICENCE, Requirement, count_licences, licence_inside, stated_licence
from aplantida_dist.shards.placement import placed, require_apart, require_free_place, require_room
from aplantida_dist.shards.record import LeftOut, Record
from aplantida_dist.shards.report import save_report
from aplantida_dist.shards.scarcity import leave_out_few
from aplantida_dist.shards.second_reading import Audited, read_again
from aplantida_dist.shards.source import Source
from aplantida_dist.shards.tar_index import require_unchanged
from aplantida_dist.shards.views import separate_views
from aplantida_dist.shards.writer import Sample, ShardLimits, num_bytes_of_sample, write_split


class BuildError(UserError):
    """These pictures do not make a dataset."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build. `num_workers` processes decode (0: this one); the dataset's bytes do not depend on them.

    `keep_splits_of` is an earlier dataset whose photographs keep their split. Pictures whose looks differ in at most
    `near_distance` bits form a group, which stays in one split; None looks for no groups. A picture has `min_side` pixels
    on its shorter side at least. Classes with fewer than `min_samples` usable photographs are left out whole. `reencoding` makes
    pictures smaller as they are written, under the keys of their originals; None keeps every byte.
    """

    seed: int
    limits: ShardLimits
    num_workers: int
    replace: bool
    licence: Requirement = ANY_LICENCE
    keep_splits_of: Path | None = None
    near_distance: int | None = None
    min_side: int = MIN_SIDE
    min_samples: int = 1
    reencoding: Reencoding | None = None


def build_dataset(source: Source, dataset_dir: Path, *, options: BuildOptions) -> Account:
    """Build a dataset from what a source lists, whole or not at all; returns the account of it.

    Two passes over the files: the first decodes and hashes each, the second writes those that stay. No picture is held
    between them, so memory grows by the names and the metadata only. Pictures in tars that others wrote stay there and are indexed.
    """
    dataset_dir = dataset_dir.absolute()
    for path in source.picture_paths:
        require_apart(path, dataset_dir)
    require_free_place(dataset_dir, replace=options.replace)
    with claimed(dataset_dir):
        return _build(source, dataset_dir, options=options)


def _build(source: Source, dataset_dir: Path, *, options: BuildOptions) -> Account:
    require_free_place(dataset_dir, replace=options.replace)
    if not source.records:
        raise BuildError(_told_of_nothing(source))
    if source.tars and options.reencoding is not None:
        raise BuildError(
            "--max-side: pictures in tars that others wrote stay as they are; leave it out, or unpack the tars"
        )
    kept = _read_kept_splits(source, options=options)
    candidates, unusable = _audit(source.records, options=options)
    groups = () if options.near_distance is None else find_groups(candidates, distance=options.near_distance)
    candidates, leaks = leave_out_leaks(candidates, groups=groups, kept=kept)
    candidates, few = leave_out_few(candidates, min_samples=options.min_samples)
    left_out = tuple(sorted((*source.outside, *unusable, *leaks, *few), key=_natural_order))
    of_split = _assign_splits(candidates, given=source.splits, groups=groups, kept=kept, seed=options.seed)
    class_map = _class_map_of(of_split, source, left_out=left_out)
    if options.reencoding is None:
        foreign_paths = {tar.path for tar in source.tars}
        written = [candidate for candidate in candidates if candidate.record.place.path not in foreign_paths]
        require_room(dataset_dir, num_bytes=_num_bytes_of(written))
    with placed(dataset_dir, replace=options.replace) as partial_dir:
        class_map.save(partial_dir / CLASSES_FILE)
        account = Account(
            source_name=source.name,
            counted=source.counted,
            seed=options.seed,
            num_files=len(source.records) + len(source.outside),
            class_names=class_map.class_names,
            min_samples=options.min_samples,
            classes_without_samples=tuple(
                sorted(set(source.class_names) - set(class_map.class_names) - {one.class_name for one in few})
            ),
            manifests=tuple(_write(of_split, partial_dir, source=source, class_map=class_map, options=options)),
            left_out=left_out,
            licence_counts=count_licences(candidate.record.licence for candidate in candidates),
            metadata=source.metadata,
            kept_splits=None if options.keep_splits_of is None else _use_of_splits(kept, candidates),
            groups=None if options.near_distance is None else _use_of_groups(groups, distance=options.near_distance),
        )
        save_report(account, partial_dir)
        require_unchanged(source.tars)
    return account


def _told_of_nothing(source: Source) -> str:
    if source.counted == "files":
        return f"{source.where}: no class folder with a file in it; give one folder of pictures a class"
    example = f", first {source.outside[0].source}: {source.outside[0].detail}" if source.outside else ""
    if source.counted == "records":
        return (
            f"{source.where}: holds the picture of none of {len(source.outside)} records in {source.name}{example}; "
            "give their folder as --image-dir"
        )
    return f"{source.where}: not one of {len(source.outside)} {source.counted} can be used{example}; check the source"


def _natural_order(left_out: LeftOut) -> list[str | int]:
    """By name, figures by their value: line 9 before line 10."""
    parts: list[str | int] = list(re.split(r"([0-9]+)", left_out.source))
    parts[1::2] = map(int, parts[1::2])
    return parts


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
            tuple(sorted((member.record for member in group.members), key=lambda record: record.source))
            for group in groups
            if len(group.class_names) > 1
        ),
    )


def _audit(records: Sequence[Record], *, options: BuildOptions) -> tuple[list[Candidate], list[LeftOut]]:
    """Decode every record under an accepted licence; return those that stay, one of each picture, and those that do not."""
    accepted, refused = part_by_licence(records, options.licence)
    left_out = [record.left_out("licence", stated_licence(json.loads(record.metadata))) for record in refused]
    candidates: list[Candidate] = []
    findings = audit_places(
        (record.place for record in accepted),
        num_workers=options.num_workers,
        with_looks=options.near_distance is not None,
        min_side=options.min_side,
    )
    paced = with_pace(findings, total=len(accepted), doing="decoding every picture")
    for record, finding in zip(accepted, paced, strict=True):
        if isinstance(finding, Fault):
            left_out.append(record.left_out(finding.reason, finding.detail))
        else:
            candidates.append(Candidate(record, finding))
    candidates, restricted = leave_out_refused(candidates, _by_key(refused, options=options))
    kept, copies = drop_copies(candidates)
    return kept, [*left_out, *restricted, *copies]


def _by_key(records: Sequence[Record], *, options: BuildOptions) -> dict[str, Record]:
    """Records by the sample key of their picture, of several the first: read and hashed, which costs far less than decoding."""
    keys = keys_of_places((record.place for record in records), num_workers=options.num_workers if records else 0)
    paced = with_pace(keys, total=len(records), doing="hashing what other licences forbid")
    return {key: record for record, key in reversed([*zip(records, paced, strict=True)]) if key is not None}


def _num_bytes_of(candidates: Sequence[Candidate]) -> int:
    """What the samples will take in tars."""
    return sum(
        num_bytes_of_sample(
            num_image_bytes=candidate.picture.num_bytes, num_metadata_bytes=len(candidate.record.metadata)
        )
        for candidate in candidates
    )


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
            f"{source.where}: not one picture of {empty[0]} can be used (left out: {reasons or 'nothing'}); "
            "check the source, and try one file with an image viewer"
        )
    counts = {split: Counter(member.record.class_name for member in members) for split, members in of_split.items()}
    unknown = sorted(set().union(*counts.values()) - counts["train"].keys())
    if unknown:
        told = ", ".join(f"{name}: {_counts_text(name, counts)}" for name in unknown[:10])
        raise BuildError(
            f"{source.where}: {len(unknown):,} of the classes of val or test are unknown to train, which has no usable picture "
            f"of them left ({told}{', …' if len(unknown) > 10 else ''}); add train pictures that are in no other split, or remove these classes"
        )
    return ClassMap(tuple(sorted(counts["train"])))


def _counts_text(class_name: str, counts: Mapping[str, Counter[str]]) -> str:
    return " and ".join(f"{count[class_name]:,} in {split}" for split, count in counts.items() if count[class_name])


def _write(
    of_split: dict[str, list[Candidate]],
    dataset_dir: Path,
    *,
    source: Source,
    class_map: ClassMap,
    options: BuildOptions,
) -> Iterator[Manifest]:
    for split, members in of_split.items():
        written, views = separate_views(members, source.tars, index_of=class_map.index_of)
        samples = read_samples(written, class_map, reencoding=options.reencoding, num_workers=options.num_workers)
        yield write_split(
            with_pace(samples, total=len(written), doing=f"writing {split}"),
            dataset_dir / split,
            split=split,
            class_map_digest=class_map.digest,
            limits=options.limits,
            views=views,
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
