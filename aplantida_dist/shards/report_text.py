"""The account as text: for the console, and as report.md."""

from __future__ import annotations

from html import escape

from aplantida_dist.data.frequency import MEANING_OF_FREQUENCY
from aplantida_dist.shards.account import Account, forbids, remarks_of, shortened, split_row, sum_of
from aplantida_dist.shards.record import MEANING_OF_REASON

LISTED_PER_REASON = 20


def to_text(account: Account) -> str:
    """The account as the console shows it: tables of the splits, of frequent and rare classes, of what was left out, and their sum."""
    lines = ["split   samples  classes  shards       MB"]
    for manifest in account.manifests:
        row = split_row(manifest)
        lines.append(
            f"{manifest.split:<6} {row['num_samples']:>8,} {row['num_classes']:>8,} {row['num_shards']:>7,} {row['bytes'] / 1e6:>8,.1f}"
        )
    splits = [manifest.split for manifest in account.manifests]
    lines.append(f"        classes {''.join(f'{split:>9}' for split in splits)}")
    for kind in account.frequencies:
        counts = "".join(f"{count:>9,}" for count in kind.num_samples.values())
        lines.append(f"{kind.frequency:<6} {kind.num_classes:>8,} {counts}  {MEANING_OF_FREQUENCY[kind.frequency]}")
    for reason, count in account.left_out_by_reason.items():
        if count:
            lines.append(f"left out {count:>6,}  {reason}: {MEANING_OF_REASON[reason]}")
    lines += [f"licence  {count:>6,}  {name}{forbids(name)}" for name, count in account.licence_counts.items()]
    lines.append(sum_of(account))
    lines += remarks_of(account)
    return "\n".join(lines)


def to_markdown(account: Account) -> str:
    """The account as report.md: the same tables, the classes from rare to frequent, and examples of what was left out."""
    lines = [f"# What became of `{_code(account.source_name)}`", "", f"- {sum_of(account)}"]
    lines += [f"- {_cell(remark)}" for remark in remarks_of(account)]
    lines += ["", "| split | samples | classes | shards | MB |", "|---|--:|--:|--:|--:|"]
    for manifest in account.manifests:
        row = split_row(manifest)
        lines.append(
            f"| {manifest.split} | {row['num_samples']:,} | {row['num_classes']:,} | {row['num_shards']:,} | {row['bytes'] / 1e6:,.1f} |"
        )
    lines += _frequency_table(account)
    lines += _licence_table(account)
    by_reason = account.left_out_by_reason
    lines += ["", "## Left out", "", f"| reason | {account.counted} | what it means |", "|---|--:|---|"]
    lines += [f"| {reason} | {by_reason[reason]:,} | {text} |" for reason, text in MEANING_OF_REASON.items()]
    lines += _examples(account)
    lines += _class_table(account)
    return "\n".join(lines) + "\n"


def _frequency_table(account: Account) -> list[str]:
    splits = [manifest.split for manifest in account.manifests]
    lines = ["", f"| classes | number | {' | '.join(splits)} | |", f"|---|--:|{'--:|' * len(splits)}---|"]
    for row in account.frequencies:
        counts = " | ".join(f"{count:,}" for count in row.num_samples.values())
        lines.append(f"| {row.frequency} | {row.num_classes:,} | {counts} | {MEANING_OF_FREQUENCY[row.frequency]} |")
    return lines


def _licence_table(account: Account) -> list[str]:
    if not account.licence_counts:
        return []
    lines = ["", "## Licences", "", "| licence | samples |", "|---|--:|"]
    lines += [f"| {_cell(name)}{forbids(name)} | {count:,} |" for name, count in account.licence_counts.items()]
    stated = ", ".join(f"{manifest.split} {manifest.licence}" for manifest in account.manifests if manifest.licence)
    return [*lines, "", f"The most restrictive inside: {stated}."]


def _examples(account: Account) -> list[str]:
    lines = []
    for reason in MEANING_OF_REASON:
        files = [left_out for left_out in account.left_out if left_out.reason == reason]
        if files:
            lines += ["", f"### {reason}", ""]
            lines += [
                f"- `{_code(shortened(file.source))}`" + (f": {_cell(shortened(file.detail))}" if file.detail else "")
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
    return lines + [
        f"| {_cell(shortened(name))} | {' | '.join(f'{count:,}' for count in row)} |" for name, *row in rows
    ]


def _cell(text: str) -> str:
    """Text that neither ends a table cell nor a line, and is no HTML, which Markdown would pass on."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _code(text: str) -> str:
    """Text that does not end the code span that it stands in."""
    return " ".join(text.split()).replace("`", "'")
