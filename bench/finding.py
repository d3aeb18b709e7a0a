"""A finding: our number beside a peer's in one run, the ratio of the two, and whether the goal is reached."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeVar

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Goal:
    """What a ratio (or, where there is no peer, our own number) should be: at most or at least this much."""

    kind: Literal["at most", "at least"]
    limit: float

    def is_reached_by(self, number: float) -> bool:
        return number <= self.limit if self.kind == "at most" else number >= self.limit


@dataclass(frozen=True)
class Finding:
    """One line of the table. `ratio` is ours / peer's, the median over the repeats; without a peer both are None."""

    what: str
    unit: str
    ours: float
    peer_name: str
    peer: float | None
    ratio: float | None
    goal: Goal

    @property
    def is_reached(self) -> bool:
        return self.goal.is_reached_by(self.ours if self.ratio is None else self.ratio)


def interleave(measures: Sequence[Callable[[int], Measured]], *, repeats: int) -> list[list[Measured]]:
    """Measure in turn, A B C B C A C A B …, so that what disturbs the machine disturbs all; returns a list for each.

    Each measure is given the number of the repeat.
    """
    results: list[list[Measured]] = [[] for _ in measures]
    for repeat in range(repeats):
        for turn in range(len(measures)):
            which = (turn + repeat) % len(measures)
            results[which].append(measures[which](repeat))
    return results


def cpu_ms_of(act: Callable[[], None]) -> Callable[[int], float]:
    """A measure: the CPU time, user + system, that this process spends on one call, in milliseconds."""

    def measure(repeat: int) -> float:
        started_s = time.process_time()
        act()
        return 1000.0 * (time.process_time() - started_s)

    return measure


def compare(
    what: str, unit: str, ours: Sequence[float], peer: Sequence[float], *, peer_name: str, goal: Goal
) -> Finding:
    """Compare two series that were measured in turn: medians of each, and the median of the ratios of each pair."""
    ratio = median(one / other for one, other in zip(ours, peer, strict=True))
    return Finding(what, unit, median(ours), peer_name, median(peer), ratio, goal)


def alone(what: str, unit: str, ours: Sequence[float], *, goal: Goal) -> Finding:
    """A number of ours that no peer has; the goal is for the number itself."""
    return Finding(what, unit, median(ours), "", None, None, goal)
