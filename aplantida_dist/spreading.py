"""Spreading: tensors of which every rank holds a part (FSDP2), and how they are whole again. The only importer of DTensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from aplantida_dist.errors import UserError


class SpreadingError(UserError):
    """A model has nothing that could be made whole one at a time."""


def name_blocks(model: nn.Module) -> None:
    """Tell accelerate which modules are whole one at a time: the classes of those that the model keeps in sequences named `blocks`.

    So timm names them in its transformers and its convolutional models of today. All that is in no block (embeddings, the
    head) is whole at once. SpreadingError for a model without blocks, all of which would be.
    """
    classes = {
        type(block).__name__
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "blocks"
        for block in _blocks_in(module)
    }
    if not classes:
        raise SpreadingError(
            f"train.parallel: found fsdp, but {type(model).__name__} has no `blocks` that could be put together one at a "
            "time; set it to ddp"
        )
    # The attribute in which accelerate looks for them; it is the one of transformers' models.
    model._no_split_modules = sorted(classes)  # type: ignore[assignment]


def whole_across_ranks(tensor: Tensor) -> Tensor:
    """Collective where the tensor is spread: the whole of it, on its device. Any other tensor is whole already."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_across_ranks(tensors: Mapping[str, Tensor], *, is_main: bool) -> dict[str, Tensor]:
    """Collective where tensors are spread. The main process gets all of them whole, those that were spread on the host; the other ranks nothing.

    One tensor at a time is whole on the devices.
    """
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = whole_across_ranks(tensor)
        if is_main:
            gathered[name] = whole.detach().cpu() if isinstance(tensor, DTensor) else tensor
    return gathered


def laid_out_like(pattern: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor of the pattern's shape, which every rank has, spread as the pattern is, if it is; without communication."""
    if not isinstance(pattern, DTensor):
        return whole
    return distribute_tensor(whole, pattern.device_mesh, pattern.placements, src_data_rank=None)


def _blocks_in(module: nn.Module) -> Iterator[Any]:
    """What a sequence holds, and the sequences in it."""
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _blocks_in(child)
        elif any(True for _ in child.parameters()):
            yield child
