"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup_steps`, then cosine, linear or constant from `peak_lr` to `final_lr` at `total_steps`."""

    kind: Literal["cosine", "linear", "constant"]
    peak_lr: float
    final_lr: float
    warmup_steps: int
    total_steps: int

    def learning_rate(self, step: int) -> float:
        """The rate of the update that follows `step` completed ones.

        Warm-up reaches `peak_lr` at step `warmup_steps` and begins above zero, at peak_lr / (warmup_steps + 1), so that
        no update is wasted. The last update, at total_steps − 1, is the last before `final_lr`.
        """
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak_lr
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        share = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1.0 - progress
        return self.final_lr + (self.peak_lr - self.final_lr) * share
