"""The panels: which curves stand together in a plot, as plain values that know nothing of drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from aplantida_dist.analysis.curves import Curves, Series, best_epoch, classes_of, finite
from aplantida_dist.analysis.wording import loss_text, percent_text

Floor = Literal["values", "zero", "whole"]
"""Where the heights of a panel begin and end: around its values, from zero up, or the whole of 0 to 100 %."""

NUM_RUN_HUES = 5
"""Hue 0 is the train curve of a lone run; runs take the others in turn."""


@dataclass(frozen=True)
class Line:
    """One curve: `hue` is the index of its colour, `faint` sets it back behind the others."""

    label: str
    epochs: tuple[int, ...]
    values: Series
    hue: int
    faint: bool = False


@dataclass(frozen=True)
class Mark:
    """A point to set off, with its words."""

    epoch: int
    value: float
    text: str
    hue: int


@dataclass(frozen=True)
class Level:
    """A horizontal line to read the curves against."""

    value: float
    text: str


@dataclass(frozen=True)
class Panel:
    """One plot. `name` is the stem of its file; `percent`: the values are fractions, shown in percent."""

    name: str
    title: str
    lines: tuple[Line, ...]
    floor: Floor
    percent: bool = False
    note: str = ""
    marks: tuple[Mark, ...] = ()
    levels: tuple[Level, ...] = ()

    def heights(self) -> tuple[float, float]:
        """The lowest and the highest height to show: the values with some air, and a level that is near them."""
        values = [value for line in self.lines for value in finite(line.values).values()]
        if self.floor == "whole" or not values:
            return 0.0, 1.0
        low, high = min(values), max(values)
        high = max([high, *(level.value for level in self.levels if low <= level.value <= 1.6 * high)])
        if low >= 0.0 and (self.floor == "zero" or low < 0.5 * high):
            low = 0.0
        air = 0.1 * (high - low) or 0.1 * abs(high) or 0.01
        return (low if low == 0.0 else low - air), (
            high + air if not self.percent or high > 1.0 else min(high + air, 1.0)
        )


def panels_of(runs: Sequence[Curves]) -> tuple[Panel, ...]:
    """The panels that these runs have data for: loss, top-1, top-5, means over classes, learning rate, throughput, wait fraction."""
    candidates = (
        _split_panel(
            "loss", "Loss", runs, lambda c: (c.train.loss, c.val.loss, c.clean.loss, c.ema.loss), percent=False
        ),
        _split_panel(
            "top1", "Top-1 accuracy", runs, lambda c: (c.train.top1, c.val.top1, c.clean.top1, c.ema.top1), percent=True
        ),
        _split_panel(
            "top5", "Top-5 accuracy", runs, lambda c: (c.train.top5, c.val.top5, c.clean.top5, c.ema.top5), percent=True
        ),
        _classes_panel(runs),
        _run_panel("learning_rate", "Learning rate", runs, lambda c: c.learning_rate, floor="zero"),
        _run_panel("throughput", "Images per second", runs, lambda c: c.images_per_s, floor="zero"),
        _run_panel("wait_fraction", "Time spent waiting for data", runs, lambda c: c.wait_fraction, floor="whole"),
    )
    return tuple(panel for panel in candidates if panel.lines)


def _split_panel(
    name: str,
    title: str,
    runs: Sequence[Curves],
    of: Callable[[Curves], tuple[Series, Series, Series, Series]],
    *,
    percent: bool,
) -> Panel:
    """train, val, its clean part and the EMA in a hue each for one run; for several a hue a run, with train faint behind what they are judged by."""
    several = len(runs) > 1
    lines: list[Line] = []
    marks: list[Mark] = []
    for i, curves in enumerate(runs):
        (train, val, clean, ema), hue = of(curves), _hue(i)
        judged = clean if curves.judged is curves.clean else val
        has_val = bool(finite(judged))
        train_label = "train" if not several else "" if has_val else curves.name
        lines.append(Line(train_label, curves.epochs, train, hue if several else 0, faint=several))
        lines.append(Line(curves.name if several else "val", curves.epochs, judged if several else val, hue))
        if not several:
            lines.append(Line("clean val", curves.epochs, clean, _hue(1)))
            lines.append(Line(f"EMA {curves.judged_name}", curves.epochs, ema, _hue(2)))
        marks.extend(_best_mark(curves, judged, hue=hue if several or judged is val else _hue(1), percent=percent))
    return Panel(
        name,
        title,
        _held(lines),
        floor="zero" if percent else "values",
        percent=percent,
        note="val solid, train dashed" if several else "",
        marks=tuple(marks),
        levels=() if percent else _guessing(runs),
    )


def _classes_panel(runs: Sequence[Curves]) -> Panel:
    """Validation top-1 averaged over classes: by frequency for one run; for several, that of the rare classes."""
    if len(runs) == 1:
        held = classes_of(runs[0].judged).items()
        lines = [
            Line(name.removesuffix(" top-1"), runs[0].epochs, values, _hue(i)) for i, (name, values) in enumerate(held)
        ]
        return Panel("classes", "Mean top-1 over classes, by frequency", _held(lines), floor="zero", percent=True)
    lines = [Line(c.name, c.epochs, c.judged.few_top1, _hue(i)) for i, c in enumerate(runs)]
    return Panel("classes", "Mean top-1 over classes with few train samples", _held(lines), floor="zero", percent=True)


def _run_panel(name: str, title: str, runs: Sequence[Curves], of: Callable[[Curves], Series], *, floor: Floor) -> Panel:
    lines = [Line("" if len(runs) == 1 else c.name, c.epochs, of(c), _hue(i)) for i, c in enumerate(runs)]
    return Panel(name, title, _held(lines), floor=floor, percent=floor == "whole")


def _hue(run: int) -> int:
    return 1 + run % NUM_RUN_HUES


def _held(lines: Sequence[Line]) -> tuple[Line, ...]:
    """The lines that have a value at all."""
    return tuple(line for line in lines if any(value is not None for value in line.values))


def _best_mark(curves: Curves, values: Series, *, hue: int, percent: bool) -> list[Mark]:
    best = best_epoch(curves)
    value = finite(values).get(best.index) if best else None
    if best is None or value is None:
        return []
    text = percent_text(value) if percent else loss_text(value)
    return [Mark(curves.epochs[best.index], value, f"{text} · epoch {curves.epochs[best.index]}", hue)]


def _guessing(runs: Sequence[Curves]) -> tuple[Level, ...]:
    """ln(classes), one for every number of classes among the runs."""
    known = sorted({c.num_classes for c in runs if c.num_classes and c.num_classes > 1})
    return tuple(Level(math.log(n), f"guessing: ln({n:,}) = {math.log(n):.2f}") for n in known)
