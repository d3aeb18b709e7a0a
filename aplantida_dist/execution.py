"""Execution: how a model computes what it computes. Memory layout, recomputation, compilation, BatchNorm over ranks."""

from __future__ import annotations

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from aplantida_dist.errors import UserError


class ExecutionError(UserError):
    """A model, or this machine, cannot compute in the way that the config asks for."""


def arrange(model: nn.Module, *, grad_checkpointing: bool, channels_last: bool, compile_with: str | None) -> None:
    """Set in place how a model computes; its parameters keep their names and values.

    `compile_with` is a backend of torch.compile. Every shape is compiled for itself: with torch's automatic dynamic shapes the
    code of a shape, and so the last bits, would depend on what was seen before it, and a resume would not be exact.
    """
    if grad_checkpointing:
        _checkpoint_gradients(model)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compile_with is not None:
        model.compile(backend=compile_with, dynamic=False)


def synchronize_batchnorm(model: nn.Module, *, device: torch.device) -> nn.Module:
    """The model with every BatchNorm replaced by one that takes its statistics over all ranks, under the same names and with the same weights.

    ExecutionError without a GPU, for which alone torch has it, and without a BatchNorm.
    """
    if not _has_batchnorm(model):
        raise ExecutionError("model.sync_batchnorm: this model has no BatchNorm; set it to false")
    if device.type != "cuda":
        raise ExecutionError(
            f"model.sync_batchnorm: torch's SyncBatchNorm needs GPUs, this process runs on {device.type}; set it to false"
        )
    return convert_batchnorm(model)


def convert_batchnorm(model: nn.Module) -> nn.Module:
    """The conversion itself, by timm, whose BatchNorms hold an activation, too."""
    converted: nn.Module = convert_sync_batchnorm(model)
    return converted


def _checkpoint_gradients(model: nn.Module) -> None:
    if _has_batchnorm(model):
        raise ExecutionError(
            "model.grad_checkpointing: this model has BatchNorm, whose running statistics would move twice a step when it is computed "
            "again; set it to false"
        )
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError) as error:
        raise ExecutionError("model.grad_checkpointing: timm cannot do it for this model; set it to false") from error


def _has_batchnorm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())
