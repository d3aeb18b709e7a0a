"""The command that trains: `accelerate launch [...] -m aplantida_dist.train --config FILE [a.b=c ...]`."""

from __future__ import annotations

import argparse
import atexit
import gc
import os
from contextlib import ExitStack
from pathlib import Path

import torch

from aplantida_dist.batch_size import decide_micro_batch_size_across_ranks
from aplantida_dist.command import CommandParser, count, run_command
from aplantida_dist.compose import Training, compose_across_ranks
from aplantida_dist.config import Config
from aplantida_dist.config_file import load_config
from aplantida_dist.debug import load_debug_config
from aplantida_dist.errors import UserError
from aplantida_dist.ground import Request
from aplantida_dist.interruption import Interrupted
from aplantida_dist.record import Record
from aplantida_dist.run_folder import locked
from aplantida_dist.signals import STOPPED_CODE, Listener
from aplantida_dist.strict_yaml import show
from aplantida_dist.trainer import train
from aplantida_dist.wandb_report import require_key
from aplantida_dist.world import World, open_world, told_once_a_node

EXAMPLE = """\
example:
  accelerate launch -m aplantida_dist.train --config configs/demo.yaml data.num_workers=4
  accelerate launch -m aplantida_dist.train --config configs/teacher_global.yaml --debug --max-samples 500

The same command again goes on where the run stopped. launch/ holds a script for each kind of machine.
"""


def main() -> int:
    """Train as the config says. The exit code: 0 where the run is done, STOPPED_CODE where it stopped on request."""
    listener = Listener()
    listener.listen()
    with told_once_a_node():
        arguments = _parse_arguments()
        config = _load(arguments)
        if config.report.wandb == "online" and os.environ.get("RANK", "0") == "0":
            require_key()
    world = open_world(
        precision=config.train.precision,
        timeout_s=config.train.timeout_s,
        spreads_parameters=config.train.parallel == "fsdp",
    )
    with ExitStack() as held, world.watched() as watchdog:
        listener.meet()
        world.learn_from_main_across_ranks(lambda: held.enter_context(locked(arguments.run_dir)))
        training = _compose_across_ranks(arguments, config, world=world, listener=listener)
        record = training.job.record
        watchdog.tell_cause_to(record.fail)
        watchdog.leave_stacks_in(arguments.run_dir)
        _collect_only_what_follows()
        try:
            train(training.job, start_step=training.start_step, running=training.running)
        except Interrupted:
            _finish_stopped_across_ranks(record, world=world, listener=listener)
            return STOPPED_CODE
        watchdog.at("finishing", step=training.job.schedule.total_steps)
        record.finish(exit_code=0)
        world.close()
    if world.is_main:
        print(
            f"done: {arguments.run_dir}; see it with `python -m aplantida_dist.analyze {arguments.run_dir}`", flush=True
        )
    return 0


def _compose_across_ranks(
    arguments: argparse.Namespace, config: Config, *, world: World, listener: Listener
) -> Training:
    """Collective. The training that the command line and the config ask for, announced."""
    if arguments.debug:
        torch.autograd.set_detect_anomaly(True)
    request = Request(
        run_dir=arguments.run_dir,
        resume=arguments.resume,
        max_samples=arguments.max_samples,
        extra_checks=arguments.debug,
        allow_leak=arguments.allow_leak,
    )
    config = decide_micro_batch_size_across_ranks(config, world=world, request=request)
    training = compose_across_ranks(config, world=world, request=request, listener=listener)
    if world.is_main:
        _announce(training, arguments.run_dir)
    return training


def _collect_only_what_follows() -> None:
    """Take what is there before the first step out of the garbage collector's sight.

    CPython collects its oldest generation when a quarter as much as it holds has come to it: of the 440,000 objects of the
    imports that is thousands of checkpoints' garbage (safetensors makes a cycle a tensor), so that memory would rise for hours.
    """
    gc.collect()
    gc.freeze()
    # What is frozen at the interpreter's end is not freed, which nanobind (triton's) tells on stderr as a leak.
    atexit.register(gc.unfreeze)


def _finish_stopped_across_ranks(record: Record, *, world: World, listener: Listener) -> None:
    """Collective. Close what is open. A rank that left before the main process is done would have the launcher end that one."""

    def finish() -> None:
        record.finish(exit_code=STOPPED_CODE)
        listener.rest()

    world.learn_from_main_across_ranks(finish)
    listener.rest()
    world.close()


def _parse_arguments() -> argparse.Namespace:
    parser = CommandParser(
        prog="aplantida_dist.train",
        description="Train a timm model on a dataset of shards, on as many processes as the launcher starts.",
        example=EXAMPLE,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file; configs/ holds some")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config values that replace the file's")
    parser.add_argument("--run-dir", type=Path, help="where the run's files go (default: runs/<name of the config>)")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|CHECKPOINT",
        help="go on from the newest checkpoint (auto, the default), refuse to (never), or from this one",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="small, fast, one process, anomaly detection, extra checks; the same code path",
    )
    parser.add_argument("--max-samples", type=count, metavar="N", help="read only the first N samples of each split")
    parser.add_argument(
        "--allow-leak",
        action="store_true",
        help="go on although the weights were trained on photographs of val: the history shows val whole and its clean part; to be said again on resume",
    )
    arguments = parser.parse_intermixed_args()
    if arguments.run_dir is None:
        arguments.run_dir = Path("runs") / (arguments.config.stem + ("_debug" if arguments.debug else ""))
    return arguments


def _load(arguments: argparse.Namespace) -> Config:
    """The resolved config; what --debug changed of it is said aloud."""
    if not arguments.debug:
        return load_config(arguments.config, arguments.overrides)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"--debug runs on one process, the launcher started {os.environ['WORLD_SIZE']}; launch with --num_processes 1"
        )
    config, changes = load_debug_config(arguments.config, arguments.overrides)
    for change in changes:
        print(f"--debug: {change.name} = {show(change.new)} (was {show(change.old)})", flush=True)
    return config


def _announce(training: Training, run_dir: Path) -> None:
    """Say what is about to run, where its weights come from, and which rank will have nothing to do."""
    job = training.job
    plan, world = job.plan, job.world
    num_parameters = sum(parameter.numel() for parameter in job.model.parameters())
    steps_left = job.schedule.total_steps - training.start_step
    print(
        f"run {run_dir} · {world.world_size} × {world.device.type} · {num_parameters / 1e6:.2f} M parameters · {job.num_classes} classes\n"
        f"train {job.train_split.num_samples} samples in {plan.steps_per_epoch} steps of {plan.global_batch_size} an epoch"
        f" · val {'not evaluated' if job.val_split is None else job.val_split.num_samples}\n"
        + (
            f"going on from step {training.start_step}, {steps_left} to go"
            if training.start_step
            else f"{steps_left} steps to go"
        ),
        flush=True,
    )
    for line in training.origin_lines:
        print(line, flush=True)
    idle = [rank for rank in range(world.world_size) if plan.slots_of(rank, world.world_size)[0] >= plan.slots_per_step]
    if idle:
        print(
            f"warning: a step has {plan.slots_per_step} micro-batches, so {len(idle)} of {world.world_size} ranks have nothing to do; "
            "lower train.micro_batch_size or raise train.global_batch_size",
            flush=True,
        )


if __name__ == "__main__":
    run_command(main, outlives_readers=True)
