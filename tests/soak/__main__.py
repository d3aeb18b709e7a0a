"""The soak: `python -m tests.soak --minutes 60`. Exit code 1 where the disturbed run is not the undisturbed one."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random

from aplantida_dist.command import CommandParser, count, run_command
from aplantida_dist.seeds import derive
from tests.disks import can_mount, mounted, remount
from tests.runs import rows_of
from tests.soak.faults import DISK_SIZE, KINDS, Kind, Planned, Scene, fire, plan_faults
from tests.soak.launcher import Launcher
from tests.soak.processes import adopt_orphans
from tests.soak.supervisor import SoakError, Supervisor
from tests.soak.verdict import (
    Check,
    all_fired,
    coverage,
    flat,
    same_rows,
    same_weights,
    wandb_rows,
    well_behaved,
)
from tests.wandb_beside import wandb_beside

EXAMPLE = """\
example:
  python -m tests.soak --minutes 60
  python -m tests.soak --minutes 8 --seed 7 --launcher accelerate

First an undisturbed run for about a third of the time, in which the memory of long-lived processes is measured; then the same
steps again with faults at random moments, the same command after each. The seed decides the faults, not the training.
"""
CONFIG = """\
seed: 3
data:
  dataset: {dataset}
  image_size: 32
  num_workers: 1
model:
  name: test_resnet
  kwargs:
    drop_rate: 0.1
optimizer:
  peak_lr: 0.001
schedule:
  kind: constant      # the only one under which a run of more epochs begins as one of fewer
  warmup_epochs: 1
train:
  epochs: 1000000
  global_batch_size: 16
  micro_batch_size: 8
  precision: fp32
  log_every_steps: 5
evaluation:
  micro_batch_size: 16
checkpoint:
  every_steps: 5
  keep_last: 4
report:
  wandb: online
"""
PICTURES = 240
COST_S: dict[Launcher, float] = {"forks": 8.0, "accelerate": 25.0}
"""What a fault takes beside the training: the end, the start and the steps done again."""
FAULTS_SHARE = 0.35
STEPS_A_FAULT = 30
"""At least so many of the run: three checkpoints of an attempt, and those lost."""
START_S: dict[Launcher, float] = {"forks": 4.0, "accelerate": 15.0}
CALM_SHARE = 0.1
"""The end of the disturbed run, in which nothing more happens."""
DONE_WITHIN_S = 3600.0


def main() -> int:
    options = _parser().parse_args()
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    started_s = time.monotonic()
    print(f"soak: {options.minutes} minutes, seed {seed}, launcher {options.launcher}", flush=True)
    adopt_orphans()
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="soak")))
        wandb = held.enter_context(wandb_beside(folder))
        os.environ["WANDB__FILE_STREAM_TRANSMIT_INTERVAL"] = "1"  # seconds; by itself the client waits for 15
        disk, is_mounted = held.enter_context(_disk(folder / "disk"))
        dataset_dir = _draw(folder)
        config = folder / "config.yaml"
        config.write_text(CONFIG.format(dataset=dataset_dir))
        num_faults = max(len(KINDS), int(FAULTS_SHARE * 60 * options.minutes / COST_S[options.launcher]))
        calm_s = (60 * options.minutes - num_faults * COST_S[options.launcher]) / 2

        arguments = ["--config", str(config)]
        whole = Supervisor(options.launcher, arguments, disk / "whole", folder / "of_whole", beside=wandb.pid)
        held.callback(whole.end)
        epochs, steps_per_epoch = _train_undisturbed(whole, seconds=calm_s, least_steps=STEPS_A_FAULT * num_faults)
        epochs_per_min = epochs / whole.lives.minutes
        print(f"undisturbed: {epochs} epochs of {steps_per_epoch} steps; now with {num_faults} faults", flush=True)

        arguments += [f"train.epochs={epochs}"]
        broken = Supervisor(options.launcher, arguments, disk / "run", folder / "of_run", beside=wandb.pid)
        scene = Scene(broken, wandb, disk, is_mounted, Random(derive(seed, "scene")))
        last_step = epochs * steps_per_epoch
        planned = plan_faults(
            seed,
            number=num_faults,
            total_steps=int((1 - CALM_SHARE) * last_step),
            start_s=START_S[options.launcher],
        )
        fired = _train_disturbed(scene, planned)
        checks = [
            *same_rows(whole.run_dir, broken.run_dir, epochs=epochs),
            coverage(dataset_dir, broken.run_dir),
            *same_weights(whole.run_dir, broken.run_dir, step=last_step),
            _fill_wandb_up(scene),
            all_fired(fired),
            *well_behaved(whole, broken),
            *flat(whole.lives, of="undisturbed", epochs_per_min=epochs_per_min),
            *flat(broken.lives, of="disturbed", epochs_per_min=epochs_per_min),
        ]
        if options.json is not None:
            samples = {role: asdict(life) for role, life in whole.lives.longest().items()}
            figures = {check.what: check.figure for check in checks}
            told = {"fired": fired, "starts": broken.num_attempts, "figures": figures, "samples": samples}
            options.json.write_text(json.dumps(told))
        return _tell(checks, fired, whole, broken, minutes=(time.monotonic() - started_s) / 60)


@contextmanager
def _disk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """A folder for the runs, and whether it is a disk of its own."""
    folder.mkdir()
    if not can_mount(folder):
        print("nothing can be mounted here: a limit on the size of files stands in for a full disk", flush=True)
        yield folder, False
        return
    with mounted(folder):
        remount(folder, DISK_SIZE)
        yield folder, True


def _draw(folder: Path) -> Path:
    """A small herbarium, built: the dataset."""
    root = Path(__file__).parents[2]
    pictures, dataset_dir = folder / "pictures", folder / "dataset"
    herbarium = ["-m", "aplantida_dist.herbarium", "--out", str(pictures), "--workers", "1"]
    drawing = [*herbarium, "--species", "6", "--pictures", str(PICTURES), "--side", "40"]
    building = [str(root / "shards" / "build.py"), "--from-folder", str(pictures), "--out", str(dataset_dir)]
    for command in (drawing, building):
        subprocess.run([sys.executable, *command], cwd=root, check=True, capture_output=True)
    return dataset_dir


def _train_undisturbed(supervisor: Supervisor, *, seconds: float, least_steps: int) -> tuple[int, int]:
    """One process from the start to a stop after so long, and so many steps; its whole epochs, and the steps of each."""
    supervisor.start()
    supervisor.wait_until(lambda: supervisor.step() >= 1 or not supervisor.is_running, limit_s=DONE_WITHIN_S)
    until_s = time.monotonic() + seconds
    supervisor.wait_until(
        lambda: (time.monotonic() > until_s and supervisor.step() >= least_steps) or not supervisor.is_running,
        limit_s=2 * DONE_WITHIN_S + seconds,
    )
    if not supervisor.is_running:
        raise SoakError(f"the undisturbed run ended: {supervisor.said()}")
    os.kill(supervisor.pid, signal.SIGTERM)
    supervisor.wait_for_the_end()
    rows = rows_of(supervisor.run_dir)
    return len(rows), rows[0]["step"]


def _train_disturbed(scene: Scene, planned: list[Planned]) -> Counter[Kind]:
    """The run through all faults to its end; how often each kind has left its marker."""
    supervisor, fired, started_s = scene.supervisor, Counter[Kind](), time.monotonic()
    for number, fault in enumerate(planned, start=1):
        _await_moment(supervisor, fault)
        if supervisor.is_done:
            break
        step, fault_s = supervisor.step(), time.monotonic()
        marker = fire(fault.kind, scene)
        fired[fault.kind] += marker is not None
        place = f"step {step}" if fault.after_start_s is None else f"{fault.after_start_s:.1f} s after the start"
        print(
            f"{number:4d}  {(fault_s - started_s) / 60:5.1f} min  {place:>22s}  {fault.kind}: {marker or 'NOT SEEN'}"
            f" · {time.monotonic() - fault_s:.1f} s",
            flush=True,
        )
        if not supervisor.is_running:
            supervisor.start()
    while not supervisor.is_done:
        supervisor.keep_running()
        supervisor.wait_until(lambda: not supervisor.is_running, limit_s=DONE_WITHIN_S)
    supervisor.wait_for_the_end()
    return fired


def _await_moment(supervisor: Supervisor, fault: Planned) -> None:
    """Until the run is where the fault is planned; in mid-run an attempt has always saved something, so that the run gets on."""
    supervisor.keep_running()
    if fault.after_start_s is not None and supervisor.num_saved == 0:
        supervisor.wait_until(lambda: not supervisor.is_running, limit_s=fault.after_start_s)
        return
    while not supervisor.is_done:
        supervisor.keep_running()
        if supervisor.step() >= fault.at_step and supervisor.num_saved >= 2:
            break
        supervisor.pause(0.05)
    supervisor.wait_until(lambda: not supervisor.is_running, limit_s=fault.more_s)


def _fill_wandb_up(scene: Scene) -> Check:
    """What W&B has; where it was unplugged last, after the same command once more, which hands over what is left."""
    check = wandb_rows(scene.wandb, scene.supervisor.run_dir)
    if check.holds:
        return check
    scene.supervisor.start()
    scene.supervisor.wait_for_the_end()
    again = wandb_rows(scene.wandb, scene.supervisor.run_dir)
    return Check(again.what, again.holds, f"{check.figure}, {again.figure} after the command once more")


def _tell(checks: list[Check], fired: Counter[Kind], whole: Supervisor, broken: Supervisor, *, minutes: float) -> int:
    """Print the tables; the exit code."""
    print("\nfaults that fired")
    for kind in KINDS:
        print(f"  {fired[kind]:4d}  {kind}")
    print(f"  {broken.num_attempts} starts of the same command, {minutes:.1f} minutes in all\n\nverdict")
    width = max(len(check.what) for check in checks)
    for check in checks:
        print(f"  {'yes' if check.holds else 'NO '}  {check.what:{width}s}  {check.figure}")
    for text in (*broken.unprovoked, *whole.orphans, *broken.orphans):
        print(text)
    return int(not all(check.holds for check in checks))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m tests.soak",
        description="Train through every kind of fault under a supervisor that only repeats the same command, and compare with an undisturbed run.",
        example=EXAMPLE,
    )
    parser.add_argument("--minutes", type=count, default=60, help="about how long (default %(default)s)")
    parser.add_argument("--seed", type=int, help="of the faults (default: drawn, and printed)")
    parser.add_argument(
        "--launcher",
        choices=("forks", "accelerate"),
        default="forks",
        help="forks of this process, which start in a second, or launch/cpu_two_ranks.sh (default %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="write the figures here, too, and the samples of the undisturbed run")
    return parser


if __name__ == "__main__":
    run_command(main)
