"""The training loop: what happens in a step, and in which order things happen at the end of an epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from aplantida_dist.data.dataset import Split
from aplantida_dist.data.images import EvaluationTransform, TrainTransform
from aplantida_dist.data.plan import Coordinates, TrainPlan
from aplantida_dist.data.stream import Batch, MicroBatches, Reading, stream
from aplantida_dist.errors import UserError
from aplantida_dist.evaluation import as_evaluation_metrics, as_split_metrics, evaluate_across_ranks
from aplantida_dist.history import EvaluationMetrics, make_row
from aplantida_dist.lineage import Identities
from aplantida_dist.metrics import Totals, compute, require_coverage, void_samples
from aplantida_dist.model import set_learning_rate
from aplantida_dist.objective import Objective, Targets
from aplantida_dist.record import EpochSoFar, Record
from aplantida_dist.schedule import Schedule
from aplantida_dist.seeds import derive
from aplantida_dist.world import World, seed_device


class TrainingError(UserError):
    """Training cannot go on: what it computes is no longer a number."""


@dataclass(frozen=True)
class Job:
    """What a training is composed of. Every number that the config gave is here, so that the loop reads no config."""

    world: World
    model: nn.Module
    optimizer: Any
    normalize: nn.Module
    plan: TrainPlan
    schedule: Schedule
    train_split: Split
    val_split: Split | None
    leaked: Identities
    train_transform: TrainTransform
    evaluation_transform: EvaluationTransform
    reading: Reading
    record: Record
    digests: dict[str, str]
    num_classes: int
    seed: int
    objective: Objective
    missing_soft_labels: int
    clip_norm: float | None
    log_every_steps: int
    checkpoint_every_steps: int | None
    evaluate_every_epochs: int
    evaluation_micro_batch_size: int
    extra_checks: bool


@dataclass
class Running:
    """The epoch in progress on this rank: its totals and its clocks. What a checkpoint brought lies on the main process."""

    totals: Totals
    train_s: float = 0.0
    spent_ns: int = 0
    waited_ns: int = 0
    skipped_steps: int = 0

    def reset(self) -> None:
        """Begin the next epoch."""
        self.totals.reset()
        self.train_s, self.spent_ns, self.waited_ns, self.skipped_steps = 0.0, 0, 0, 0


def train(job: Job, *, start_step: int, running: Running) -> None:
    """Collective. Run the steps from `start_step` to the schedule's end.

    A row is recorded before the checkpoint that follows it, and both before anything that could hang.
    """
    total_steps = job.schedule.total_steps
    batches = read_ahead(job, start_step)
    job.model.train()
    started_s = time.monotonic()
    for step in range(start_step, total_steps):
        run_step(job, batches, running, step)
        done = step + 1
        ends_epoch = done % job.plan.steps_per_epoch == 0
        if done % job.log_every_steps == 0 or ends_epoch:
            seconds_a_step = (time.monotonic() - started_s) / (done - start_step)
            _show_progress(job, running, done, eta_s=seconds_a_step * (total_steps - done))
        if ends_epoch:
            _finish_epoch(job, running, done)
        elif job.checkpoint_every_steps and done % job.checkpoint_every_steps == 0:
            _save(job, running, done)
    job.record.tell("done", epoch=total_steps // job.plan.steps_per_epoch, step=total_steps)


def read_ahead(job: Job, start_step: int) -> Iterator[Batch]:
    """This rank's micro-batches from a step to the end of the run, across epochs without a pause."""
    micro_batches = MicroBatches(job.train_split, job.plan, job.train_transform, seed=job.seed)
    return stream(micro_batches, _coordinates(job, start_step), reading=job.reading)


def _coordinates(job: Job, start_step: int) -> Iterator[Coordinates]:
    """Where this rank's micro-batches stand, from a step on; nothing before it is ever looked at."""
    slots = job.plan.slots_of(job.world.rank, job.world.world_size)
    for step in range(start_step, job.schedule.total_steps):
        for slot in slots:
            yield Coordinates(*divmod(step, job.plan.steps_per_epoch), slot)


def run_step(job: Job, batches: Iterator[Batch], running: Running, step: int) -> None:
    """One optimizer update with the gradient of Σ w·ℓ / Σ w over the step's samples on all ranks.

    The divisor comes from the plan. DDP averages over ranks, so the sum is multiplied by their number: the two cancel.
    """
    started_ns = time.perf_counter_ns()
    set_learning_rate(job.optimizer, job.schedule.learning_rate(step))
    scale = job.world.world_size / job.plan.samples_in_step(step % job.plan.steps_per_epoch)
    slots = job.plan.slots_of(job.world.rank, job.world.world_size)
    for slot in slots:
        asked_ns = time.perf_counter_ns()
        read = next(batches)
        running.waited_ns += time.perf_counter_ns() - asked_ns
        batch = read.to(job.world.device)
        seed_device(job.world.device, derive(job.seed, "slot", step, slot))
        with job.world.accumulating(job.model, is_last=slot == slots[-1]):
            logits = job.model(job.normalize(batch.images))
            losses = job.objective(logits, Targets(batch.labels, read.identities))
            if job.extra_checks:
                _check_losses(read, losses, step)
            job.world.accelerator.backward((batch.weights * losses).sum() * scale)
        running.totals.update(
            logits.detach(), losses.detach(), labels=batch.labels, weights=batch.weights, identities=batch.identities
        )
    if job.extra_checks:
        _check_gradients(job.model, step)
    if job.clip_norm is not None:
        job.world.accelerator.clip_grad_norm_(job.model.parameters(), job.clip_norm)
    job.optimizer.step()
    running.skipped_steps += bool(job.optimizer.step_was_skipped)
    job.optimizer.zero_grad()
    spent_ns = time.perf_counter_ns() - started_ns
    running.spent_ns += spent_ns
    running.train_s += spent_ns / 1e9


def _show_progress(job: Job, running: Running, done: int, *, eta_s: float) -> None:
    """Collective. Show the epoch's metrics so far, over all ranks."""
    so_far = _sum_across_ranks(job, running, done)
    metrics = compute(so_far.totals)
    images_per_s = metrics.num_samples / so_far.train_s
    epoch = (done - 1) // job.plan.steps_per_epoch + 1
    facts = {
        "loss": f"{metrics.loss:.4f}",
        "top-1": f"{100 * metrics.top1:.1f} %",
        "images/s": f"{images_per_s:.1f}",
        "waiting": f"{100 * so_far.waited_ns / so_far.spent_ns:.0f} %",
        "ETA": f"{int(eta_s) // 3600}:{int(eta_s) // 60 % 60:02d}:{int(eta_s) % 60:02d}",
    }
    job.record.advance(done, epoch=epoch, facts=facts)
    job.record.tell("training", epoch=epoch, step=done, images_per_s=round(images_per_s, 1), eta_s=round(eta_s))


def _finish_epoch(job: Job, running: Running, done: int) -> None:
    """Collective. Evaluate, record, then save the checkpoint of what was recorded."""
    epoch = done // job.plan.steps_per_epoch
    so_far = _sum_across_ranks(job, running, done)
    metrics = compute(so_far.totals)
    split = job.train_split
    require_coverage(
        metrics, split="train", expected_samples=split.num_samples, expected_identities=split.identity_digest
    )
    speed = {"images_per_s": metrics.num_samples / so_far.train_s, "wait_fraction": so_far.waited_ns / so_far.spent_ns}
    skipped = {"skipped_steps": so_far.skipped_steps} if so_far.skipped_steps else {}
    missing = {"missing_soft_labels": job.missing_soft_labels} if job.missing_soft_labels else {}
    row = make_row(
        epoch=epoch,
        step=done,
        time_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        learning_rate=job.schedule.learning_rate(done - 1),
        train={**as_split_metrics(metrics, expected_samples=split.num_samples), **speed, **skipped, **missing},
        val=_evaluate(job, epoch=epoch, done=done),
        digests=job.digests,
    )
    job.record.append(row)
    running.reset()
    _save(job, running, done)


def _evaluate(job: Job, *, epoch: int, done: int) -> EvaluationMetrics | None:
    """Collective. The val block of this epoch's row, where one is due."""
    if job.val_split is None or epoch % job.evaluate_every_epochs:
        return None
    job.record.tell("evaluating", epoch=epoch, step=done)
    bare_model = job.world.unwrap(job.model)
    # DDP would broadcast buffers at the first forward, where a rank without a batch hangs; the bare model never does.
    job.world.share_buffers_across_ranks(bare_model)
    evaluation = evaluate_across_ranks(
        bare_model,
        world=job.world,
        split=job.val_split,
        num_classes=job.num_classes,
        transform=job.evaluation_transform,
        normalize=job.normalize,
        micro_batch_size=job.evaluation_micro_batch_size,
        reading=job.reading,
        leaked=job.leaked,
    )
    return as_evaluation_metrics(evaluation, expected_samples=job.val_split.num_samples)


def _save(job: Job, running: Running, done: int) -> None:
    """Collective. Save a checkpoint; between epochs the totals of the running one travel in it."""
    epoch = done // job.plan.steps_per_epoch
    so_far = _sum_across_ranks(job, running, done)
    job.record.tell("saving", epoch=epoch, step=done)
    scaler = job.world.accelerator.scaler
    job.record.save(
        job.world.unwrap(job.model),
        job.optimizer.optimizer,
        step=done,
        epoch=epoch,
        so_far=so_far,
        scaler={} if scaler is None else scaler.state_dict(),
    )


def _sum_across_ranks(job: Job, running: Running, done: int) -> EpochSoFar:
    """Collective. The running epoch over all ranks. TrainingError, on every rank, once a loss was not a number."""
    clocks = torch.tensor([running.spent_ns, running.waited_ns], dtype=torch.int64, device=job.world.device)
    summed = job.world.sum_across_ranks(torch.cat((running.totals.vector, clocks)))
    totals: Tensor = summed[:-2]
    void = void_samples(totals)
    if void:
        error = TrainingError(
            f"{void} samples up to step {done} had a loss that is NaN, infinite or beyond 2^30: the training diverged or "
            "a picture is broken; the last checkpoint is untouched: lower optimizer.peak_lr, set train.clip_norm, or "
            "find the sample with --debug"
        )
        raise job.world.told_by_main(error)
    spent_ns, waited_ns = (int(number) for number in summed[-2:].tolist())
    return EpochSoFar(totals, running.train_s, spent_ns, waited_ns, running.skipped_steps)


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
