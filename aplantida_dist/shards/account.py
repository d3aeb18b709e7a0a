"""The account of a build: everything that came in is a sample that was written or was left out, by reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aplantida_dist.data.manifest import Manifest
from aplantida_dist.files import write_json, write_whole
from aplantida_dist.shards.licence import parse_licence
from aplantida_dist.shards.record import MEANING_OF_REASON, LeftOut, Reason
from aplantida_dist.shards.source import MetadataUse

REPORT_FILES = ("report.json", "report.md")
REPORT_VERSION = 1
LISTED_PER_REASON = 20


@dataclass(frozen=True)
class SplitsUse:
    """How the photographs of an earlier dataset met those of this one: `num_gone` are not among its samples any more."""

    num_kept: int
    num_gone: int


@dataclass(frozen=True)
class GroupsUse:
    """The groups of photographs whose looks differ in at most `distance` bits; `disagreeing` are the sources of those under several classes."""

    distance: int
    num_groups: int
    num_photographs: int
    disagreeing: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Account:
    """What a build did. Nothing in it depends on the clock, the machine, or where the folders lie.

    `source_name` is the last part of the source's path. `num_files` is how many came in, of what `counted` says: files or records.
    `classes_without_samples` stood in the source, but nothing of them was usable. `licence_counts` has the samples of each
    licence, the most frequent first; it is empty where no sample states one.
    """

    source_name: str
    counted: str
    seed: int
    num_files: int
    class_names: tuple[str, ...]
    classes_without_samples: tuple[str, ...]
    manifests: tuple[Manifest, ...]
    left_out: tuple[LeftOut, ...]
    licence_counts: dict[str, int]
    metadata: MetadataUse | None
    kept_splits: SplitsUse | None
    groups: GroupsUse | None

    @property
    def num_samples(self) -> int:
        return sum(manifest.num_samples for manifest in self.manifests)

    @property
    def left_out_by_reason(self) -> dict[Reason, int]:
        """Files left out for every reason, 0 included, in the order of `MEANING_OF_REASON`."""
        counts = Counter(left_out.reason for left_out in self.left_out)
        return {reason: counts[reason] for reason in MEANING_OF_REASON}


def save_account(account: Account, dataset_dir: Path) -> None:
    """Write report.json (everything) and report.md (for reading)."""
    json_path, markdown_path = (dataset_dir / name for name in REPORT_FILES)
    write_json(json_path, to_json(account))
    write_whole(markdown_path, to_markdown(account).encode())


def to_json(account: Account) -> dict[str, Any]:
    """The account as report.json holds it. `class_counts` has one row a class: samples in each split."""
    return {
        "version": REPORT_VERSION,
        "source": account.source_name,
        "counted": account.counted,
        "seed": account.seed,
        "num_files": account.num_files,
        "num_samples": account.num_samples,
        "num_left_out": len(account.left_out),
        "splits": {
            manifest.split: {**_split_row(manifest), "licence": manifest.licence} for manifest in account.manifests
        },
        "licence_counts": account.licence_counts,
        "left_out_by_reason": account.left_out_by_reason,
        "left_out": [_left_out_row(left_out) for left_out in account.left_out],
        "classes_without_samples": account.classes_without_samples,
        "class_counts": {
            name: {manifest.split: manifest.class_counts.get(str(label), 0) for manifest in account.manifests}
            for label, name in enumerate(account.class_names)
        },
        "metadata": None if account.metadata is None else asdict(account.metadata),
        "kept_splits": None if account.kept_splits is None else asdict(account.kept_splits),
        "groups": None if account.groups is None else asdict(account.groups),
    }


def to_text(account: Account) -> str:
    """The account as the console shows it: a table of the splits, a table of what was left out, and their sum."""
    lines = ["split   samples  classes  shards       MB"]
    for manifest in account.manifests:
        row = _split_row(manifest)
        lines.append(
            f"{manifest.split:<6} {row['num_samples']:>8,} {row['num_classes']:>8,} {row['num_shards']:>7,} {row['bytes'] / 1e6:>8,.1f}"
        )
    for reason, count in account.left_out_by_reason.items():
        if count:
            lines.append(f"left out {count:>6,}  {reason}: {MEANING_OF_REASON[reason]}")
    lines += [f"licence  {count:>6,}  {name}{_forbids(name)}" for name, count in account.licence_counts.items()]
    lines.append(_sum_of(account))
    lines += _remarks(account)
    return "\n".join(lines)


def to_markdown(account: Account) -> str:
    """The account as report.md: the same tables, the classes from rare to frequent, and examples of what was left out."""
    lines = [f"# What became of `{account.source_name}`", "", f"- {_sum_of(account)}"]
    lines += [f"- {remark}" for remark in _remarks(account)]
    lines += ["", "| split | samples | classes | shards | MB |", "|---|--:|--:|--:|--:|"]
    for manifest in account.manifests:
        row = _split_row(manifest)
        lines.append(
            f"| {manifest.split} | {row['num_samples']:,} | {row['num_classes']:,} | {row['num_shards']:,} | {row['bytes'] / 1e6:,.1f} |"
        )
    lines += _licence_table(account)
    lines += ["", "## Left out", "", f"| reason | {account.counted} | what it means |", "|---|--:|---|"]
    lines += [
        f"| {reason} | {account.left_out_by_reason[reason]:,} | {text} |" for reason, text in MEANING_OF_REASON.items()
    ]
    lines += _examples(account)
    lines += _class_table(account)
    return "\n".join(lines) + "\n"


def _split_row(manifest: Manifest) -> dict[str, int]:
    return {
        "num_samples": manifest.num_samples,
        "num_classes": len(manifest.class_counts),
        "num_shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards if not shard.is_foreign),
    }


def _left_out_row(left_out: LeftOut) -> dict[str, str | None]:
    return {
        "source": left_out.source,
        "class_name": left_out.class_name,
        "reason": left_out.reason,
        "detail": left_out.detail,
    }


def _sum_of(account: Account) -> str:
    return f"{account.num_files:,} {account.counted} = {account.num_samples:,} samples written + {len(account.left_out):,} left out"


def _remarks(account: Account) -> list[str]:
    """What a reader must know beside the tables, one line each."""
    remarks = []
    if account.classes_without_samples:
        names = account.classes_without_samples
        shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
        remarks.append(f"{len(names):,} classes hold nothing usable and are not in classes.json: {shown}")
    if account.kept_splits is not None:
        kept = account.kept_splits
        remarks.append(
            f"{kept.num_kept:,} photographs keep the split of the earlier dataset, {kept.num_gone:,} of it are no longer here"
        )
    if account.groups is not None and account.groups.num_groups:
        groups = account.groups
        remarks.append(
            f"{groups.num_photographs:,} photographs form {groups.num_groups:,} groups of nearly the same look, none of which spans two splits"
        )
        if groups.disagreeing:
            remarks.append(
                f"{len(groups.disagreeing):,} of these groups stand under several classes, listed in report.json, first {', '.join(groups.disagreeing[0][:10])}"
            )
    if num_foreign := sum(shard.is_foreign for manifest in account.manifests for shard in manifest.shards):
        remarks.append(
            f"{num_foreign:,} shards are indexes onto tars that others wrote; the tars stay where the manifests say, and are no part of this folder"
        )
    use = account.metadata
    if use is not None and use.unmatched:
        number, image_path = use.unmatched[0]
        remarks.append(
            f"{len(use.unmatched):,} of {use.num_lines:,} metadata lines name no file in a class folder, first line {number}: {image_path}"
        )
    if use is not None and use.num_files_without_line:
        remarks.append(
            f"{use.num_files_without_line:,} files have no metadata line; their KEY.json holds what the folder knew"
        )
    return remarks


def _forbids(licence_name: str) -> str:
    licence = parse_licence(licence_name)
    allowed = {"commercial use": licence.allows_commercial, "derivatives": licence.allows_derivatives}
    forbidden = [use for use, is_allowed in allowed.items() if not is_allowed]
    return f" (no {', no '.join(forbidden)})" if forbidden else ""


def _licence_table(account: Account) -> list[str]:
    if not account.licence_counts:
        return []
    lines = ["", "## Licences", "", "| licence | samples |", "|---|--:|"]
    lines += [f"| {name}{_forbids(name)} | {count:,} |" for name, count in account.licence_counts.items()]
    stated = ", ".join(f"{manifest.split} {manifest.licence}" for manifest in account.manifests if manifest.licence)
    return [*lines, "", f"The most restrictive inside: {stated}."]


def _examples(account: Account) -> list[str]:
    lines = []
    for reason in MEANING_OF_REASON:
        files = [left_out for left_out in account.left_out if left_out.reason == reason]
        if files:
            lines += ["", f"### {reason}", ""]
            lines += [
                f"- `{_cell(file.source)}`" + (f": {_cell(file.detail)}" if file.detail else "")
                for file in files[:LISTED_PER_REASON]
            ]
        if len(files) > LISTED_PER_REASON:
            lines.append(f"- and {len(files) - LISTED_PER_REASON:,} more, listed in report.json")
    return lines


def _class_table(account: Account) -> list[str]:
    splits = [manifest.split for manifest in account.manifests]
    counts = [manifest.counts_of_classes(len(account.class_names)) for manifest in account.manifests]
    rows = sorted(zip(account.class_names, *counts, strict=True), key=lambda row: (row[1], row[0]))
    lines = ["", "## Classes, rarest first", ""]
    lines += [f"| class | {' | '.join(splits)} |", f"|---|{'--:|' * len(splits)}"]
    return lines + [f"| {_cell(name)} | {' | '.join(f'{count:,}' for count in row)} |" for name, *row in rows]


def _cell(text: str) -> str:
    """Text that neither ends a table cell nor a line."""
    return " ".join(text.split()).replace("|", "\\|")
