"""The state of a run: all that it has learned, whole, as a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aplantida_dist.checkpoint import pack_optimizer
from aplantida_dist.spreading import gather_across_ranks


@dataclass(frozen=True)
class State:
    """The weights of the model, and of its EMA if it has one, under timm's names; the optimizer's as `pack_optimizer` takes it apart.

    The same whether the ranks held it in parts or each of them all of it. The main process alone has the tensors.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Tensor]
    optimizer_facts: Mapping[str, Any]


def take_state_across_ranks(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, ema: nn.Module | None, is_main: bool
) -> State:
    """Collective where parameters are spread. The state of a bare model, its optimizer and its EMA, as they are now."""
    optimizer_state, optimizer_facts = pack_optimizer(model, optimizer)
    return State(
        model=gather_across_ranks(model.state_dict(), is_main=is_main),
        ema=None if ema is None else gather_across_ranks(ema.state_dict(), is_main=is_main),
        optimizer=gather_across_ranks(optimizer_state, is_main=is_main),
        optimizer_facts=optimizer_facts,
    )
