"""The verification of a dataset: everything on disk that is not what the manifests, the indexes and the class map say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aplantida_dist.data.classmap import CLASSES_FILE, ClassMap, load_class_map
from aplantida_dist.data.manifest import (
    IDENTITIES_FILE,
    IDENTITY_DTYPE,
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    faults_of_totals,
    identity_digest,
    identity_of,
    parse_manifest,
)
from aplantida_dist.errors import UserError
from aplantida_dist.pace import with_pace
from aplantida_dist.shards.claim import find_replaced
from aplantida_dist.shards.inspection import Damage, ShardFinding, inspect_shard
from aplantida_dist.shards.licence import Licence, licence_inside, parse_licence
from aplantida_dist.shards.placement import DATASET_ENTRIES
from aplantida_dist.shards.view_inspection import inspect_view

OPTIONAL_ENTRIES = frozenset({"val", "test", "report.html"})
"""Datasets from before there was a page are sound without it."""


class VerifyError(UserError):
    """There is nothing that could be verified."""


@dataclass(frozen=True)
class Verdict:
    """What a verification found. The dataset is sound when there is no damage; the counts are of what was read."""

    damages: tuple[Damage, ...]
    num_splits: int
    num_shards: int
    num_samples: int


@dataclass(frozen=True)
class _SplitFinding:
    shards: tuple[ShardFinding, ...]
    damages: tuple[Damage, ...]


def verify_dataset(dataset_dir: Path) -> Verdict:
    """Read every byte of a dataset and list all that is wrong, sorted by place; a fault never hides the next one.

    Raises VerifyError only where there is no dataset at all.
    """
    if not dataset_dir.is_dir():
        replaced = find_replaced(dataset_dir.absolute())
        remedy = "build one with `python shards/build.py`"
        if replaced is not None:
            remedy = (
                f"a build was killed while it replaced this one, which is {replaced} now: rename it, or build again"
            )
        raise VerifyError(f"{dataset_dir}: no dataset here; {remedy}")
    present = {entry.name for entry in dataset_dir.iterdir()}
    damages = [Damage(name, "missing") for name in DATASET_ENTRIES - OPTIONAL_ENTRIES - present]
    damages += [Damage(name, "does not belong to the dataset") for name in present - DATASET_ENTRIES]
    class_map = None
    if CLASSES_FILE in present:
        try:
            class_map = load_class_map(dataset_dir / CLASSES_FILE)
        except UserError as error:
            damages.append(_damage_of(error, dataset_dir, CLASSES_FILE))
    findings = [_check_split(dataset_dir, split, class_map) for split in SPLITS if split in present]
    shards = [shard for finding in findings for shard in finding.shards]
    damages += [damage for finding in findings for damage in finding.damages]
    damages += _check_keys_stand_once(shards)
    num_samples = sum(len(shard.sample_keys) for shard in shards)
    return Verdict(tuple(sorted(damages)), len(findings), len(shards), num_samples)


def _damage_of(error: UserError, dataset_dir: Path, place: str) -> Damage:
    return Damage(place, str(error).removeprefix(f"{dataset_dir / place}: "))


def _check_split(dataset_dir: Path, split: str, class_map: ClassMap | None) -> _SplitFinding:
    """Check a manifest against itself, the class map and its folder, then every shard against the manifest."""
    split_dir, place = dataset_dir / split, f"{split}/{MANIFEST_FILE}"
    try:
        manifest = parse_manifest(dataset_dir / place)
    except UserError as error:
        return _SplitFinding((), (_damage_of(error, dataset_dir, place),))
    faults = faults_of_totals(manifest)
    if manifest.split != split:
        faults.append(f"is that of split {manifest.split!r}")
    if class_map is not None and manifest.class_map_digest != class_map.digest:
        faults.append(f"was written for other classes than those of {CLASSES_FILE} (the digests differ)")
    if class_map is not None and (manifest.parent is None) != (class_map.parent is None):
        names_parent, does_not = (CLASSES_FILE, "it") if manifest.parent is None else ("it", CLASSES_FILE)
        faults.append(f"{names_parent} names a parent and {does_not} does not")
    name_of_sha256 = {shard.sha256: shard.name for shard in manifest.shards}
    num_classes = None if class_map is None else class_map.num_classes
    shards = tuple(
        inspect_view(split_dir, shard, num_classes=num_classes)
        if shard.is_foreign
        else inspect_shard(
            split_dir,
            shard,
            name_of_sha256=name_of_sha256,
            num_classes=num_classes,
            max_side=None if manifest.reencoding is None else manifest.reencoding.max_side,
        )
        for shard in with_pace(manifest.shards, total=len(manifest.shards), doing=f"verifying shards of {split}")
    )
    if all(shard.is_whole for shard in shards) and _identity_digest_of(shards) != manifest.identity_digest:
        faults.append("the identity digest is not that of the samples in the shards")
    if all(shard.is_whole for shard in shards):
        faults += _faults_of_licence(manifest, shards)
    damages = [Damage(place, fault) for fault in faults]
    if not faults and not _has_right_identities(split_dir / IDENTITIES_FILE, shards):
        damages.append(
            Damage(f"{split}/{IDENTITIES_FILE}", "does not hold the identities of the samples in the shards")
        )
    damages += [
        Damage(f"{split}/{name}", "does not belong to the dataset") for name in _extra_names(split_dir, manifest)
    ]
    return _SplitFinding(shards, (*damages, *(damage for shard in shards for damage in shard.damages)))


def _identity_digest_of(shards: Iterable[ShardFinding]) -> str:
    return identity_digest(sum(identity_of(key) for shard in shards for key in shard.sample_keys))


def _has_right_identities(path: Path, shards: Sequence[ShardFinding]) -> bool:
    """Whether the file holds those of the shards, where they can be told; datasets from before there was one are sound without it."""
    if not path.exists() or not all(shard.is_whole for shard in shards):
        return True
    expected = (identity_of(key) for shard in shards for key in shard.sample_keys)
    return path.read_bytes() == np.fromiter(expected, dtype=IDENTITY_DTYPE).tobytes()


def _faults_of_licence(manifest: Manifest, shards: Iterable[ShardFinding]) -> list[str]:
    """The licence that a manifest states is the most restrictive of those that its samples state; None where none does."""
    stated = frozenset[Licence | None]().union(*(shard.licences for shard in shards))
    expected = licence_inside(stated)
    if any(shard.is_foreign for shard in manifest.shards) and manifest.licence is not None:
        # A photograph in a foreign tar keeps its metadata there, also where a copy of it is more restricted.
        expected = licence_inside((*stated, parse_licence(manifest.licence)))
    if manifest.licence == expected:
        return []
    return [
        f"states the licence {manifest.licence or 'none'}, the most restrictive of its samples is {expected or 'none'}"
    ]


def _extra_names(split_dir: Path, manifest: Manifest) -> set[str]:
    known = {MANIFEST_FILE, IDENTITIES_FILE} | {name for shard in manifest.shards for name in shard.file_names}
    return {entry.name for entry in split_dir.iterdir()} - known


def _check_keys_stand_once(shards: Iterable[ShardFinding]) -> list[Damage]:
    """A key that stands twice is one photograph that stands twice: weighed double, or seen in training and measured on."""
    first_place: dict[str, str] = {}
    keys_of_places: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for shard in shards:
        for key in shard.sample_keys:
            earlier = first_place.setdefault(key, shard.place)
            keys_of_places[earlier, shard.place].append(key)
    damages = []
    for (earlier, place), keys in keys_of_places.items():
        again = keys if earlier != place else [key for key, count in Counter(keys).items() if count > 1]
        if again:
            damages.append(Damage(place, f"{len(again)} sample keys stand in {earlier} already, first {again[0]}"))
    return damages
