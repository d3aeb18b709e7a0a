"""Freezing: which parameters train at a step. All others stay as they are to the last bit, on any number of ranks."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from aplantida_dist.errors import UserError
from aplantida_dist.model import head_names


class FreezeError(UserError):
    """model.freeze names nothing in the model, or leaves nothing to train."""


@dataclass(frozen=True)
class Freezing:
    """The parameters outside the head, and how many steps at the beginning train the head alone.

    A function of the step, so that a resume needs no state. The head is what holds a row for each class. In those steps DDP still
    sums every gradient, so that its hooks see the same parameters at each step and ranks need not agree on anything.
    """

    backbone: tuple[nn.Parameter, ...]
    head_only_steps: int

    def drop_gradients(self, step: int) -> None:
        """Take away the gradients of what does not train at this step: no optimizer touches it then, nor decays it, nor counts it for clipping."""
        if step < self.head_only_steps:
            for parameter in self.backbone:
                parameter.grad = None

    def changes_at(self, step: int) -> bool:
        """Whether other parameters train from this step on than before it."""
        return step == self.head_only_steps

    def set_modes(self, model: nn.Module, step: int) -> None:
        """Put the model into training mode, and every module whose parameters do not train at this step into evaluation mode.

        So the running statistics of its BatchNorm stay, and it has no dropout. A module without parameters follows the one around it.
        """
        resting = {id(parameter) for parameter in self.backbone} if step < self.head_only_steps else set()
        model.train()
        for module in model.modules():
            parameters = list(module.parameters())
            if parameters and not any(each.requires_grad and id(each) not in resting for each in parameters):
                module.eval()


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze the modules and parameters of these names for good; to be done before an optimizer or DDP sees the model.

    FreezeError, before anything is frozen, for a name that the model does not have, and where nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    known = {name.rsplit(".", depth)[0] for name in parameters for depth in range(name.count(".") + 1)}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"its parts are {', '.join(_parts(model))}"
            raise FreezeError(f"model.freeze: {name!r} is no module or parameter with weights in this model; {hint}")
    frozen = [each for each in parameters if any(f"{each}.".startswith(f"{name}.") for name in names)]
    if len(frozen) == len(parameters):
        raise FreezeError("model.freeze: nothing is left to train; take a name out")
    for each in frozen:
        parameters[each].requires_grad_(False)


def make_freezing(model: nn.Module, *, head_only_steps: int) -> Freezing:
    """The freezing of a model whose frozen parameters no longer require a gradient; FreezeError where the head alone cannot train."""
    heads = head_names(model)
    parameters = dict(model.named_parameters())
    if head_only_steps and not any(parameters[name].requires_grad for name in heads):
        raise FreezeError(
            "model.head_only_epochs: the head is frozen or absent, so that nothing would train; set it to 0"
        )
    return Freezing(tuple(each for name, each in parameters.items() if name not in heads), head_only_steps)


def _parts(model: nn.Module) -> list[str]:
    """The uppermost names that hold parameters."""
    return list(dict.fromkeys(name.partition(".")[0] for name, _ in model.named_parameters()))
