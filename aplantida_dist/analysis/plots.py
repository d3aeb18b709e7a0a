"""The drawing: panels in, PNG bytes out. Only importer of matplotlib; no pyplot, so no state outlives a call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from aplantida_dist.analysis.curves import finite
from aplantida_dist.analysis.panels import Level, Line, Mark, Panel
from aplantida_dist.analysis.theme import Theme

FONT = "DejaVu Sans"
"""Comes with matplotlib, so that a plot looks the same on every machine."""

WIDTH_IN = 5.4
"""A phone shows this width at two thirds: text of 9 points stays readable."""

HEIGHT_IN = 3.1
DPI = 200
LABEL_LETTERS = 18
SHORT_HISTORY = 40
"""Up to this many epochs each one gets a dot; beyond, dots would merge into a thick line."""


def draw(panel: Panel, *, theme: Theme) -> bytes:
    """Draw one panel as a PNG."""
    figure = _figure(WIDTH_IN, HEIGHT_IN, theme=theme)
    _draw_panel(figure.add_subplot(), panel, theme=theme)
    return _png(figure)


def draw_overview(panels: Sequence[Panel], *, title: str, theme: Theme) -> bytes:
    """Draw the panels on one sheet of two columns."""
    num_rows = math.ceil(len(panels) / 2)
    figure = _figure(2 * WIDTH_IN, HEIGHT_IN * num_rows + 0.5, theme=theme)
    figure.suptitle(
        _drawable(title, most=70), x=0.012, ha="left", color=theme.ink, fontsize=14, fontweight="bold", fontfamily=FONT, parse_math=False
    )  # fmt: skip
    for i, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(num_rows, 2, i + 1), panel, theme=theme)
    return _png(figure)


def _figure(width_in: float, height_in: float, *, theme: Theme) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.1)
    return Figure(figsize=(width_in, height_in), dpi=DPI, layout=layout, facecolor=theme.paper)


def _draw_panel(axes: Axes, panel: Panel, *, theme: Theme) -> None:
    _style(axes, panel, theme=theme)
    num_epochs = max(len(line.epochs) for line in panel.lines)
    for line in panel.lines:
        _draw_line(axes, line, dots=num_epochs <= SHORT_HISTORY, theme=theme)
    first, last = min(min(line.epochs) for line in panel.lines), max(max(line.epochs) for line in panel.lines)
    margin = 0.03 * (last - first) or 0.5
    axes.set_xlim(first - margin, last + margin)
    axes.set_ylim(*panel.heights())
    for level in panel.levels:
        _draw_level(axes, level, theme=theme)
    for mark in panel.marks:
        _draw_mark(axes, mark, alone=len(panel.marks) == 1, theme=theme)
    _label_ends(axes, panel.lines, theme=theme)
    _flag_not_finite(axes, panel.lines, theme=theme)


def _style(axes: Axes, panel: Panel, *, theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    axes.set_title(panel.title, loc="left", color=theme.ink, fontsize=11, fontweight="bold", fontfamily=FONT, pad=10)
    axes.set_title(panel.note, loc="right", color=theme.soft, fontsize=8.5, fontfamily=FONT, pad=10)
    axes.annotate(
        "epoch", (1.0, 0.0), xycoords="axes fraction", xytext=(5, -5), textcoords="offset points",
        va="top", color=theme.soft, fontsize=9, fontfamily=FONT,
    )  # fmt: skip
    axes.tick_params(colors=theme.soft, labelsize=9, length=0, pad=5, labelfontfamily=FONT)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=theme.grid, zorder=0.6)  # above the grid, below a curve of zeros
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent_tick if panel.percent else _number_tick))


def _percent_tick(value: float, _: int) -> str:
    return f"{100.0 * value:.4g} %"


def _number_tick(value: float, _: int) -> str:
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def _draw_line(axes: Axes, line: Line, *, dots: bool, theme: Theme) -> None:
    values = [math.nan if v is None or not math.isfinite(v) else v for v in line.values]
    axes.plot(
        line.epochs,
        values,
        color=_colour(line.hue, theme),
        linewidth=1.3 if line.faint else 1.9,
        alpha=0.5 if line.faint else 1.0,
        linestyle=(0, (3, 1.5)) if line.faint else "-",
        marker="o" if dots and not line.faint else "",
        markersize=3.2,
        solid_capstyle="round",
        solid_joinstyle="round",
        clip_on=False,
    )


def _draw_level(axes: Axes, level: Level, *, theme: Theme) -> None:
    low, high = axes.get_ylim()
    if not low <= level.value <= high:
        return
    axes.axhline(level.value, color=theme.soft, linewidth=1.0, linestyle=(0, (1, 2)))
    axes.annotate(
        level.text, (1.0, level.value), xycoords=("axes fraction", "data"), xytext=(0, -4), textcoords="offset points",
        ha="right", va="top", color=theme.soft, fontsize=8.5, fontfamily=FONT,
    )  # fmt: skip


def _draw_mark(axes: Axes, mark: Mark, *, alone: bool, theme: Theme) -> None:
    """A ring on the best epoch; its words only where no other mark competes for the place."""
    axes.plot(
        [mark.epoch],
        [mark.value],
        marker="o",
        markersize=8,
        markerfacecolor="none",
        markeredgewidth=1.6,
        markeredgecolor=_colour(mark.hue, theme),
    )
    if not alone:
        return
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    across, up = (mark.epoch - left) / (right - left), (mark.value - low) / (high - low)
    axes.annotate(
        mark.text,
        (mark.epoch, mark.value),
        xytext=(0, -14 if up > 0.5 else 14),
        textcoords="offset points",
        ha="right" if across > 0.7 else "left" if across < 0.3 else "center",
        va="top" if up > 0.5 else "bottom",
        color=_colour(mark.hue, theme),
        fontsize=9,
        fontweight="bold",
        fontfamily=FONT,
        bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 1.5, "alpha": 0.8},
    )


def _label_ends(axes: Axes, lines: Sequence[Line], *, theme: Theme) -> None:
    """Write each name at the end of its curve, in its colour, pushed apart where ends meet."""
    low, high = axes.get_ylim()
    ends = []
    for line in lines:
        values = finite(line.values)
        if line.label and values:
            ends.append(((values[max(values)] - low) / (high - low), line))
    ends.sort(key=lambda end: end[0])
    for height, (_, line) in zip(_apart([height for height, _ in ends], gap=0.075), ends, strict=True):
        axes.annotate(
            _drawable(line.label, most=LABEL_LETTERS), (1.0, height), xycoords="axes fraction", xytext=(5, 0), textcoords="offset points",
            va="center", color=_colour(line.hue, theme), fontsize=9, fontweight="bold", fontfamily=FONT, annotation_clip=False, parse_math=False,
        )  # fmt: skip


def _apart(heights: Sequence[float], *, gap: float) -> list[float]:
    """Move sorted heights as little as keeps neighbours `gap` apart and all within the axes where there is room."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else max(height, 0.02))
    ceiling = 0.98
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _flag_not_finite(axes: Axes, lines: Sequence[Line], *, theme: Theme) -> None:
    """A cross on the floor for every epoch with a NaN or an infinity."""
    bad = sorted(
        {
            e
            for line in lines
            for e, v in zip(line.epochs, line.values, strict=True)
            if v is not None and not math.isfinite(v)
        }
    )
    if bad:
        floor = axes.get_xaxis_transform()
        axes.plot(
            bad,
            [0.02] * len(bad),
            marker="x",
            markersize=5,
            linestyle="",
            color=theme.alarm,
            transform=floor,
            clip_on=False,
        )
        axes.annotate(
            "not a number", (bad[0], 0.02), xycoords=floor, xytext=(0, 7), textcoords="offset points",
            color=theme.alarm, fontsize=8.5, fontfamily=FONT,
        )  # fmt: skip


def _colour(hue: int, theme: Theme) -> str:
    return theme.hues[hue % len(theme.hues)]


def _drawable(text: str, *, most: int) -> str:
    """Text that the font can draw, cut in its middle; letters that it lacks become `?`."""
    known = "".join(letter if ord(letter) in _letters() else "?" for letter in text)
    return known if len(known) <= most else f"{known[: most * 2 // 3 - 1]}…{known[-(most // 3) :]}"


@cache
def _letters() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT)).get_charmap())


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()
