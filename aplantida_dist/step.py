"""A step: one optimizer update, from the micro-batches of a rank to its weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from aplantida_dist.bad_samples import entries_of
from aplantida_dist.data.batch import Batch
from aplantida_dist.errors import UserError
from aplantida_dist.job import Job, Running
from aplantida_dist.nonfinite import Before, SlotLosses, StepEvidence, gradient_norm, guard_of, is_left_out_across_ranks
from aplantida_dist.optimizer import clip_adaptively, set_learning_rate
from aplantida_dist.seeds import derive
from aplantida_dist.voiding import divide_by_the_rest_across_ranks
from aplantida_dist.world import seed_device


class TrainingError(UserError):
    """An extra check of --debug failed: what training computes is no longer a number."""


def run_step(job: Job, batches: Iterator[Batch], running: Running, step: int) -> None:
    """One optimizer update with the gradient of Σ w·ℓ / Σ w over the step's samples on all ranks.

    The divisor comes from the plan, corrected afterwards where samples may be void. DDP and FSDP2 average over ranks, so the sum is multiplied by their number: the two cancel. A
    step that is left out, because it is not finite or overflowed in fp16, is counted and keeps its place: which samples
    and which learning rate a step has follows from its number alone.
    """
    started_ns = time.perf_counter_ns()
    set_learning_rate(job.optimizer, job.schedule.learning_rate(step))
    scale = job.world.world_size / job.plan.samples_in_step(step % job.plan.steps_per_epoch)
    slots = job.plan.slots_of(job.world.rank, job.world.world_size)
    before = Before.of(job.model, running.totals) if job.nonfinite.action == "skip" else None
    seen: list[SlotLosses] = []
    num_bad = 0
    job.world.watchdog.at("training", step=step)
    for slot in slots:
        running.device_clock.end()
        asked_ns = time.perf_counter_ns()
        job.world.watchdog.note("reading a batch")
        read = next(batches)
        job.world.watchdog.note("working")
        running.waited_ns += time.perf_counter_ns() - asked_ns
        running.device_clock.begin()
        running.work += read.work
        batch = read.to(job.world.device)
        seed_device(job.world.device, derive(job.seed, "slot", step, slot))
        with job.world.accumulating(job.model, is_last=slot == slots[-1]):
            pixels, targets = job.mixing(batch.images, batch.labels, step=step, slot=slot)
            targets = replace(targets, teacher_logits=job.teachers.look_at(pixels), identities=read.identities)
            pixels = job.normalize(pixels)  # under the same name: it takes less time than to hold both for the step
            logits = job.model(pixels)
            losses = job.objective(logits, targets)
            if job.extra_checks:
                _check_losses(read, losses, step)
            weighted = batch.weights * losses
            if slot == slots[-1]:
                job.world.watchdog.note("waiting for the other ranks")
            job.world.accelerator.backward(weighted.sum() * scale * guard_of(weighted))
        seen.append(SlotLosses(slot, read.sample_keys, read.weights, losses.detach()))
        running.totals.update(
            logits.detach(), losses.detach(), labels=targets.labels, weights=batch.weights, identities=batch.identities
        )
        if read.bad:
            num_bad += len(read.bad)
            running.totals.add_void(batch.bad_identities)
            running.bad += entries_of(read.bad, step=step + 1, epoch=step // job.plan.steps_per_epoch + 1)
    if job.voids_bad_samples:
        num_planned = job.plan.samples_in_step(step % job.plan.steps_per_epoch)
        divide_by_the_rest_across_ranks(job.model, num_bad=num_bad, num_planned=num_planned, world=job.world)
    job.freezing.drop_gradients(step)
    if job.extra_checks:
        _check_gradients(job.model, step)
    _update(job, running, StepEvidence(step=step, norm=_clip(job), slots=seen), before=before)
    job.optimizer.zero_grad()
    running.device_clock.end()
    running.spend(time.perf_counter_ns() - started_ns)


def _clip(job: Job) -> Tensor:
    """Collective where parameters are spread. Clip the step's gradient as the config says; returns its norm before, over all ranks: float32 [] on the device."""
    if job.clip_norm is not None or job.clip_agc is not None:
        job.world.accelerator.unscale_gradients(job.optimizer)
    norm = gradient_norm(job.model)
    if job.clip_norm is not None:
        # Not accelerate's, which looks for the model by comparing all its parameters with those of every prepared one.
        nn.utils.clip_grads_with_norm_(job.model.parameters(), job.clip_norm, norm)
    if job.clip_agc is not None:
        clip_adaptively(job.freezing.backbone, job.clip_agc)
    return norm


def _update(job: Job, running: Running, evidence: StepEvidence, *, before: Before | None) -> None:
    """Collective where the step is not finite. Update the weights, or leave the step out as the config says."""
    left_out = is_left_out_across_ranks(
        running.watch, evidence, policy=job.nonfinite, world=job.world, record=job.record
    )
    # The fp16 scaler leaves such an update out by itself, and has to see the step to lower its scale.
    if not left_out or job.world.accelerator.scaler is not None:
        job.optimizer.step()
    if left_out and before is not None:
        before.take_back(job.model, running.totals)
    if job.ema is not None and not left_out and not job.optimizer.step_was_skipped:
        job.ema.update(completed_steps=evidence.step + 1)


def _check_losses(read: Batch, losses: Tensor, step: int) -> None:
    """An extra check of --debug: name the samples whose loss is not a number."""
    broken = [key for key, fine in zip(read.sample_keys, losses.isfinite().tolist(), strict=True) if not fine]
    if broken:
        raise TrainingError(
            f"step {step}: the loss of {', '.join(broken)} is not a number; lower optimizer.peak_lr, or look at these pictures"
        )


def _check_gradients(model: nn.Module, step: int) -> None:
    """An extra check of --debug: name the first weights whose gradient is not a number."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise TrainingError(f"step {step}: the gradient of {name} holds NaN or Inf; lower optimizer.peak_lr")
