"""An epoch over all ranks: its totals, its evaluation, its row, and the checkpoint of what was recorded."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import torch
from torch import Tensor, nn

from aplantida_dist.bad_samples import entries_of
from aplantida_dist.data.dataset import Split
from aplantida_dist.data.sampling import IntArray
from aplantida_dist.errors import UserError
from aplantida_dist.evaluation import as_evaluation_metrics, as_split_metrics, evaluate_across_ranks
from aplantida_dist.history import EvaluationMetrics, make_row
from aplantida_dist.job import Job, Running
from aplantida_dist.metrics import compute, require_coverage
from aplantida_dist.nonfinite import read_unread_across_ranks
from aplantida_dist.processes import usable_cores
from aplantida_dist.record import EpochSoFar
from aplantida_dist.state import take_state_across_ranks
from aplantida_dist.verdict import Machine, judge, times_in_row
from aplantida_dist.voiding import record_across_ranks
from aplantida_dist.world import World


def finish_epoch_across_ranks(job: Job, running: Running, done: int) -> None:
    """Collective. Evaluate, record, then save the checkpoint of what was recorded."""
    epoch = done // job.plan.steps_per_epoch
    so_far = sum_epoch_across_ranks(job, running)
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
    save_across_ranks(job, running, done)
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
        entries = (
            entries_of(evaluation.bad, step=done, epoch=done // job.plan.steps_per_epoch) if job.world.is_main else []
        )
        record_across_ranks(entries, world=job.world, record=job.record)
    return as_evaluation_metrics(evaluation, expected_samples=split.num_samples, train_counts=job.train_counts)


def save_across_ranks(job: Job, running: Running, done: int) -> None:
    """Collective. Save a checkpoint; between epochs the totals of the running one travel in it."""
    epoch = done // job.plan.steps_per_epoch
    so_far = sum_epoch_across_ranks(job, running)
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


def sum_epoch_across_ranks(job: Job, running: Running) -> EpochSoFar:
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
