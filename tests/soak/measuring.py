"""The measuring: memory and descriptors of long-lived processes over time, and the slope of each with its error."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from tests.soak.processes import Tree, num_descriptors, resident_mib

EVERY_S = 0.5
WARM_UP_SHARE = 0.25
"""The head of a process's life that is left out: caches fill, allocators grow, libraries load."""
NUM_BLOCKS = 12
"""Samples close in time say nearly the same, so the line goes through the means of so many blocks, which are nearly independent."""
JUDGED_FROM_S = 600.0
"""A shorter life is told and not judged: it is all warm-up."""
MAX_MIB_PER_HOUR = 10.0
"""What a run may grow in an hour, however long its epochs are: 1.6 GiB in a week."""
MAX_KIB_PER_EPOCH = 16.0
"""What an epoch may leave beside. A row of the history stays in memory, 6 KiB of objects and text; the soak's epochs last 5 s, and
the heap's fragmentation and W&B's client grow with their number, too. Of epochs of some minutes it is nothing beside the hour's."""
MAX_DESCRIPTORS_PER_MIN = 0.1


@dataclass(frozen=True)
class Slope:
    """A straight line through samples: its rise a minute, the standard error of that, and the last value."""

    per_min: float
    error: float
    last: float
    seconds: float

    def is_flat(self, limit_per_min: float) -> bool:
        """Whether no rise beyond the limit is proven, at three standard errors; a life that is too short proves nothing."""
        return self.seconds < JUDGED_FROM_S or self.per_min - 3 * self.error <= limit_per_min

    def text(self, unit: str) -> str:
        judged = "" if self.seconds >= JUDGED_FROM_S else " (too short to judge)"
        return f"{self.per_min:+.3f} ± {self.error:.3f} {unit}/min over {self.seconds:.0f} s{judged}, at the end {self.last:.1f}"


@dataclass
class Life:
    """The samples of one process: seconds, MiB, open descriptors."""

    seconds: list[float] = field(default_factory=list)
    resident_mib: list[float] = field(default_factory=list)
    descriptors: list[float] = field(default_factory=list)


class Lives:
    """The samples of an attempt's long-lived processes, by role."""

    def __init__(self) -> None:
        self._lives: dict[tuple[str, int], Life] = defaultdict(Life)

    def sample(self, tree: Tree, now_s: float) -> None:
        """Look at each once."""
        for role, pid in tree.roles.items():
            try:
                mib, descriptors = resident_mib(pid), num_descriptors(pid)
            except OSError:
                continue  # it has just ended
            life = self._lives[role, pid]
            life.seconds.append(now_s)
            life.resident_mib.append(mib)
            life.descriptors.append(descriptors)

    @property
    def minutes(self) -> float:
        """From the first sample of the longest life to its last."""
        return max(life.seconds[-1] - life.seconds[0] for life in self._lives.values()) / 60

    def longest(self) -> dict[str, Life]:
        """Of each role the process that lived longest."""
        found: dict[str, Life] = {}
        for (role, _), life in self._lives.items():
            if role not in found or len(life.seconds) > len(found[role].seconds):
                found[role] = life
        return found


def max_mib_per_min(epochs_per_min: float) -> float:
    """The rise of memory that is allowed to a process that trains so many epochs a minute."""
    return MAX_MIB_PER_HOUR / 60 + MAX_KIB_PER_EPOCH / 1024 * epochs_per_min


def slope_of(seconds: list[float], values: list[float]) -> Slope | None:
    """The line through the block means of all but the warm-up; None where there are too few samples for it."""
    first = int(len(seconds) * WARM_UP_SHARE)
    times, ys = np.array(seconds[first:]), np.array(values[first:])
    if len(times) < 2 * NUM_BLOCKS:
        return None
    minutes = np.array([block.mean() for block in np.array_split(times, NUM_BLOCKS)]) / 60
    means = np.array([block.mean() for block in np.array_split(ys, NUM_BLOCKS)])
    offsets = minutes - minutes.mean()
    per_min = float(offsets @ means / (offsets @ offsets))
    rest = means - means.mean() - per_min * offsets
    error = float(np.sqrt(rest @ rest / (NUM_BLOCKS - 2) / (offsets @ offsets)))
    return Slope(per_min, error, float(ys[-1]), seconds[-1] - seconds[0])
