"""The training loop: the steps of a run, what is due after each, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator

from aplantida_dist.data.batch import Batch
from aplantida_dist.data.plan import Coordinates
from aplantida_dist.data.stream import MicroBatches, stream
from aplantida_dist.epoch import finish_epoch_across_ranks, save_across_ranks, sum_epoch_across_ranks
from aplantida_dist.interruption import Interrupted
from aplantida_dist.job import Job, Running
from aplantida_dist.metrics import compute
from aplantida_dist.step import run_step
from aplantida_dist.stopping import reason_to_stop


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
            finish_epoch_across_ranks(job, running, done)
            if _stops_early(job, done):
                return
        elif job.checkpoint_every_steps and done % job.checkpoint_every_steps == 0:
            save_across_ranks(job, running, done)
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


def _show_progress(job: Job, running: Running, done: int, *, eta_s: float) -> None:
    """Collective. Show the epoch's metrics so far, over all ranks."""
    so_far = sum_epoch_across_ranks(job, running)
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
        finish_epoch_across_ranks(job, running, start_step)


def _leave(job: Job, running: Running, interrupted: Interrupted) -> None:
    """Collective. Save the last completed step, unless it is saved, and say how the run goes on."""
    if running.saved_step != running.done:
        save_across_ranks(job, running, running.done)
    job.record.tell(
        "stopped",
        epoch=running.done // job.plan.steps_per_epoch,
        step=running.done,
        signal=interrupted.signal_name,
        checkpoint_step=running.saved_step or None,
    )
    saved = f"its checkpoint is saved after step {running.done}" if running.done else "no step was done"
    job.record.say(f"stopped by {interrupted.signal_name}: {saved}; the same command goes on from there")


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
