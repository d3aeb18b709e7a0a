"""The account as a page: report.html, with pictures of what was left out, and everything that came from a user escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from aplantida_dist.data.frequency import MEANING_OF_FREQUENCY
from aplantida_dist.shards.account import Account, forbids, remarks_of, shortened, split_row, sum_of
from aplantida_dist.shards.gallery import Exhibit, Galleries, Gallery, View
from aplantida_dist.shards.place import Place
from aplantida_dist.shards.record import MEANING_OF_REASON, Reason
from aplantida_dist.shards.report_style import STYLESHEET
from aplantida_dist.shards.thumbnails import Opening, Preview, Thumbnail
from aplantida_dist.web_page import data_uri, heading, table, tiles, web_page

RAREST_CLASSES = 50

Previews = Mapping[Place, Preview | None]


def to_html(account: Account, *, galleries: Galleries, previews: Previews) -> str:
    """The whole page: the sum, what was left out, what the dataset holds, then the pictures. `previews` has every place on show.

    It depends on the account and the pictures alone: no clock, no path of this machine.
    """
    name = shortened(account.source_name)
    sections = [
        heading("Build report", name, lead=sum_of(account)),
        _tiles(account),
        _remarks(account),
        "<h2>Left out</h2>",
        _reasons(account),
        "<h2>Splits</h2>",
        _splits(account),
        "<h2>Classes</h2>",
        _frequencies(account),
        _rarest_classes(account),
        _licences(account),
        *_galleries(account, galleries, previews),
        "<footer>Written by shards/build.py. report.json lists everything that was left out; pictures here are small copies.</footer>",
    ]
    return web_page(f"{name} – build report", sections, stylesheet=STYLESHEET)


def _tiles(account: Account) -> str:
    num_bytes = sum(split_row(manifest)["bytes"] for manifest in account.manifests)
    shares = " · ".join(f"{manifest.split} {manifest.num_samples:,}" for manifest in account.manifests)
    few = next(count.num_classes for count in account.frequencies if count.frequency == "few")
    numbers = [
        ("samples written", f"{account.num_samples:,}", shares),
        ("left out", f"{len(account.left_out):,}", f"{len(account.left_out) / account.num_files:.1%} of {account.num_files:,} {account.counted}"),
        ("classes", f"{len(account.class_names):,}", f"{few:,} of them few ({MEANING_OF_FREQUENCY['few']})"),
        ("size", f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB", f"seed {account.seed}"),
    ]  # fmt: skip
    return tiles(numbers)


def _remarks(account: Account) -> str:
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in remarks_of(account))
    return f'<ul class="remarks">{remarks}</ul>' if remarks else ""


def _reasons(account: Account) -> str:
    """What was left out, by reason: the number as a bar too, and each reason leads to its pictures."""
    counts = {reason: count for reason, count in account.left_out_by_reason.items() if count}
    if not counts:
        return '<p class="nothing">Nothing was left out.</p>'
    rows = "".join(_reason_row(reason, count, most=max(counts.values())) for reason, count in counts.items())
    others = [reason for reason in MEANING_OF_REASON if reason not in counts]
    nothing = f'<p class="nothing">Nothing was left out as {", ".join(others)}.</p>' if others else ""
    return (
        f'<div class="scroll"><table class="reasons"><thead><tr><th>reason</th><th>{escape(account.counted)}</th><th></th>'
        f"<th>what it means</th></tr></thead><tbody>{rows}</tbody></table></div>{nothing}"
    )


def _reason_row(reason: Reason, count: int, *, most: int) -> str:
    return (
        f'<tr><td><a href="#{reason}">{reason}</a></td><td>{count:,}</td>'
        f'<td><span class="bar" style="width:{max(100 * count / most, 1):.1f}%"></span></td>'
        f"<td>{escape(MEANING_OF_REASON[reason])}</td></tr>"
    )


def _splits(account: Account) -> str:
    rows = [(manifest.split, split_row(manifest), manifest.licence or "none stated") for manifest in account.manifests]
    return table(
        ("split", "samples", "classes", "shards", "MB", "most restrictive licence"),
        [
            (split, f"{row['num_samples']:,}", f"{row['num_classes']:,}", f"{row['num_shards']:,}", f"{row['bytes'] / 1e6:,.1f}", licence)
            for split, row, licence in rows
        ],
        kind="plain told",
    )  # fmt: skip


def _frequencies(account: Account) -> str:
    splits = [f"{manifest.split} samples" for manifest in account.manifests]
    rows = [
        (row.frequency, f"{row.num_classes:,}", *(f"{count:,}" for count in row.num_samples.values()), MEANING_OF_FREQUENCY[row.frequency])
        for row in account.frequencies
    ]  # fmt: skip
    return table(("", "classes", *splits, "that is"), rows, kind="plain told")


def _rarest_classes(account: Account) -> str:
    counts = [manifest.counts_of_classes(len(account.class_names)) for manifest in account.manifests]
    rows = sorted(zip(account.class_names, *counts, strict=True), key=lambda row: (row[1], row[0]))
    shown = [(shortened(name), *(f"{count:,}" for count in row)) for name, *row in rows[:RAREST_CLASSES]]
    summary = f"The {len(shown)} rarest classes" if len(rows) > len(shown) else "Every class, rarest first"
    heads = ("class", *(manifest.split for manifest in account.manifests))
    return f"<details><summary>{summary}</summary>{table(heads, shown, kind='plain')}</details>"


def _licences(account: Account) -> str:
    if not account.licence_counts:
        return ""
    rows = [(f"{name}{forbids(name)}", f"{count:,}") for name, count in account.licence_counts.items()]
    return f"<h2>Licences</h2>\n{table(('licence', 'samples'), rows, kind='plain')}"


def _galleries(account: Account, galleries: Galleries, previews: Previews) -> list[str]:
    sections = ["<h2>What was left out</h2>"] if galleries.of_reason else []
    by_reason = account.left_out_by_reason
    for reason, gallery in galleries.of_reason.items():
        counts = [f"{by_reason[reason]:,} {account.counted}"]
        if reason == "conflicting_labels":
            counts.append(f"{gallery.num_all:,} pictures")
        sections.append(_gallery_heading(reason, counts, gallery, meaning=MEANING_OF_REASON[reason]))
        sections.append(_gallery(gallery, previews))
    if groups := galleries.of_groups.num_all:
        meaning = (
            "nearly the same picture under several classes, one of which may be wrong; that is no reason to be left out"
        )
        sections.append("<h2>What may be under a wrong class</h2>")
        sections.append(_gallery_heading("groups", [f"{groups:,}"], galleries.of_groups, meaning=meaning))
        sections.append(_gallery(galleries.of_groups, previews))
    return sections


def _gallery_heading(name: str, counts: Sequence[str], gallery: Gallery, *, meaning: str) -> str:
    shown = len(gallery.exhibits)
    told = [*counts] if shown == gallery.num_all else [*counts, f"{shown:,} shown, evenly spaced"]
    return (
        f'<h3 id="{name}">{name} <span>{escape(" · ".join(told))}</span></h3>\n<p class="meaning">{escape(meaning)}</p>'
    )


def _gallery(gallery: Gallery, previews: Previews) -> str:
    if not gallery.has_pictures:
        return f'<ul class="names">{"".join(_name(exhibit) for exhibit in gallery.exhibits)}</ul>'
    return f'<div class="gallery">{"".join(_exhibit(exhibit, previews) for exhibit in gallery.exhibits)}</div>'


def _name(exhibit: Exhibit) -> str:
    """A line for what has no bytes to look at."""
    sources = ", ".join(f"<code>{_text(view.source)}</code>" for view in exhibit.views)
    told = [part for part in (exhibit.views[0].class_name, exhibit.detail) if part]
    return f"<li>{sources} {' · '.join(map(_text, told))}</li>"


def _exhibit(exhibit: Exhibit, previews: Previews) -> str:
    views = "".join(_view(view, None if view.place is None else previews[view.place]) for view in exhibit.views)
    told = [exhibit.detail] if exhibit.detail else []
    told += [f"and {exhibit.num_more:,} more"] if exhibit.num_more else []
    detail = f'<p class="detail">{_text(", ".join(told))}</p>' if told else ""
    return f'<article class="exhibit of{len(exhibit.views)}"><div class="views">{views}</div>{detail}</article>'


def _view(view: View, preview: Preview | None) -> str:
    role = f'<span class="role">{escape(view.role)}</span>' if view.role else ""
    class_name = "" if view.class_name is None else f"<b>{_text(view.class_name)}</b>"
    return f"<figure>{_frame(preview)}<figcaption>{role}{class_name}<code>{_text(view.source)}</code></figcaption></figure>"


def _frame(preview: Preview | None) -> str:
    match preview:
        case Thumbnail(jpeg, width, height):
            uri = data_uri(jpeg, media_type="image/jpeg")
            return f'<div class="frame"><img alt="" title="{width:,} × {height:,}" src="{uri}"></div>'
        case Opening(text):
            return f'<div class="frame words">{escape(text)}</div>'
        case _:
            return '<div class="frame none">no picture</div>'


def _text(text: str) -> str:
    return escape(shortened(text))
