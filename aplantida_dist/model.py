"""The model, made by timm from its name, and what timm knows of it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import resolve_model_input_args
from torch import Tensor, nn

from aplantida_dist.data.images import Interpolation
from aplantida_dist.errors import UserError
from aplantida_dist.seeds import derive

MIN_SHARE = 0.9
"""Share of the backbone's parameters that pretrained weights, or an ancestor, must give; below it the two are different models."""
REASON_CHARACTERS = 300


class ModelError(UserError):
    """timm knows no such model, or will not make it with these arguments."""


@dataclass(frozen=True)
class PixelConvention:
    """How the model wants its pixels, as timm's configuration of its weights states it: mean and std of 0 … 1 values a channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation
    crop_fraction: float


def build_model(
    name: str,
    *,
    num_classes: int,
    image_size: int,
    pretrained: bool,
    pretrained_file: str | None = None,
    kwargs: Mapping[str, Any],
    seed: int,
) -> nn.Module:
    """Make a timm model; the same seed gives the same initial weights on every rank.

    Models that are built for one input size are built for `image_size`. Pretrained weights come by timm's own loading, from
    `pretrained_file` where there is one; ModelError where they give less than MIN_SHARE of the backbone.
    """
    if pretrained_file is not None and not Path(pretrained_file).is_file():
        raise ModelError(f"model.pretrained_file: {pretrained_file}: no file is here; name one of weights for {name!r}")

    def make(**how: Any) -> nn.Module:
        torch.manual_seed(derive(seed, "init"))
        arguments = resolve_model_input_args(name, {"img_size": image_size}, **kwargs) | {"num_classes": num_classes}
        return cast(nn.Module, timm.create_model(**arguments, **how))

    try:
        if not pretrained:
            return make()
        overlay = None if pretrained_file is None else {"file": pretrained_file}
        model = make(pretrained=True, pretrained_cfg_overlay=overlay)
        share = _share_that_differs(model, make())
    except Exception as error:
        # timm raises whatever its model constructors raise: RuntimeError for an unknown name, TypeError for a wrong
        # argument, OSError and its hub's own errors for weights that cannot be fetched.
        raise ModelError(_advice(name, error, pretrained=pretrained, pretrained_file=pretrained_file)) from error
    if share < MIN_SHARE:
        raise ModelError(
            f"model {name!r}: the pretrained weights of {pretrained_file or 'timm'} give {100 * share:.1f} % of the backbone's "
            f"parameters, expected at least {100 * MIN_SHARE:.0f} %: timm leaves out what does not fit; name weights of this model"
        )
    return model


def _share_that_differs(model: nn.Module, initial: nn.Module) -> float:
    """The share of the backbone's parameters in tensors that are not as they were initialised."""
    initials, heads = dict(initial.named_parameters()), head_names(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if name not in heads}
    loaded = [name for name in sizes if not torch.equal(model.get_parameter(name), initials[name])]
    return sum(sizes[name] for name in loaded) / sum(sizes.values())


def head_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's tensors that hold a row for each class: weights and biases of its classifier."""
    classifier: Any = model.get_classifier()  # type: ignore[operator]
    modules = classifier if isinstance(classifier, tuple | list) else (classifier,)
    rows = {id(parameter) for module in modules for parameter in module.parameters()}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in rows)


def resized_position_embedding(name: str, tensor: Tensor, model: nn.Module) -> Tensor | None:
    """A position embedding that was learned at another image size, resampled by timm to the model's grid.

    tensor: float [1, prefix tokens + old grid, width]; the old grid is a square. None for every other tensor.
    """
    wanted, patches = getattr(model, "pos_embed", None), getattr(model, "patch_embed", None)
    if name != "pos_embed" or wanted is None or tensor.ndim != 3 or tensor.shape[2] != wanted.shape[2]:
        return None
    num_prefix_tokens = 0 if getattr(model, "no_embed_class", False) else int(getattr(model, "num_prefix_tokens", 1))
    old_side = math.isqrt(max(0, tensor.shape[1] - num_prefix_tokens))
    if patches is None or old_side == 0 or old_side**2 + num_prefix_tokens != tensor.shape[1]:
        return None
    resized: Tensor = resample_abs_pos_embed(
        tensor, new_size=list(patches.grid_size), num_prefix_tokens=num_prefix_tokens
    )
    return resized


def pixel_convention(model: nn.Module) -> PixelConvention:
    """The pixel convention of a timm model."""
    wanted = resolve_model_data_config(model)
    interpolation: Interpolation = "bilinear" if wanted["interpolation"] == "bilinear" else "bicubic"
    return PixelConvention(tuple(wanted["mean"]), tuple(wanted["std"]), interpolation, float(wanted["crop_pct"]))


class Normalize(nn.Module):
    """Images [b, 3, h, w], uint8 or float32 of 0 … 255, left as they are → float32, (x / 255 − mean) / std a channel, on the device that they are on, in the model's memory format."""

    def __init__(self, pixels: PixelConvention, device: torch.device, *, is_channels_last: bool = False) -> None:
        super().__init__()
        self.memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
        self.mean = torch.tensor(pixels.mean, device=device).mul(255.0).view(1, 3, 1, 1)
        self.std = torch.tensor(pixels.std, device=device).mul(255.0).view(1, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return (
            images.contiguous(memory_format=self.memory_format)
            .to(torch.float32, copy=True)
            .sub_(self.mean)
            .div_(self.std)
        )


def _advice(name: str, error: Exception, *, pretrained: bool, pretrained_file: str | None) -> str:
    """Say what to do about a model that timm would not make."""
    # torch names every tensor that does not fit.
    reason = shorten(str(error), REASON_CHARACTERS, placeholder=" …")
    if "nknown model" in reason:
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names them all"
        return f"model.name: timm {timm.__version__} knows no model {name!r}; {hint}"
    remedy = "check model.kwargs and data.image_size"
    if pretrained_file is not None:
        remedy += f"; {pretrained_file} must hold weights of this very model"
    elif pretrained:
        remedy += "; where its pretrained weights cannot be fetched, put them in the hub's cache or set model.pretrained=false"
    return f"model {name!r} cannot be made: {type(error).__name__}: {reason}; {remedy}"
