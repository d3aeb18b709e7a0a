"""The EMA: a second set of weights that follows the trained ones as their running average, one move a step."""

from __future__ import annotations

from dataclasses import dataclass

from timm.utils import ModelEmaV3
from torch import nn

from aplantida_dist.world import World


@dataclass(frozen=True)
class Ema:
    """The exponential moving average of a model (Polyak & Juditsky 1992), kept by timm; `model` holds it, ready to be evaluated.

    After the step that completes n updates, average ← d(n)·average + (1 − d(n))·weights. d(1) is 0, so that the initial weights
    have no share. From the second update on d(n) is the decay, or, with warm-up, min(decay, 1 − n^(−2/3)).
    It depends on n alone, so that a resumed run needs the average and no state beside it. Floating buffers (BatchNorm's
    statistics) are averaged like weights, integers copied. Weights are the same on every rank and so is their average; buffers
    are each rank's own, and evaluation and checkpoint take the main process's, as they do of the model itself.
    """

    trained: nn.Module
    average: ModelEmaV3
    model: nn.Module

    def update(self, *, completed_steps: int) -> None:
        """Move towards the trained model's weights after so many completed updates, at least 1, without waiting for the device."""
        self.average.update(self.trained, step=completed_steps)


def build_ema(model: nn.Module, *, world: World, decay: float, warmup: bool) -> Ema:
    """Begin to average a bare model, before `World.prepare` sees it: a copy of the forward that it makes would run the original."""
    # torch moves many tensors at once only where all of them are spread, and buffers never are.
    is_mixed = world.spreads_parameters and any(buffer.is_floating_point() for buffer in model.buffers())
    average = ModelEmaV3(model, decay=decay, use_warmup=warmup, foreach=not is_mixed)
    return Ema(model, average, world.prepare_beside(average.module))
