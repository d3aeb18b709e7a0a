"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup_steps`, then cosine, linear, constant or wsd from `peak_lr` to `final_lr` at `total_steps`.

    wsd (warm-up, stable, decay) stays at `peak_lr` and falls linearly over the last `decay_steps`, which no other kind reads.
    Source: Hu et al. 2024 (MiniCPM); the linear fall: Hägele et al. 2024.
    """

    kind: Literal["cosine", "linear", "constant", "wsd"]
    peak_lr: float
    final_lr: float
    warmup_steps: int
    total_steps: int
    decay_steps: int = 0

    def learning_rate(self, step: int) -> float:
        """The rate of the update that follows `step` completed ones.

        Warm-up reaches `peak_lr` at step `warmup_steps` and begins above zero, at peak_lr / (warmup_steps + 1), so that
        no update is wasted. The last update, at total_steps − 1, is the last before `final_lr`.
        """
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / (self.warmup_steps + 1)
        fall_from = self.total_steps - self.decay_steps if self.kind == "wsd" else self.warmup_steps
        if self.kind == "constant" or step < fall_from:
            return self.peak_lr
        progress = (step - fall_from) / max(1, self.total_steps - fall_from)
        share = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1.0 - progress
        return self.final_lr + (self.peak_lr - self.final_lr) * share
