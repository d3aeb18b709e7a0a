"""The tables of epochs and of runs, as text for the screen; the page shows the same cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from aplantida_dist.analysis.curves import Curves, Series, best_epoch, classes_of, finite
from aplantida_dist.analysis.wording import ABSENT, list_text, loss_text, percent_text, rate_text, speed_text


@dataclass(frozen=True)
class Table:
    """Column heads, and rows of cells; `marked` is the index of the row to set off."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: int | None = None


def epoch_table(curves: Curves) -> Table:
    """One row an epoch; a series without any value has no column. The best epoch is marked."""
    candidates: tuple[tuple[str, Series, Callable[[float | None], str]], ...] = (
        ("learning rate", curves.learning_rate, rate_text),
        ("train loss", curves.train.loss, loss_text),
        ("train top-1", curves.train.top1, percent_text),
        ("train top-5", curves.train.top5, percent_text),
        ("val loss", curves.val.loss, loss_text),
        ("val top-1", curves.val.top1, percent_text),
        ("val top-5", curves.val.top5, percent_text),
        ("clean val loss", curves.clean.loss, loss_text),
        ("clean val top-1", curves.clean.top1, percent_text),
        (f"EMA {curves.judged_name} loss", curves.ema.loss, loss_text),
        (f"EMA {curves.judged_name} top-1", curves.ema.top1, percent_text),
        *((f"{curves.judged_name} {name}", series, percent_text) for name, series in classes_of(curves.judged).items()),
        ("images/s", curves.images_per_s, speed_text),
        ("wait", curves.wait_fraction, percent_text),
    )
    held = [(head, series, text) for head, series, text in candidates if any(value is not None for value in series)]
    best = best_epoch(curves)
    return Table(
        heads=("epoch", *(head for head, _, _ in held)),
        rows=tuple(
            (str(epoch), *(text(series[i]) for _, series, text in held)) for i, epoch in enumerate(curves.epochs)
        ),
        marked=best.index if best else None,
    )


def run_table(runs: Sequence[Curves], *, gravest: Sequence[str]) -> Table:
    """One row a run at its best epoch, for comparison by the judged curves; `gravest` names the gravest verdict of each run."""
    return Table(
        heads=(
            "run",
            "verdict",
            "epochs",
            "best epoch",
            "val top-1",
            "val top-5",
            "val loss",
            "last train loss",
            "images/s",
            "wait",
        ),
        rows=tuple((curves.name, verdict, *_run_cells(curves)) for curves, verdict in zip(runs, gravest, strict=True)),
        marked=_best_run(runs),
    )


def best_line(curves: Curves) -> str:
    """The best epoch in words, or why there is none."""
    best = best_epoch(curves)
    if best is None:
        return (
            "best epoch: none, no validation metric moved"
            if any(finite(s) for s in _val(curves))
            else "best epoch: none, no validation"
        )
    value = percent_text(best.value) if best.is_top1 else loss_text(best.value)
    others = [
        f"{name} {text}"
        for name, text in (
            (f"{curves.judged_name} top-5", percent_text(curves.judged.top5[best.index])),
            (f"{curves.judged_name} loss", loss_text(curves.judged.loss[best.index])),
        )
        if name != best.metric and text != ABSENT
    ]
    return f"best epoch: {curves.epochs[best.index]}, {best.metric} {value}{' (' + list_text(others) + ')' if others else ''}"


def as_text(table: Table, *, most: int) -> str:
    """Lay a table out for the screen: right-aligned, the marked row with a star; at most `most` rows and the marked one."""
    widths = [max(map(len, column)) for column in zip(table.heads, *table.rows, strict=True)]
    head_rows = len(table.rows) if len(table.rows) <= most else most // 2
    tail_start = max(head_rows, len(table.rows) - most // 2)
    lines = [_line(table.heads, widths, mark=" ")]
    skipped = 0
    for i, row in enumerate(table.rows):
        if head_rows <= i < tail_start and i != table.marked:
            skipped += 1
            continue
        if skipped:
            lines.append(f"    … {skipped} more")
            skipped = 0
        lines.append(_line(row, widths, mark="*" if i == table.marked else " "))
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int], *, mark: str) -> str:
    return f"{mark} " + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _run_cells(curves: Curves) -> tuple[str, ...]:
    best, losses = best_epoch(curves), finite(curves.train.loss)
    at = best.index if best else None
    speeds, waits = (list(finite(series).values()) for series in (curves.images_per_s, curves.wait_fraction))
    return (
        str(len(curves.epochs)),
        ABSENT if at is None else str(curves.epochs[at]),
        percent_text(None if at is None else curves.judged.top1[at]),
        percent_text(None if at is None else curves.judged.top5[at]),
        loss_text(None if at is None else curves.judged.loss[at]),
        loss_text(losses[max(losses)] if losses else None),
        speed_text(median(speeds) if speeds else None),
        percent_text(median(waits) if waits else None),
    )


def _best_run(runs: Sequence[Curves]) -> int | None:
    """The run with the highest val top-1; None where fewer than two hold one."""
    values = {i: best.value for i, curves in enumerate(runs) if (best := best_epoch(curves)) and best.is_top1}
    return max(values, key=lambda i: values[i]) if len(values) > 1 else None


def _val(curves: Curves) -> tuple[Series, ...]:
    return curves.judged.loss, curves.judged.top1
