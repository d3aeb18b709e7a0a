"""The page: report.html as one file that needs nothing else, with everything that came from a user escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

from aplantida_dist.analysis.curves import Curves, best_epoch, finite
from aplantida_dist.analysis.stylesheet import STYLESHEET
from aplantida_dist.analysis.table import Table, epoch_table, run_table
from aplantida_dist.analysis.verdict import Verdict
from aplantida_dist.analysis.verdicts import JudgedRun, gravest
from aplantida_dist.analysis.wording import ABSENT, count_text, loss_text, name_text, percent_text, speed_text
from aplantida_dist.web_page import data_uri, heading, table, tiles, web_page


@dataclass(frozen=True)
class Picture:
    """One plot as PNG bytes, for light and for dark surroundings; `name` is its alternative text."""

    name: str
    light: bytes
    dark: bytes


def page(runs: Sequence[JudgedRun], *, together: Sequence[Verdict], pictures: Sequence[Picture]) -> str:
    """The whole page: verdicts first, then plots, epochs and what the runs were made of."""
    several = len(runs) > 1
    title = " · ".join(run.curves.name for run in runs)
    sections = [
        _header(runs, title=title),
        _comparison(runs) if several else _tiles(runs[0].curves),
        "<h2>Verdicts</h2>",
        _cards(together),
        *(_folded_cards(run) if several else _cards(run.verdicts) for run in runs),
        "<h2>Curves</h2>",
        f'<div class="plots">{"".join(map(_figure, pictures))}</div>',
        "<h2>Epochs</h2>",
        *(_epochs(run.curves, folded=several) for run in runs),
        "<h2>What it was measured on</h2>",
        *(_facts(run.curves) for run in runs),
        "<footer>Written by aplantida_dist.analyze. Accuracies are shares of the samples counted; losses are means over them.</footer>",
    ]
    return web_page(f"{title} – training report", sections, stylesheet=STYLESHEET)


def _header(runs: Sequence[JudgedRun], *, title: str) -> str:
    if len(runs) > 1:
        name, lead = f"{len(runs)} runs compared", title
    else:
        curves = runs[0].curves
        known = [count_text(len(curves.epochs), "epoch")]
        if curves.num_classes:
            known.append(count_text(curves.num_classes, "class", "classes"))
        if curves.rows:
            known.append(count_text(curves.rows[-1].train.expected_samples, "train sample"))
            known.append(f"last epoch ended {curves.rows[-1].time_utc}")
        name, lead = curves.name, " · ".join(known)
    return heading("Training report", name, lead=lead)


def _tiles(curves: Curves) -> str:
    """The four or five numbers that a reader wants first."""
    best, last = best_epoch(curves), len(curves.epochs) - 1
    numbers: list[tuple[str, str, str]] = []
    if best is not None:
        at = f"epoch {curves.epochs[best.index]}, the best"
        numbers += [
            (f"{curves.judged_name} top-1", percent_text(curves.judged.top1[best.index]), at),
            (f"{curves.judged_name} top-5", percent_text(curves.judged.top5[best.index]), at),
            (f"{curves.judged_name} loss", loss_text(curves.judged.loss[best.index]), at),
        ]
    numbers += [
        ("train top-1", percent_text(curves.train.top1[last]), f"epoch {curves.epochs[last]}, the last"),
        ("train loss", loss_text(curves.train.loss[last]), f"epoch {curves.epochs[last]}, the last"),
    ]
    if speeds := list(finite(curves.images_per_s).values()):
        waits = list(finite(curves.wait_fraction).values())
        numbers.append(
            ("images/s", speed_text(median(speeds)), f"{percent_text(median(waits) if waits else None)} waiting")
        )
    return tiles([number for number in numbers if number[1] != ABSENT])


def _comparison(runs: Sequence[JudgedRun]) -> str:
    compared = run_table([run.curves for run in runs], gravest=[gravest(run) for run in runs])
    return f"<h2>Comparison</h2>\n{_table(compared, kind='runs')}"


def _cards(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    return f'<div class="verdicts">{"".join(map(_card, verdicts))}</div>'


def _folded_cards(run: JudgedRun) -> str:
    """The cards of one of several runs; folded away where nothing is wrong."""
    worst = gravest(run)
    is_open = any(verdict.severity in ("error", "warning") for verdict in run.verdicts)
    return (
        f"<details{' open' if is_open else ''}><summary>{escape(run.curves.name)} – {escape(worst)}</summary>"
        f"{_cards(run.verdicts)}</details>"
    )


def _card(verdict: Verdict) -> str:
    remedy = f'<p class="remedy"><b>What to do:</b> {escape(verdict.remedy)}</p>' if verdict.remedy else ""
    return (
        f'<article class="verdict {verdict.severity}"><h3><span class="severity">{verdict.severity}</span>{escape(verdict.name)}</h3>'
        f'<p>{escape(verdict.evidence)}</p><p class="meaning">{escape(verdict.meaning)}</p>{remedy}</article>'
    )


def _figure(picture: Picture) -> str:
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data_uri(picture.dark)}">'
        f'<img alt="{escape(picture.name)}" src="{_data_uri(picture.light)}"></picture></figure>'
    )


def _data_uri(png: bytes) -> str:
    return data_uri(png, media_type="image/png")


def _epochs(curves: Curves, *, folded: bool) -> str:
    epochs = _table(epoch_table(curves), kind="epochs")
    if not folded:
        return epochs
    count = count_text(len(curves.epochs), "epoch")
    return f"<details><summary>{escape(curves.name)} – {count}</summary>{epochs}</details>"


def _table(content: Table, *, kind: str) -> str:
    return table(content.heads, content.rows, kind=kind, marked=content.marked)


def _facts(curves: Curves) -> str:
    """Where the history lies, its digests and its config."""
    facts = {"history": name_text(str(curves.path))}
    if curves.num_classes:
        facts["classes"] = f"{curves.num_classes:,} ({curves.num_classes_from})"
    if curves.rows:
        last = curves.rows[-1]
        facts |= {
            "step": f"{last.step:,}",
            "train samples": f"{last.train.num_samples:,} counted, {last.train.void_samples:,} void, {last.train.expected_samples:,} expected",
            "train identities": last.train.identity_digest,
        }
        if last.val is not None:
            facts["val samples"] = (
                f"{last.val.num_samples:,} counted, {last.val.void_samples:,} void, {last.val.expected_samples:,} expected"
            )
            facts["val identities"] = last.val.identity_digest
        facts |= {f"{kind.replace('_', ' ')} digest": str(value) for kind, value in last.to_json()["digests"].items()}
    told = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd>" for name, value in facts.items())
    config = f"<h3>config.yaml</h3><pre>{escape(curves.config_text)}</pre>" if curves.config_text else ""
    return f'<details><summary>{escape(curves.name)}</summary><dl class="facts">{told}</dl>{config}</details>'
