"""The one file that puts a training together: from a config, a dataset and a world to a job and where it begins."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from aplantida_dist import __version__
from aplantida_dist.bad_samples import BadSampleLedger
from aplantida_dist.checkpoint import Checkpoint, load_model_state, unpack_optimizer
from aplantida_dist.config import Config
from aplantida_dist.ema import Ema, build_ema
from aplantida_dist.freezing import make_freezing
from aplantida_dist.ground import Ground, Request, lay_ground
from aplantida_dist.history import History
from aplantida_dist.init_from import write_beginning
from aplantida_dist.interruption import Interruption
from aplantida_dist.job import Job, Running
from aplantida_dist.lineage import Lineage
from aplantida_dist.lock import this_process
from aplantida_dist.metrics import Totals
from aplantida_dist.model import pixel_convention
from aplantida_dist.nonfinite import Watch
from aplantida_dist.origin import trace_origin_across_ranks
from aplantida_dist.progress import open_progress
from aplantida_dist.recipe import (
    bad_sample_budget_of,
    decided,
    mixing_of,
    nonfinite_policy_of,
    normalize_of,
    objective_of,
    optimizer_of,
    reading_of,
    schedule_of,
    stopping_of,
    transforms_of,
)
from aplantida_dist.record import MainRecord, Provenance, Record
from aplantida_dist.report import new_run_id, open_report
from aplantida_dist.resumes import RESUMES_FILE, Changes, Resume, note_resume, read_resumes
from aplantida_dist.rewind import rewind
from aplantida_dist.run_folder import (
    changed_since,
    checkpoints_dir,
    prepare_run_folder,
)
from aplantida_dist.signals import Listener
from aplantida_dist.soft_targets import Coverage
from aplantida_dist.status import Status
from aplantida_dist.strict_yaml import dump_yaml, show
from aplantida_dist.teachers import coverage_line, seat, write_teachers
from aplantida_dist.terminal import warn
from aplantida_dist.wandb_report import WandbRun
from aplantida_dist.world import World


@dataclass(frozen=True)
class Training:
    """A job, the step it begins at, the epoch it begins in the middle of, and what to tell of its weights."""

    job: Job
    start_step: int
    running: Running
    origin_lines: tuple[str, ...]


def compose_across_ranks(config: Config, *, world: World, request: Request, listener: Listener) -> Training:
    """Collective. Put a training together; any rank's UserError is raised on all of them before a step is taken."""
    ground = world.agree_across_ranks(lambda: lay_ground(config, world=world, request=request))
    world.require_equal_across_ranks(
        "what the run stands on (config, dataset, checkpoint)", f"{ground.digests} at {ground.start_step}"
    )
    origin = trace_origin_across_ranks(
        world=world,
        train_split=ground.train_split,
        val_split=ground.val_split,
        checkpoint=ground.checkpoint,
        beginning=ground.beginning,
        pretrained=config.model.name if config.model.pretrained else None,
        taught_by=[
            *((teacher.descent, teacher.lineage) for teacher in ground.teachers),
            *(() if ground.soft_targets is None else ground.soft_targets.parents()),
        ],
        allow_leak=request.allow_leak,
    )
    coverage = _cover(config, ground, world=world)
    pixels = pixel_convention(ground.model)
    ema = world.agree_across_ranks(lambda: _open_ema(config, ground, world=world))
    optimizer = world.agree_across_ranks(lambda: optimizer_of(config, ground.model))
    model, prepared = world.prepare(ground.model, optimizer)
    head_only_steps = math.ceil(config.model.head_only_epochs * ground.plan.steps_per_epoch)
    # Not before: where parameters are spread, others have taken their place.
    freezing = world.agree_across_ranks(lambda: make_freezing(world.unwrap(model), head_only_steps=head_only_steps))
    running = Running(Totals(ground.class_map.num_classes, world.device))
    if ground.checkpoint is not None:
        _restore(ground.checkpoint, world=world, model=model, optimizer=prepared, running=running)
    schedule = schedule_of(config, ground.plan)
    changed = _changed(config, ground, world=world)
    record = world.agree_across_ranks(
        lambda: _open_record(
            config,
            ground,
            changed=changed,
            lineage=origin.lineage,
            world=world,
            request=request,
            total_steps=schedule.total_steps,
        )
    )
    train_transform, evaluation_transform = transforms_of(config, pixels)
    stopping = stopping_of(config)
    job = Job(
        world=world,
        model=model,
        optimizer=prepared,
        ema=ema,
        normalize=normalize_of(config, pixels, world),
        plan=ground.plan,
        schedule=schedule,
        train_split=ground.train_split,
        val_split=ground.val_split,
        leaked=origin.leaked,
        train_transform=train_transform,
        evaluation_transform=evaluation_transform,
        reading=reading_of(config, world),
        record=record,
        digests=ground.digests,
        num_classes=ground.class_map.num_classes,
        train_counts=ground.train_counts,
        seed=config.seed,
        mixing=mixing_of(config, ground.plan),
        objective=objective_of(
            config,
            class_map=ground.class_map,
            train_counts=ground.train_counts,
            teachers=ground.teachers,
            soft_targets=ground.soft_targets,
            device=world.device,
        ),
        teachers=seat(ground.teachers, world),
        missing_soft_labels=coverage.num_missing,
        clip_norm=config.train.clip_norm,
        nonfinite=nonfinite_policy_of(config),
        stopping=stopping,
        interruption=Interruption(world, listener),
        voids_bad_samples=config.data.on_bad_sample == "void",
        metrics_to_hold=(config.checkpoint.best_metric, *([] if stopping is None else [stopping.metric])),
        freezing=freezing,
        clip_agc=config.train.clip_agc,
        log_every_steps=config.train.log_every_steps,
        checkpoint_every_steps=config.checkpoint.every_steps,
        evaluate_every_epochs=config.evaluation.every_epochs,
        evaluation_micro_batch_size=decided(config.evaluation.micro_batch_size),
        extra_checks=request.extra_checks,
    )
    world.agree_across_ranks(config.require_all_read)
    teacher_lines = [coverage_line(teacher, image_size=config.data.image_size) for teacher in ground.teachers]
    lines = (*_changed_lines(changed), *origin.lines, *teacher_lines, *coverage.lines)
    return Training(job, ground.start_step, running, lines)


def _open_ema(config: Config, ground: Ground, *, world: World) -> Ema | None:
    """The EMA that a config asks for: as the checkpoint holds it, or one that begins with the model. Before `World.prepare`."""
    if config.ema.decay is None:
        return None
    ema = build_ema(ground.model, world=world, decay=config.ema.decay, warmup=config.ema.warmup)
    if ground.checkpoint is not None:
        load_model_state(ema.model, ground.checkpoint, "ema")
    return ema


def _cover(config: Config, ground: Ground, *, world: World) -> Coverage:
    """Collective. Hold the soft labels, if any, against the train split, whose keys the main process alone reads."""
    soft_targets, split = ground.soft_targets, ground.train_split
    if soft_targets is None:
        return Coverage(0, ())
    budget = config.soft_labels.missing_budget
    return world.learn_from_main_across_ranks(lambda: soft_targets.require_cover(split, missing_budget=budget))


def _restore(checkpoint: Checkpoint, *, world: World, model: nn.Module, optimizer: Any, running: Running) -> None:
    """Give optimizer, scaler and the running epoch what the checkpoint holds; its sums go on from the main process alone."""
    position = checkpoint.position
    unpack_optimizer(world.unwrap(model), optimizer.optimizer, checkpoint)
    if position.scaler and world.accelerator.scaler is not None:
        world.accelerator.scaler.load_state_dict(dict(position.scaler))
    running.train_s = position.train_s
    running.watch = Watch(position.skipped_steps, position.nonfinite_steps, position.nonfinite_steps_of_run)
    if world.is_main:
        running.totals.merge(checkpoint.totals())
        running.spent_before_ns, running.waited_before_ns = position.spent_ns, position.waited_ns


def _changed(config: Config, ground: Ground, *, world: World) -> Changes:
    """What a resumed run does otherwise than the one that wrote its checkpoint, and may."""
    if ground.checkpoint is None:
        return {}
    return changed_since(
        ground.checkpoint,
        world_size=world.world_size,
        code_version=__version__,
        free_fields=config.free_fields(),
        free_defaults=config.free_defaults(),
    )


def _changed_lines(changed: Changes) -> Iterator[str]:
    """The same for the screen."""
    if changed:
        told = "; ".join(f"{name} was {show(old)}, is {show(new)}" for name, (old, new) in changed.items())
        yield f"changed since the checkpoint, as {RESUMES_FILE} and the history note: {told}"


def _open_record(
    config: Config,
    ground: Ground,
    *,
    changed: Changes,
    lineage: Lineage,
    world: World,
    request: Request,
    total_steps: int,
) -> Record:
    """Make the run folder, open history, report, progress and status on the main process; the other ranks get silence."""
    report, checkpoint = config.report, config.checkpoint
    settings = (report.wandb, report.project, report.name, list(report.tags))
    keep_last, best_metric, best_mode = checkpoint.keep_last, checkpoint.best_metric, checkpoint.best_mode
    bad_sample_budget = bad_sample_budget_of(config)
    if not world.is_main:
        return Record()
    prepare_run_folder(request.run_dir, config_yaml=dump_yaml(config.to_dict()), class_map=ground.class_map)
    if ground.beginning is not None:
        write_beginning(request.run_dir, ground.beginning)
    if ground.teachers:
        write_teachers(request.run_dir, ground.teachers)
    run_id = new_run_id() if ground.checkpoint is None else ground.checkpoint.position.wandb_run_id
    history = History(request.run_dir)
    rewind(
        checkpoints_dir(request.run_dir),
        history=history,
        checkpoint=ground.checkpoint,
        recorded_step=ground.recorded_step,
        best_metric=best_metric,
        best_mode=best_mode,
        warn=warn,
    )
    resumes = read_resumes(request.run_dir / RESUMES_FILE)
    if ground.checkpoint is not None or resumes:
        here = this_process()
        resume = Resume(
            from_step=ground.start_step, time_utc=here.since_utc, host=here.host, pid=here.pid, changed=changed
        )
        resumes = note_resume(request.run_dir, resume)
    ledger = BadSampleLedger(request.run_dir, budget=bad_sample_budget, class_names=ground.class_map.class_names)
    ledger.cut_after(ground.start_step)
    mode, project, name, tags = settings
    return MainRecord(
        history=history,
        report=open_report(
            WandbRun(project, name or request.run_dir.name, tags, run_id, request.run_dir, config.to_dict()),
            mode=mode,
            rows=history.rows,
            best=history.best(best_metric, best_mode),
            warn=warn,
        ),
        progress=open_progress(is_main=True, first_step=ground.start_step, total_steps=total_steps),
        status=Status(request.run_dir, total_steps=total_steps),
        ledger=ledger,
        checkpoints_dir=checkpoints_dir(request.run_dir),
        provenance=Provenance(
            world_size=world.world_size,
            digests=ground.digests,
            law_fields=config.law_fields(),
            free_fields=config.free_fields(),
            code_version=__version__,
            wandb_run_id=run_id,
            lineage=lineage,
            train_counts=ground.train_counts,
        ),
        resumes=resumes,
        keep_last=keep_last,
        best_metric=best_metric,
        best_mode=best_mode,
    )
