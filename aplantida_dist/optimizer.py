"""The optimizer, made by timm from its name, its rate, and adaptive clipping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import adaptive_clip_grad
from torch import nn

from aplantida_dist.errors import UserError


class OptimizerError(UserError):
    """timm knows no such optimizer, will not make it with these arguments, or it cannot be resumed exactly."""


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    peak_lr: float,
    weight_decay: float,
    layer_decay: float | None,
    kwargs: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Make a timm optimizer of the parameters that require a gradient.

    Not decayed are parameters of one dimension (biases, scales and shifts of norms, layer scales) and those that the model's
    `no_weight_decay` names; without `layer_decay` also biases of more dimensions. With it, the groups carry an
    `lr_scale`: 1 for the head, a factor `layer_decay` less for each layer below. `set_learning_rate` sets the rate
    at every step; optimizers whose decay follows the share of the peak ask for `peak_lr` beforehand.
    """
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model, opt=name, lr=peak_lr, weight_decay=weight_decay, layer_decay=layer_decay, **kwargs
        )
    except Exception as error:
        # An unknown name is a ValueError, a wrong argument the optimizer's own TypeError or ValueError, a missing GPU
        # or library an AssertionError or ImportError.
        reason = " ".join(str(error).split())
        raise OptimizerError(
            f"optimizer {name!r} cannot be made: {reason}; see timm.optim.list_optimizers()"
        ) from error
    _require_usable(optimizer, name)
    if layer_decay not in (None, 1.0) and all(group["lr_scale"] == 1.0 for group in optimizer.param_groups):
        raise OptimizerError(
            f"optimizer.layer_decay: found {layer_decay}, but timm sees a single layer in this model; set it to null"
        )
    return optimizer


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set the rate of every parameter group, times its `lr_scale` where layer-wise decay gave it one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def clip_adaptively(parameters: Iterable[nn.Parameter], clip_factor: float) -> None:
    """Scale the gradient of each unit (a row of a weight, a whole bias) to at most `clip_factor` times the norm of its weights.

    A norm of weights below 1e-3 counts as 1e-3. Parameters without a gradient are left alone. Source: Brock et al. 2021.
    """
    adaptive_clip_grad(parameters, clip_factor=clip_factor)


def _require_usable(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Refuse what the loop cannot drive and a checkpoint cannot hold."""
    if getattr(optimizer, "is_second_order", False):
        raise OptimizerError(
            f"optimizer {name!r} needs second derivatives, which the loop does not compute; choose another"
        )
    hidden = sorted(optimizer.state_dict().keys() - {"state", "param_groups"})
    if hidden:
        raise OptimizerError(
            f"optimizer {name!r} keeps {', '.join(hidden)} beside its parameters' state, so that a resume would not be exact; choose another"
        )
