"""The record: everything that the main process writes of a run, and the silence of the other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from aplantida_dist.bad_samples import BadSampleLedger, Entry
from aplantida_dist.checkpoint import CheckpointError, Position, point_to, retain, save_checkpoint
from aplantida_dist.files import write_json
from aplantida_dist.history import EvaluationMetrics, History, Row, SplitMetrics
from aplantida_dist.lineage import Lineage
from aplantida_dist.progress import Progress
from aplantida_dist.report import Report
from aplantida_dist.resumes import Resume, changes_within
from aplantida_dist.state import State
from aplantida_dist.status import Phase, Status


@dataclass(frozen=True)
class Provenance:
    """What a run stands on; a checkpoint repeats it, so that a resume can name what has changed."""

    world_size: int
    digests: Mapping[str, str]
    law_fields: Mapping[str, Any]
    free_fields: Mapping[str, Any]
    code_version: str
    wandb_run_id: str
    lineage: Lineage
    train_counts: tuple[int, ...]


@dataclass(frozen=True)
class EpochSoFar:
    """The running epoch, summed over all ranks: its totals (int64 vector) and what `Position` says of its time."""

    totals: Tensor
    train_s: float
    spent_ns: int
    waited_ns: int
    skipped_steps: int
    nonfinite_steps: int
    nonfinite_steps_of_run: int


class Record:
    """What every rank calls at the same points. This is the other ranks' record: silence. No call communicates."""

    def tell(self, phase: Phase, *, epoch: int, step: int, **facts: Any) -> None:
        """Say what the run is doing now."""

    def advance(self, step: int, *, epoch: int, facts: dict[str, str]) -> None:
        """Show that `step` steps are done."""

    def say(self, text: str) -> None:
        """Print one line."""

    def append(self, row: Row) -> None:
        """Put a row into the history, and only then show it."""

    def rows(self) -> Sequence[Row]:
        """The rows of the history so far. The main process alone has them."""
        return ()

    def write_nonfinite_step(self, step: int, account: Mapping[str, Any]) -> str:
        """Leave word of a step that is not finite in the run folder; returns the file's name."""
        return ""

    def write_bad_samples(self, entries: Sequence[Entry]) -> None:
        """Put samples that could not be delivered into the ledger, and say so. Raises BadSampleError beyond its budget."""

    def save(self, state: State, *, step: int, epoch: int, so_far: EpochSoFar, scaler: Mapping[str, Any]) -> None:
        """Write a checkpoint of the state after `step` completed updates."""

    def finish(self, *, exit_code: int) -> None:
        """Close the views, and tell them how the command is about to end; the record itself is on disk already."""

    def fail(self, reason: str) -> None:
        """Leave word of an error that ends the run."""


@dataclass(frozen=True)
class MainRecord(Record):
    """The files of a run folder, and the views of them. `best_metric` is a dotted name in a row, such as `val.top1`."""

    history: History
    report: Report
    progress: Progress
    status: Status
    ledger: BadSampleLedger
    checkpoints_dir: Path
    provenance: Provenance
    resumes: Sequence[Resume]
    keep_last: int
    best_metric: str
    best_mode: Literal["min", "max"]

    def tell(self, phase: Phase, *, epoch: int, step: int, **facts: Any) -> None:
        self.status.tell(phase, epoch=epoch, step=step, **facts)

    def advance(self, step: int, *, epoch: int, facts: dict[str, str]) -> None:
        self.progress.advance(step, epoch=epoch, facts=facts)

    def say(self, text: str) -> None:
        self.progress.say(text)

    def rows(self) -> Sequence[Row]:
        return self.history.rows

    def write_nonfinite_step(self, step: int, account: Mapping[str, Any]) -> str:
        path = self.history.path.with_name(f"nonfinite_step_{step:08d}.json")
        write_json(path, account)
        return path.name

    def write_bad_samples(self, entries: Sequence[Entry]) -> None:
        if told := self.ledger.add(entries):
            self.progress.say(f"step {entries[-1].step}: {told}")

    def append(self, row: Row) -> None:
        before = self.history.rows[-1].step if self.history.rows else 0
        changed = changes_within(self.resumes, first_step=before, end_step=row.step)
        row = row.model_copy(update={"resumed": changed}) if changed else row
        self.history.append(row)
        best = self.history.best(self.best_metric, self.best_mode)
        self.report.show(row, best=best)
        self.progress.say(summary_line(row, is_best=best is row))
        for line in self.ledger.lines_of(row.epoch):
            self.progress.say(line)

    def save(self, state: State, *, step: int, epoch: int, so_far: EpochSoFar, scaler: Mapping[str, Any]) -> None:
        held = [*state.model.items(), *((f"EMA of {name}", tensor) for name, tensor in (state.ema or {}).items())]
        broken = [name for name, tensor in held if tensor.is_floating_point() and not tensor.isfinite().all()]
        if broken:
            raise CheckpointError(
                f"step {step}: {len(broken)} weights hold NaN or Inf, first {broken[0]}; nothing was saved, the last good "
                "checkpoint is untouched: lower optimizer.peak_lr or set train.clip_norm"
            )
        position = Position(
            step=step,
            epoch=epoch,
            world_size=self.provenance.world_size,
            digests=self.provenance.digests,
            law_fields=self.provenance.law_fields,
            free_fields=self.provenance.free_fields,
            code_version=self.provenance.code_version,
            wandb_run_id=self.provenance.wandb_run_id,
            optimizer=state.optimizer_facts,
            scaler=scaler,
            train_s=so_far.train_s,
            spent_ns=so_far.spent_ns,
            waited_ns=so_far.waited_ns,
            skipped_steps=so_far.skipped_steps,
            nonfinite_steps=so_far.nonfinite_steps,
            nonfinite_steps_of_run=so_far.nonfinite_steps_of_run,
            lineage=self.provenance.lineage.facts(),
            train_counts=self.provenance.train_counts,
            history=self.history.line_digests(),
        )
        checkpoint = save_checkpoint(
            self.checkpoints_dir,
            position=position,
            model_state=state.model,
            ema_state=state.ema,
            optimizer_state=state.optimizer,
            totals=so_far.totals,
            lineage=self.provenance.lineage,
        )
        point_to(self.checkpoints_dir, "last", checkpoint, step=step)
        best = self.history.best(self.best_metric, self.best_mode)
        if best is not None and best.step == step:
            point_to_best(checkpoint, best, best_metric=self.best_metric, best_mode=self.best_mode)
        retain(self.checkpoints_dir, keep_last=self.keep_last)

    def finish(self, *, exit_code: int) -> None:
        self.progress.close()
        self.report.finish(exit_code=exit_code)

    def fail(self, reason: str) -> None:
        self.progress.close()
        self.status.fail(reason)


def point_to_best(checkpoint: Path, row: Row, *, best_metric: str, best_mode: Literal["min", "max"]) -> None:
    """Make best.json name the checkpoint of the best row, with the metric that it is the best by."""
    metric = row.clean_name(best_metric)
    value = row.metric(metric)
    point_to(checkpoint.parent, "best", checkpoint, step=row.step, metric=metric, mode=best_mode, value=value)


def summary_line(row: Row, *, is_best: bool) -> str:
    """One line for an epoch on the screen; accuracies in percent."""
    train = row.train
    top1 = f"top-1 ({train.top1_label})" if train.top1_label else "top-1"
    parts = [f"epoch {row.epoch}", f"train loss {train.loss:.4f} {top1} {100 * train.top1:.2f} %"]
    if row.val is not None:
        parts.append(f"val loss {row.val.loss:.4f} top-1 {100 * row.val.top1:.2f} % top-5 {100 * row.val.top5:.2f} %")
        parts.append(classes_text(row.val))
        if row.val.leaked_samples:
            parts.append(clean_text(row.val))
    if row.val_ema is not None:
        ema = row.val_ema.clean or row.val_ema
        part = " on the clean part" if row.val_ema.clean else ""
        parts.append(f"EMA{part} loss {ema.loss:.4f} top-1 {100 * ema.top1:.2f} % top-5 {100 * ema.top5:.2f} %")
    if train.skipped_steps:
        parts.append(f"{train.skipped_steps} steps skipped (fp16 overflow)")
    if train.nonfinite_steps:
        parts.append(f"{train.nonfinite_steps} steps left out (not finite), {train.void_samples} samples void")
    parts.append(f"{train.images_per_s:.1f} images/s, {100 * train.wait_fraction:.0f} % waiting")
    return " · ".join(parts) + (" · best so far" if is_best else "")


def classes_text(metrics: SplitMetrics) -> str:
    """The means over classes, for the screen, in percent: of all, and of those of each frequency that is present."""
    held = {"many": metrics.many_top1, "medium": metrics.medium_top1, "few": metrics.few_top1}
    told = [f"{frequency} {100 * value:.2f}" for frequency, value in held.items() if value is not None]
    return f"macro {100 * metrics.macro_top1:.2f} %" + (f" ({', '.join(told)})" if told else "")


def clean_text(metrics: EvaluationMetrics) -> str:
    """What a leak leaves of an evaluation, for the screen; accuracies in percent."""
    told = f"{metrics.leaked_samples} of {metrics.expected_samples} leaked"
    if metrics.clean is None:
        return f"{told}, no clean part"
    clean = metrics.clean
    return (
        f"{told}, clean part of {clean.num_samples}: loss {clean.loss:.4f} top-1 {100 * clean.top1:.2f} % "
        f"top-5 {100 * clean.top5:.2f} %"
    )
