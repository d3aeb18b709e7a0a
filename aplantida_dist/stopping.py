"""Early stopping: whether the rows of a history say that training has stopped helping. A pure function of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from aplantida_dist.history import Row


@dataclass(frozen=True)
class Stopping:
    """When to stop: `metric` (a dotted name in a row) has not become better by more than `min_delta` for `patience_epochs`."""

    metric: str
    mode: Literal["max", "min"]
    patience_epochs: int
    min_delta: float


def reason_to_stop(rows: Sequence[Row], stopping: Stopping) -> str | None:
    """Why a run with these rows stops after the last of them; None where it goes on.

    The first value counts as better than nothing; a later one if it is better than the last that counted, by more than
    min_delta. Rows that do not hold the metric show nothing. Where a split leaks, its clean part is judged, as for `best`.
    """
    sign = 1.0 if stopping.mode == "max" else -1.0
    best, best_epoch, judged_epoch = None, 0, 0
    for row in rows:
        value = row.metric(row.clean_name(stopping.metric))
        if value is None:
            continue
        judged_epoch = row.epoch
        if best is None or sign * (value - best) > stopping.min_delta:
            best, best_epoch = value, row.epoch
    waited_epochs = judged_epoch - best_epoch
    if waited_epochs < stopping.patience_epochs:
        return None
    verb = "risen" if stopping.mode == "max" else "fallen"
    by = f" by more than {stopping.min_delta:g}" if stopping.min_delta else ""
    return (
        f"stopped early at epoch {judged_epoch}: {stopping.metric} has not {verb}{by} for {waited_epochs} epochs; "
        f"it was {best:.6g} at epoch {best_epoch}"
    )
