"""The training loop: what happens in a step, and in which order things happen at the end of an epoch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aplantida_dist.bad_samples import Entry
from aplantida_dist.data.bad_sample import BadSample
from aplantida_dist.data.batch import Batch
from aplantida_dist.data.dataset import Split
from aplantida_dist.data.images import EvaluationTransform, TrainTransform
from aplantida_dist.data.plan import Coordinates, TrainPlan
from aplantida_dist.data.sampling import IntArray
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from aplantida_dist.data.work import Work
from aplantida_dist.device_clock import DeviceClock
from aplantida_dist.ema import Ema
from aplantida_dist.errors import UserError
from aplantida_dist.evaluation import as_evaluation_metrics, as_split_metrics, evaluate_across_ranks
from aplantida_dist.freezing import Freezing
from aplantida_dist.history import EvaluationMetrics, make_row
from aplantida_dist.interruption import Interrupted, Interruption
from aplantida_dist.lineage import Identities
from aplantida_dist.metrics import Totals, compute, require_coverage
from aplantida_dist.mixing import Mixing
from aplantida_dist.nonfinite import (
    Before,
    NonFinitePolicy,
    SlotLosses,
    StepEvidence,
    Watch,
    gradient_norm,
    guard_of,
    is_left_out_across_ranks,
    read_unread_across_ranks,
)
from aplantida_dist.objective import Objective
from aplantida_dist.optimizer import clip_adaptively, set_learning_rate
from aplantida_dist.processes import usable_cores
from aplantida_dist.record import EpochSoFar, Record
from aplantida_dist.schedule import Schedule
from aplantida_dist.seeds import derive
from aplantida_dist.state import take_state_across_ranks
from aplantida_dist.stopping import Stopping, reason_to_stop
from aplantida_dist.teachers import Teachers
from aplantida_dist.verdict import Machine, RankTimes, judge, times_in_row
from aplantida_dist.voiding import divide_by_the_rest_across_ranks, record_across_ranks
from aplantida_dist.world import World, seed_device


class TrainingError(UserError):
    """An extra check of --debug failed: what training computes is no longer a number."""


@dataclass(frozen=True)
class Job:
    """What a training is composed of. Every number that the config gave is here, so that the loop reads no config."""

    world: World
    model: nn.Module
    optimizer: Any
    ema: Ema | None
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
    train_counts: tuple[int, ...]
    seed: int
    mixing: Mixing
    objective: Objective
    teachers: Teachers
    nonfinite: NonFinitePolicy
    stopping: Stopping | None
    interruption: Interruption
    voids_bad_samples: bool
    metrics_to_hold: tuple[str, ...]
    freezing: Freezing
    missing_soft_labels: int
    clip_norm: float | None
    clip_agc: float | None
    log_every_steps: int
    checkpoint_every_steps: int | None
    evaluate_every_epochs: int
    evaluation_micro_batch_size: int
    extra_checks: bool


@dataclass
class Running:
    """The epoch in progress on this rank: its totals and its clocks. What a checkpoint brought lies on the main process.

    done, saved_step: the completed steps of the run, and of its last checkpoint; the same on every rank.
    bad: the samples that this rank could not deliver and that the ledger has not seen yet. work: what its loaders did for the epoch,
    since the run went on if it was resumed in the middle of it; spent_before_ns and waited_before_ns are what was before, of all ranks.
    """

    totals: Totals
    train_s: float = 0.0
    spent_ns: int = 0
    waited_ns: int = 0
    spent_before_ns: int = 0
    waited_before_ns: int = 0
    watch: Watch = field(default_factory=Watch)
    done: int = 0
    saved_step: int = 0
    bad: list[Entry] = field(default_factory=list)
    work: Work = field(default_factory=Work)
    device_clock: DeviceClock = field(init=False)

    def __post_init__(self) -> None:
        self.device_clock = DeviceClock(self.totals.vector.device)

    @property
    def times(self) -> RankTimes:
        """Where this rank's time went."""
        device_ns = self.device_clock.busy_ns if self.device_clock.counts else None
        return RankTimes(self.spent_ns, self.waited_ns, device_ns, self.work)

    def spend(self, spent_ns: int) -> None:
        """Count time as that of steps."""
        self.spent_ns += spent_ns
        self.train_s += spent_ns / 1e9

    def reset(self) -> None:
        """Begin the next epoch."""
        self.totals.reset()
        self.watch.begin_epoch()
        self.train_s, self.spent_ns, self.waited_ns = 0.0, 0, 0
        self.spent_before_ns = self.waited_before_ns = 0
        self.work = Work()
        self.device_clock.reset()


def train(job: Job, *, start_step: int, running: Running) -> None:
    """Collective. Run the steps from `start_step` to the schedule's end, or to where the config's `stopping` ends it.

    A row is recorded before the checkpoint that follows it, and both before anything that could hang. Asked to stop, all
    ranks save the same step and raise Interrupted.
    """
    running.done = running.saved_step = start_step
    try:
        job.interruption.poll_across_ranks()
        _finish_epoch_left_open(job, running, start_step)
        if not _stops_early(job, start_step):
            _run_steps(job, running, start_step)
    except Interrupted as interrupted:
        _leave(job, running, interrupted)
        raise


def _run_steps(job: Job, running: Running, start_step: int) -> None:
    """Collective. The steps, and after each what is due."""
    total_steps = job.schedule.total_steps
    batches = read_ahead(job, start_step)
    job.freezing.set_modes(job.model, start_step)
    started_s = time.monotonic()
    for step in range(start_step, total_steps):
        job.interruption.poll_across_ranks()
        if job.freezing.changes_at(step):
            job.freezing.set_modes(job.model, step)
        run_step(job, batches, running, step)
        running.done = done = step + 1
        ends_epoch = done % job.plan.steps_per_epoch == 0
        if done % job.log_every_steps == 0 or ends_epoch:
            seconds_a_step = (time.monotonic() - started_s) / (done - start_step)
            _show_progress(job, running, done, eta_s=seconds_a_step * (total_steps - done))
        if ends_epoch:
            _finish_epoch(job, running, done)
            if _stops_early(job, done):
                return
        elif job.checkpoint_every_steps and done % job.checkpoint_every_steps == 0:
            _save(job, running, done)
    job.record.tell("done", epoch=total_steps // job.plan.steps_per_epoch, step=total_steps)


def read_ahead(job: Job, start_step: int) -> Iterator[Batch]:
    """This rank's micro-batches from a step to the end of the run, across epochs without a pause."""
    micro_batches = MicroBatches(
        job.train_split, job.plan, job.train_transform, seed=job.seed, voids_bad_samples=job.voids_bad_samples
    )
    return stream(
        micro_batches,
        _coordinates(job, start_step),
        reading=job.reading,
        num_epochs=-(-job.schedule.total_steps // job.plan.steps_per_epoch),
        slots=job.plan.slots_of(job.world.rank, job.world.world_size),
    )


def _coordinates(job: Job, start_step: int) -> Iterator[Coordinates]:
    """Where this rank's micro-batches stand, from a step on; nothing before it is ever looked at."""
    slots = job.plan.slots_of(job.world.rank, job.world.world_size)
    for step in range(start_step, job.schedule.total_steps):
        for slot in slots:
            yield Coordinates(*divmod(step, job.plan.steps_per_epoch), slot)


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
            running.bad += _entries(read.bad, job, step + 1)
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


def _entries(bad: Iterable[BadSample], job: Job, done: int) -> list[Entry]:
    """Bad samples as the ledger holds them: those of the last of `done` steps, or of an evaluation after it."""
    epoch = (done - 1) // job.plan.steps_per_epoch + 1
    return [Entry(**sample.model_dump(), epoch=epoch, step=done) for sample in bad]


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


def _show_progress(job: Job, running: Running, done: int, *, eta_s: float) -> None:
    """Collective. Show the epoch's metrics so far, over all ranks."""
    so_far = _sum_across_ranks(job, running)
    metrics = compute(so_far.totals)
    images_per_s = metrics.num_samples / so_far.train_s
    epoch = (done - 1) // job.plan.steps_per_epoch + 1
    watch = running.watch
    left_out = {
        "skipped (fp16)": watch.skipped_steps,
        "not finite": watch.nonfinite_steps,
    }
    facts = {
        "loss": f"{metrics.loss:.4f}",
        "top-1 (dominant)" if job.mixing.acts_at(done - 1) else "top-1": f"{100 * metrics.top1:.1f} %",
        "images/s": f"{images_per_s:.1f}",
        "waiting": f"{100 * so_far.waited_ns / so_far.spent_ns:.0f} %",
        "ETA": f"{int(eta_s) // 3600}:{int(eta_s) // 60 % 60:02d}:{int(eta_s) % 60:02d}",
        **{name: str(count) for name, count in left_out.items() if count},
    }
    job.record.advance(done, epoch=epoch, facts=facts)
    job.record.tell("training", epoch=epoch, step=done, images_per_s=round(images_per_s, 1), eta_s=round(eta_s))


def _finish_epoch_left_open(job: Job, running: Running, start_step: int) -> None:
    """Collective. Evaluate and record the epoch of a checkpoint that was saved between an epoch's last step and its row.

    Its totals tell: they are zero once the epoch has its row. The main process has them.
    """
    is_open = job.world.learn_from_main_across_ranks(lambda: bool(running.totals.vector.any()))
    if is_open and start_step % job.plan.steps_per_epoch == 0:
        _finish_epoch(job, running, start_step)


def _leave(job: Job, running: Running, interrupted: Interrupted) -> None:
    """Collective. Save the last completed step, unless it is saved, and say how the run goes on."""
    if running.saved_step != running.done:
        _save(job, running, running.done)
    job.record.tell(
        "stopped",
        epoch=running.done // job.plan.steps_per_epoch,
        step=running.done,
        signal=interrupted.signal_name,
        checkpoint_step=running.saved_step or None,
    )
    saved = f"its checkpoint is saved after step {running.done}" if running.done else "no step was done"
    job.record.say(f"stopped by {interrupted.signal_name}: {saved}; the same command goes on from there")


def _finish_epoch(job: Job, running: Running, done: int) -> None:
    """Collective. Evaluate, record, then save the checkpoint of what was recorded."""
    epoch = done // job.plan.steps_per_epoch
    so_far = _sum_across_ranks(job, running)
    metrics = compute(so_far.totals)
    split, sampling = job.train_split, job.plan.sampling
    drawn = None if sampling is None else sampling.draw(epoch - 1)
    require_coverage(
        metrics,
        split="train",
        expected_samples=split.num_samples,
        expected_identities=_expected_identities(job, drawn),
    )
    speed = {"images_per_s": metrics.num_samples / so_far.train_s, "wait_fraction": so_far.waited_ns / so_far.spent_ns}
    times = job.world.gather_across_ranks(running.times)
    verdict = judge(
        times, images_per_s=speed["images_per_s"], num_workers=job.reading.num_workers, machine=_machine(job.world)
    )
    top1_label = {"top1_label": "dominant"} if job.mixing.acts_at(done - 1) else {}
    ledger = {
        "skipped_steps": so_far.skipped_steps,
        "nonfinite_steps": so_far.nonfinite_steps,
        "missing_soft_labels": job.missing_soft_labels,
        "distinct_samples": 0 if drawn is None else len(np.unique(drawn)),
    }
    ledger = {name: count for name, count in ledger.items() if count}
    block = as_split_metrics(metrics, expected_samples=split.num_samples, train_counts=job.train_counts)
    row = make_row(
        epoch=epoch,
        step=done,
        time_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        learning_rate=job.schedule.learning_rate(done - 1),
        train={**block, **speed, **({} if verdict is None else times_in_row(times, verdict)), **ledger, **top1_label},
        **_evaluate(job, epoch=epoch, done=done),
        digests=job.digests,
    )
    job.world.watchdog.at("saving", step=done)
    job.record.append(row)
    if verdict is not None:
        job.record.say(verdict.line)
    running.reset()
    _save(job, running, done)
    for name in job.metrics_to_hold:
        try:
            row.require_metric(name)
        except UserError as error:
            raise job.world.told_by_main(error) from None


def _machine(world: World) -> Machine:
    """The machine as a rank's loaders find it. On a CPU the model computes where they do."""
    threads = 1 if world.device.type == "cuda" else torch.get_num_threads()
    return Machine(usable_cores(), len(world.ranks_here), threads)


def _expected_identities(job: Job, drawn: IntArray | None) -> str:
    """Collective where classes are sampled: the main process alone has read who the samples are."""
    if drawn is None:
        return job.train_split.identity_digest
    return job.world.learn_from_main_across_ranks(lambda: job.train_split.identity_digest_of(drawn))


def _stops_early(job: Job, done: int) -> bool:
    """Collective where the config can stop early. Whether the rows up to here say so, on all ranks together; told once.

    What is asked is the history alone, so a run that goes on, right after it stopped too, is told the same.
    """
    stopping, total_steps = job.stopping, job.schedule.total_steps
    if stopping is None or done == 0 or done >= total_steps:
        return False
    reason = job.world.learn_from_main_across_ranks(lambda: reason_to_stop(job.record.rows(), stopping))
    if reason is None:
        return False
    job.record.say(reason)
    job.record.tell("done", epoch=done // job.plan.steps_per_epoch, step=done, reason=reason)
    return True


def _evaluate(job: Job, *, epoch: int, done: int) -> dict[str, EvaluationMetrics]:
    """Collective. The blocks of this epoch's row where an evaluation is due: val, and val_ema where there is an EMA."""
    if job.val_split is None or epoch % job.evaluate_every_epochs:
        return {}
    job.world.watchdog.at("evaluating", step=done)
    job.record.tell("evaluating", epoch=epoch, step=done)
    blocks = {"val": _evaluate_model(job, job.world.unwrap(job.model), job.val_split, done)}
    if job.ema is not None:
        blocks["val_ema"] = _evaluate_model(job, job.ema.model, job.val_split, done)
    return blocks


def _evaluate_model(job: Job, bare_model: nn.Module, split: Split, done: int) -> EvaluationMetrics:
    """Collective. One block: a model over a split, with the main process's buffers on every rank."""
    # DDP would broadcast buffers at the first forward, where a rank without a batch hangs; the bare model never does.
    job.world.share_buffers_across_ranks(bare_model)
    evaluation = evaluate_across_ranks(
        bare_model,
        world=job.world,
        split=split,
        num_classes=job.num_classes,
        transform=job.evaluation_transform,
        normalize=job.normalize,
        micro_batch_size=job.evaluation_micro_batch_size,
        reading=job.reading,
        leaked=job.leaked,
        between_rounds=job.interruption.poll_across_ranks,
        voids_bad_samples=job.voids_bad_samples,
    )
    if evaluation.bad:  # the same on every rank
        entries = _entries(evaluation.bad, job, done) if job.world.is_main else []
        record_across_ranks(entries, world=job.world, record=job.record)
    return as_evaluation_metrics(evaluation, expected_samples=split.num_samples, train_counts=job.train_counts)


def _save(job: Job, running: Running, done: int) -> None:
    """Collective. Save a checkpoint; between epochs the totals of the running one travel in it."""
    epoch = done // job.plan.steps_per_epoch
    so_far = _sum_across_ranks(job, running)
    job.world.watchdog.at("saving", step=done)
    job.record.tell("saving", epoch=epoch, step=done)
    scaler = job.world.accelerator.scaler
    state = take_state_across_ranks(
        job.world.unwrap(job.model),
        job.optimizer.optimizer,
        ema=None if job.ema is None else job.ema.model,
        is_main=job.world.is_main,
    )
    job.record.save(
        state,
        step=done,
        epoch=epoch,
        so_far=so_far,
        scaler={} if scaler is None else scaler.state_dict(),
    )
    running.saved_step = done


def _sum_across_ranks(job: Job, running: Running) -> EpochSoFar:
    """Collective. The running epoch over all ranks. NonFiniteError or BadSampleError, on every rank, where that has to stop the run."""
    # What the device has still to do of the steps is part of their time, and would be waited for below in any case.
    running.spend(running.device_clock.catch_up())
    read_unread_across_ranks(running.watch, policy=job.nonfinite, world=job.world, record=job.record)
    if job.voids_bad_samples:
        record_across_ranks(running.bad, world=job.world, record=job.record)
        running.bad = []
    spent_ns, waited_ns = running.spent_before_ns + running.spent_ns, running.waited_before_ns + running.waited_ns
    clocks = torch.tensor([spent_ns, waited_ns], dtype=torch.int64, device=job.world.device)
    summed = job.world.sum_across_ranks(torch.cat((running.totals.vector, clocks)))
    totals: Tensor = summed[:-2]
    spent_ns, waited_ns = (int(number) for number in summed[-2:].tolist())
    watch = running.watch
    return EpochSoFar(
        totals,
        running.train_s,
        spent_ns,
        waited_ns,
        watch.skipped_steps,
        watch.nonfinite_steps,
        watch.nonfinite_steps_of_run,
    )


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
