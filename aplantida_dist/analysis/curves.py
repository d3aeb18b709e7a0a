"""Curves: the one value that every kind of history is read into, and the plain questions asked of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from aplantida_dist.history import Row

Series = tuple[float | None, ...]
"""One value an epoch; None where the source holds none. NaN and infinities stay as they are: they are evidence."""

Split = Literal["train", "val"]


@dataclass(frozen=True)
class SplitCurves:
    """The curves of one split. Accuracies are fractions, whatever the source wrote.

    The last four are means over classes: all that are present, and those that are many, medium or few in train. They are empty
    where the source does not know them.
    """

    loss: Series
    top1: Series
    top5: Series
    macro_top1: Series = ()
    many_top1: Series = ()
    medium_top1: Series = ()
    few_top1: Series = ()


@dataclass(frozen=True)
class Curves:
    """One run as its history tells it: every series is as long as `epochs`.

    `clean` are the val curves over the samples that were not trained on, and `leaked` counts the others; both are empty where
    nothing has leaked. `ema` are those of the averaged weights over the samples that the run is judged by; empty where it kept none.
    `rows` is our own record and empty for the files of other trainers. `column_lengths` is what a columns file held before it was
    filled up with None. `unreadable` names the values that were no numbers.
    """

    name: str
    path: Path
    epochs: tuple[int, ...]
    train: SplitCurves
    val: SplitCurves
    learning_rate: Series
    images_per_s: Series
    wait_fraction: Series
    num_classes: int | None = None
    num_classes_from: str = ""
    column_lengths: Mapping[str, int] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    config_text: str = ""
    clean: SplitCurves = SplitCurves((), (), ())
    leaked: Series = ()
    ema: SplitCurves = SplitCurves((), (), ())

    @property
    def judged(self) -> SplitCurves:
        """The validation curves that a run is judged by: those of the clean part, where val holds photographs that were trained on."""
        return self.clean if finite(self.leaked) else self.val

    @property
    def judged_name(self) -> str:
        """What to call them."""
        return "clean val" if finite(self.leaked) else "val"

    def split(self, split: Split) -> SplitCurves:
        """The curves of a split by its name."""
        return self.train if split == "train" else self.val

    def series(self) -> dict[str, Series]:
        """Every series by the name that people know it by."""
        named = {
            f"{split} {metric}": values
            for split in ("train", "val")
            for metric, values in metrics_of(self.split(split)).items()
        }
        return named | {
            "learning rate": self.learning_rate,
            "images/s": self.images_per_s,
            "wait fraction": self.wait_fraction,
        }


@dataclass(frozen=True)
class Best:
    """The best epoch: `index` into the series, the metric that chose it ("val top-1", "clean val loss", …) and its value."""

    index: int
    metric: str
    value: float

    @property
    def is_top1(self) -> bool:
        """Whether the value is a top-1; otherwise it is a loss."""
        return self.metric.endswith("top-1")


def metrics_of(split: SplitCurves) -> dict[str, Series]:
    """The series of a split by the name that people know them by."""
    return {"loss": split.loss, "top-1": split.top1, "top-5": split.top5}


def classes_of(split: SplitCurves) -> dict[str, Series]:
    """The series of means over classes by the name that people know them by."""
    return {
        "macro top-1": split.macro_top1,
        "many top-1": split.many_top1,
        "medium top-1": split.medium_top1,
        "few top-1": split.few_top1,
    }


def finite(series: Series) -> dict[int, float]:
    """The finite values of a series by their index."""
    return {i: value for i, value in enumerate(series) if value is not None and math.isfinite(value)}


def batchless_epochs(split: SplitCurves) -> tuple[int, ...]:
    """The indices of epochs whose metrics come from no batch at all.

    A mean loss of exactly 0 says that every sample was right and certain; beside accuracies of 0 it says that there was
    no sample. Without accuracies only a loss that is 0 in every epoch counts: a memorised set may round to 0 at its end.
    """
    losses = finite(split.loss)
    top1, top5 = finite(split.top1), finite(split.top5)
    all_zero = bool(losses) and not any(losses.values())
    return tuple(
        i
        for i, loss in losses.items()
        if loss == 0.0 and (not (top1.get(i) or top5.get(i)) if i in top1 or i in top5 else all_zero)
    )


def measured_losses(split: SplitCurves) -> dict[int, float]:
    """The finite losses by index, without the epochs that saw no batch."""
    return _measured(split, split.loss)


def measured_top1(split: SplitCurves) -> dict[int, float]:
    """The finite top-1 accuracies by index, without the epochs that saw no batch."""
    return _measured(split, split.top1)


def best_epoch(curves: Curves) -> Best | None:
    """The epoch of the highest judged top-1, else of the lowest val loss; the earliest of equals.

    None where neither was measured, or neither moved over several epochs: then no epoch is better than another.
    """
    top1, losses = measured_top1(curves.judged), measured_losses(curves.judged)
    if top1 and (len(top1) == 1 or len(set(top1.values())) > 1):
        index = max(top1, key=lambda i: top1[i])
        return Best(index, f"{curves.judged_name} top-1", top1[index])
    if losses and (len(losses) == 1 or len(set(losses.values())) > 1):
        index = min(losses, key=lambda i: losses[i])
        return Best(index, f"{curves.judged_name} loss", losses[index])
    return None


def _measured(split: SplitCurves, series: Series) -> dict[int, float]:
    without = set(batchless_epochs(split))
    return {i: value for i, value in finite(series).items() if i not in without}
