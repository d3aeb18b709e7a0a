"""The account of a build: everything that came in is a sample that was written or was left out, by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aplantida_dist.data.manifest import Manifest, Reencoding
from aplantida_dist.shards.census import FrequencyCount, count_frequencies
from aplantida_dist.shards.licence import parse_licence
from aplantida_dist.shards.record import MEANING_OF_REASON, LeftOut, Reason, Record
from aplantida_dist.shards.selection import SelectionUse
from aplantida_dist.shards.source import MetadataUse

REPORT_FILES = ("report.json", "report.md", "report.html")
REPORT_VERSION = 1
MOST_CHARACTERS = 300
"""Of a name or a detail in report.md and report.html: a URL in a record may have a million. report.json holds them whole."""


@dataclass(frozen=True)
class SplitsUse:
    """How the photographs of an earlier dataset met those of this one: `num_gone` are not among its samples any more."""

    num_kept: int
    num_gone: int


@dataclass(frozen=True)
class GroupsUse:
    """The groups of photographs whose looks differ in at most `distance` bits; `disagreeing` are those under several classes."""

    distance: int
    num_groups: int
    num_photographs: int
    disagreeing: tuple[tuple[Record, ...], ...]


@dataclass(frozen=True)
class Account:
    """What a build did. Nothing in it depends on the clock, the machine, or where the folders lie.

    `source_name` is the last part of the source's path. `num_files` is how many came in, of what `counted` says: files, records
    or samples. Of a subset `seed` is None, for nothing in it is drawn, and `selection` is not.
    `classes_without_samples` stood in the source, but nothing of them was usable; those with fewer than `min_samples` usable
    photographs are not among them. `licence_counts` has the samples of each licence, the most frequent first; it is empty where
    no sample states one.
    """

    source_name: str
    counted: str
    seed: int | None
    num_files: int
    class_names: tuple[str, ...]
    min_samples: int
    classes_without_samples: tuple[str, ...]
    manifests: tuple[Manifest, ...]
    left_out: tuple[LeftOut, ...]
    licence_counts: dict[str, int]
    metadata: MetadataUse | None
    kept_splits: SplitsUse | None
    groups: GroupsUse | None
    selection: SelectionUse | None = None

    @property
    def num_samples(self) -> int:
        return sum(manifest.num_samples for manifest in self.manifests)

    @property
    def num_left_out(self) -> int:
        return sum(self.left_out_by_reason.values())

    @property
    def reencoding(self) -> Reencoding | None:
        """How pictures were made smaller, the same in every split."""
        return self.manifests[0].reencoding

    @property
    def left_out_by_reason(self) -> dict[Reason, int]:
        """Files left out for every reason, 0 included, in the order of `MEANING_OF_REASON`."""
        counts = Counter(left_out.reason for left_out in self.left_out)
        counts["not_selected"] += 0 if self.selection is None else self.selection.num_not_selected
        return {reason: counts[reason] for reason in MEANING_OF_REASON}

    @property
    def scarce_classes(self) -> dict[str, int]:
        """The classes that `min_samples` left out, with their usable photographs, by name."""
        few = Counter(str(left_out.class_name) for left_out in self.left_out if left_out.reason == "few_samples")
        return dict(sorted(few.items()))

    @property
    def frequencies(self) -> tuple[FrequencyCount, ...]:
        """Many, medium and few: the classes of each, and their samples in every split."""
        return count_frequencies(self.manifests, num_classes=len(self.class_names))


def to_json(account: Account) -> dict[str, Any]:
    """The account as report.json holds it. `class_counts` has one row a class: samples in each split."""
    return {
        "version": REPORT_VERSION,
        "source": account.source_name,
        "counted": account.counted,
        "seed": account.seed,
        "num_files": account.num_files,
        "num_samples": account.num_samples,
        "num_left_out": account.num_left_out,
        "splits": {
            manifest.split: {**split_row(manifest), "licence": manifest.licence} for manifest in account.manifests
        },
        "licence_counts": account.licence_counts,
        "left_out_by_reason": account.left_out_by_reason,
        "left_out": [_left_out_row(left_out) for left_out in account.left_out],
        "min_samples": account.min_samples,
        "scarce_classes": account.scarce_classes,
        "classes_without_samples": account.classes_without_samples,
        "frequencies": {
            count.frequency: {"num_classes": count.num_classes, **count.num_samples} for count in account.frequencies
        },
        "class_counts": {
            name: {manifest.split: manifest.class_counts.get(str(label), 0) for manifest in account.manifests}
            for label, name in enumerate(account.class_names)
        },
        "metadata": None if account.metadata is None else asdict(account.metadata),
        "kept_splits": None if account.kept_splits is None else asdict(account.kept_splits),
        "selection": None if account.selection is None else asdict(account.selection),
        "groups": None if account.groups is None else _groups_row(account.groups),
        "reencoding": None if account.reencoding is None else account.reencoding.model_dump(),
    }


def split_row(manifest: Manifest) -> dict[str, int]:
    """The size of a split."""
    return {
        "num_samples": manifest.num_samples,
        "num_classes": len(manifest.class_counts),
        "num_shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards if not shard.is_foreign),
    }


def _groups_row(groups: GroupsUse) -> dict[str, Any]:
    return {
        "distance": groups.distance,
        "num_groups": groups.num_groups,
        "num_photographs": groups.num_photographs,
        "disagreeing": [[record.source for record in group] for group in groups.disagreeing],
    }


def _left_out_row(left_out: LeftOut) -> dict[str, str | None]:
    return {
        "source": left_out.source,
        "class_name": left_out.class_name,
        "reason": left_out.reason,
        "detail": left_out.detail,
    }


def sum_of(account: Account) -> str:
    """The identity that every build keeps, as a line."""
    return f"{account.num_files:,} {account.counted} = {account.num_samples:,} samples written + {account.num_left_out:,} left out"


def remarks_of(account: Account) -> list[str]:
    """What a reader must know beside the tables, one line each."""
    remarks = [] if account.selection is None else account.selection.remarks(num_left_out=account.num_left_out)
    if names := account.classes_without_samples:
        remarks.append(f"{_classes(len(names))} without a usable photograph, not in classes.json: {_first_ten(names)}")
    if scarce := account.scarce_classes:
        told = _first_ten([f"{name} ({count})" for name, count in scarce.items()])
        remarks.append(
            f"{_classes(len(scarce))} with fewer than {account.min_samples} usable photographs (--min-samples), left out whole: {told}"
        )
    if account.kept_splits is not None:
        kept = account.kept_splits
        remarks.append(
            f"{kept.num_kept:,} photographs keep the split of the earlier dataset, {kept.num_gone:,} of it are not in this one"
        )
    if account.groups is not None and account.groups.num_groups:
        groups = account.groups
        remarks.append(
            f"{groups.num_photographs:,} photographs form {groups.num_groups:,} groups of nearly the same look, none of which spans two splits"
        )
        if groups.disagreeing:
            told = _first_ten([record.source for record in groups.disagreeing[0]])
            remarks.append(
                f"{len(groups.disagreeing):,} of these groups stand under several classes, all in report.json; the first: {told}"
            )
    if num_foreign := sum(shard.is_foreign for manifest in account.manifests for shard in manifest.shards):
        remarks.append(
            f"{num_foreign:,} shards are indexes onto tars that others wrote; the tars stay where the manifests say, and are no part of this folder"
        )
    if account.reencoding is not None:
        small = account.reencoding
        remarks.append(
            f"pictures longer than {small.max_side:,} pixels became JPEGs of that side and quality {small.quality}, under the keys of their originals"
        )
    use = account.metadata
    if use is not None and use.unmatched:
        number, image_path = use.unmatched[0]
        remarks.append(
            f"{len(use.unmatched):,} of {use.num_lines:,} metadata lines name no file in a class folder, first line {number}: {shortened(image_path)}"
        )
    if use is not None and use.num_files_without_line:
        remarks.append(
            f"{use.num_files_without_line:,} files have no metadata line; their KEY.json holds what the folder knew"
        )
    return remarks


def _classes(count: int) -> str:
    return f"{count:,} class{'' if count == 1 else 'es'}"


def _first_ten(names: Sequence[str]) -> str:
    return ", ".join(map(shortened, names[:10])) + (", … (all in report.json)" if len(names) > 10 else "")


def forbids(licence_name: str) -> str:
    """What a licence does not allow, as a remark behind its name; empty where it allows everything."""
    licence = parse_licence(licence_name)
    allowed = {"commercial use": licence.allows_commercial, "derivatives": licence.allows_derivatives}
    forbidden = [use for use, is_allowed in allowed.items() if not is_allowed]
    return f" (no {', no '.join(forbidden)})" if forbidden else ""


def shortened(text: str) -> str:
    """Text of at most MOST_CHARACTERS, cut in the middle: names differ at their ends."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"
