"""Steps that are not finite: how every rank learns of one, what is told of it, and what is left out because of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from aplantida_dist.errors import UserError
from aplantida_dist.metrics import LARGEST_LOSS, Totals
from aplantida_dist.record import Record
from aplantida_dist.spreading import whole_across_ranks
from aplantida_dist.world import World

SMALLEST_SCALE = 1.0
"""A gradient that is not finite although the fp16 scaler is down to this is no overflow of its making."""


class NonFiniteError(UserError):
    """A step is not finite, and the config says to stop, or to skip fewer of them."""


@dataclass(frozen=True)
class NonFinitePolicy:
    """What is done about a step that is not finite: the run stops, or leaves it out, `budget` times at most in the whole run."""

    action: Literal["stop", "skip"]
    budget: int


@dataclass(frozen=True)
class SlotLosses:
    """What a rank knows of one slot: its sample keys; weights float32 [b] on the host; losses float32 [b] on the device."""

    slot: int
    sample_keys: Sequence[str]
    weights: Tensor
    losses: Tensor


class SampleLoss(NamedTuple):
    """One sample of a step: where it was computed, and its loss, whatever that is."""

    rank: int
    slot: int
    sample_key: str
    loss: float

    @property
    def is_void(self) -> bool:
        """Whether the totals cannot hold this loss."""
        return not abs(self.loss) < LARGEST_LOSS


class StepEvidence:
    """What shows whether a step is finite: the norm of its gradient over all ranks, on its way to the host, and its losses.

    Made right after the backward pass, without waiting for the device.
    """

    def __init__(self, *, step: int, norm: Tensor, slots: Sequence[SlotLosses]) -> None:
        self.step = step
        self.slots = slots
        self._norm, self._arrival = norm, None
        if norm.device.type == "cuda":
            self._norm = torch.empty((), dtype=norm.dtype, pin_memory=True).copy_(norm, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def norm(self) -> float:
        """The norm. Waits until the device has come as far as this step's gradient, and no further."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return float(self._norm)


@dataclass
class Watch:
    """The steps of this run that were not finite; the same numbers on every rank. The first two are of the running epoch.

    skipped_steps: the fp16 scaler left them out, because the gradient overflowed at its scale; it then lowers the scale.
    nonfinite_steps: a loss, or the gradient itself, was not finite.
    """

    skipped_steps: int = 0
    nonfinite_steps: int = 0
    nonfinite_steps_of_run: int = 0
    unread: StepEvidence | None = None

    def begin_epoch(self) -> None:
        """Count the next epoch's steps."""
        self.skipped_steps, self.nonfinite_steps = 0, 0


@dataclass(frozen=True)
class Before:
    """What a step changes before anyone knows whether it is finite: the totals, and buffers such as BatchNorm's statistics."""

    totals: Tensor
    buffers: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: nn.Module, totals: Totals) -> Before:
        """Copy them, on the device."""
        return cls(totals.vector.clone(), tuple(buffer.clone() for buffer in model.buffers()))

    @torch.no_grad()
    def take_back(self, model: nn.Module, totals: Totals) -> None:
        """Leave a step out: its samples become void, and the buffers are what they were."""
        totals.void_since(self.totals)
        for buffer, kept in zip(model.buffers(), self.buffers, strict=True):
            buffer.copy_(kept)


def guard_of(weighted_losses: Tensor) -> Tensor:
    """A factor for a slot's loss: 1, or NaN where a loss is one that the totals cannot hold.

    So the gradient of every rank is NaN after the gradients' own all-reduce, and no rank needs another collective to learn of
    it. A loss can be infinite, or beyond 2^30, while its gradient is finite. weighted_losses: float32 [b]; returns float32 [].
    """
    are_countable = (weighted_losses.detach().abs() < LARGEST_LOSS).all()
    return torch.where(are_countable, 1.0, math.nan)


def gradient_norm(model: nn.Module) -> Tensor:
    """Collective where parameters are spread. The norm of the gradient; not finite where a part of it is not. float32 [], on the device."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return whole_across_ranks(torch.nn.utils.get_total_norm(gradients))


def is_left_out_across_ranks(
    watch: Watch, evidence: StepEvidence, *, policy: NonFinitePolicy, world: World, record: Record
) -> bool:
    """Collective where a step is not finite. Whether this step's update and samples are to be left out; NonFiniteError to stop.

    Under `skip` the host waits for the step's gradient. Under `stop` a GPU is never waited for: the host reads of each step
    after it has queued the next one. The weights may be lost by then, but nothing is saved before they are known to be good.
    """
    if policy.action == "skip" or world.device.type != "cuda":
        return _judge_across_ranks(watch, evidence, policy=policy, world=world, record=record)
    read_unread_across_ranks(watch, policy=policy, world=world, record=record)
    watch.unread = evidence
    return False


def read_unread_across_ranks(watch: Watch, *, policy: NonFinitePolicy, world: World, record: Record) -> None:
    """Collective where that step is not finite. Read of the last step, before anything is told or saved of it."""
    evidence, watch.unread = watch.unread, None
    if evidence is not None:
        _judge_across_ranks(watch, evidence, policy=policy, world=world, record=record)


def _judge_across_ranks(
    watch: Watch, evidence: StepEvidence, *, policy: NonFinitePolicy, world: World, record: Record
) -> bool:
    norm = evidence.norm()
    if math.isfinite(norm):
        return False
    samples = [sample for samples in world.gather_across_ranks(_losses_of(evidence, world.rank)) for sample in samples]
    void = [sample for sample in samples if sample.is_void]
    scaler = world.accelerator.scaler
    if scaler is not None and not void and scaler.get_scale() > SMALLEST_SCALE:
        watch.skipped_steps += 1
        return False
    watch.nonfinite_steps += 1
    watch.nonfinite_steps_of_run += 1
    done = evidence.step + 1
    file_name = record.write_nonfinite_step(done, _account(done, norm=norm, policy=policy, samples=samples))
    what = f"step {done}: " + (
        f"{len(void)} of {len(samples)} losses are NaN, infinite or beyond 2^30, first that of {void[0].sample_key}"
        if void
        else f"all {len(samples)} losses are finite, their gradient is not"
    )
    if policy.action == "stop" or watch.nonfinite_steps_of_run > policy.budget:
        limit = f"; train.nonfinite_budget is {policy.budget}" if policy.action == "skip" else ""
        error = NonFiniteError(
            f"{what}; {file_name} in the run folder names the step's samples{limit}; the last checkpoint is untouched: lower "
            "optimizer.peak_lr, set train.clip_norm, or look at these pictures"
        )
        raise world.told_by_main(error)
    record.say(f"{what}; left out, {watch.nonfinite_steps_of_run} of at most {policy.budget}: see {file_name}")
    return True


def _losses_of(evidence: StepEvidence, rank: int) -> list[SampleLoss]:
    """This rank's samples of a step, padding left out."""
    return [
        SampleLoss(rank, slot.slot, key, loss)
        for slot in evidence.slots
        for key, weight, loss in zip(slot.sample_keys, slot.weights.tolist(), slot.losses.tolist(), strict=True)
        if weight > 0
    ]


def _account(step: int, *, norm: float, policy: NonFinitePolicy, samples: Iterable[SampleLoss]) -> dict[str, Any]:
    """The content of nonfinite_step_N.json. JSON has no NaN and no infinity: they are text."""
    return {
        "step": step,
        "on_nonfinite": policy.action,
        "gradient_norm": _as_json(norm),
        "samples": [{**sample._asdict(), "loss": _as_json(sample.loss)} for sample in samples],
    }


def _as_json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
