"""Voiding: how the ranks tell each other of samples that could not be delivered, and what a step is divided by without them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from aplantida_dist.bad_samples import Entry
from aplantida_dist.record import Record
from aplantida_dist.world import World


def record_across_ranks(found: Sequence[Entry], *, world: World, record: Record) -> None:
    """Collective. Put every rank's new bad samples into the ledger; BadSampleError, on every rank, beyond the budget.

    What is written does not depend on the number of ranks: it is in the order of the plan.
    """
    gathered = [entry for entries in world.gather_across_ranks(list(found)) for entry in entries]
    if gathered:
        gathered.sort(key=lambda entry: (entry.step, entry.slot, entry.place))
        world.learn_from_main_across_ranks(lambda: record.write_bad_samples(gathered))


def divide_by_the_rest_across_ranks(model: nn.Module, *, num_bad: int, num_planned: int, world: World) -> None:
    """Collective. Make a step's gradient, whose loss was divided by the planned samples, that of Σ w·ℓ / Σ w over the others.

    num_bad: of this rank. Where none is bad the factor is exactly 1, and no bit changes; where all are, the gradient stays 0.
    Does not wait for the device.
    """
    bad = world.sum_across_ranks(torch.full((), num_bad, dtype=torch.int64, device=world.device))
    factor = num_planned / (num_planned - bad).clamp(min=1)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
