"""The verdict: what the run that was disturbed has in common with the one that was not, and what its processes did."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.history import TIME_FIELDS
from aplantida_dist.wandb_report import flatten
from tests.runs import rows_of
from tests.soak.faults import KINDS, Kind, wandb_run_id
from tests.soak.measuring import MAX_DESCRIPTORS_PER_MIN, Lives, max_mib_per_min, slope_of
from tests.soak.supervisor import Supervisor
from tests.wandb_beside import WandbBeside


@dataclass(frozen=True)
class Check:
    """One line of the verdict."""

    what: str
    holds: bool
    figure: str


def same_rows(whole_dir: Path, run_dir: Path, *, epochs: int) -> list[Check]:
    """Each epoch once, each row that of the undisturbed run. That one was asked for more epochs, so its config has another digest."""
    whole, rows = rows_of(whole_dir)[:epochs], rows_of(run_dir)
    for row in (*whole, *rows):
        del row["digests"]["config"]
    different = [ours["epoch"] for ours, theirs in zip(rows, whole, strict=False) if ours != theirs]
    numbers = [row["epoch"] for row in rows]
    columns = json.loads((run_dir / "training_history.json").read_text())["epoch"]
    return [
        Check("each epoch once", numbers == columns == list(range(1, epochs + 1)), f"{len(numbers)} of {epochs}"),
        Check("rows of the undisturbed run", len(whole) == len(rows) and not different, f"{len(different)} differ"),
    ]


def coverage(dataset_dir: Path, run_dir: Path) -> Check:
    """Every row counts each sample of each split and has the manifest's digest of them."""
    dataset = open_dataset(dataset_dir)
    faults = []
    for row in rows_of(run_dir):
        for name in ("train", "val"):
            split, block = dataset.open_split(name), row[name]
            found = (block["num_samples"], block["expected_samples"], block["void_samples"], block["identity_digest"])
            if found != (split.num_samples, split.num_samples, 0, split.identity_digest):
                faults.append((row["epoch"], name))
    return Check("coverage in every row", not faults, f"{len(faults)} rows without" if faults else "count and digest")


def same_weights(whole_dir: Path, run_dir: Path, *, step: int) -> list[Check]:
    """Weights and optimizer after the last step, bit for bit."""
    checks = []
    for name in ("model", "optimizer"):
        file = Path("checkpoints") / f"step_{step:08d}" / f"{name}.safetensors"
        ours, theirs = load_file(run_dir / file), load_file(whole_dir / file)
        different = [key for key in theirs if key not in ours or not np.array_equal(ours[key], theirs[key])]
        is_same = ours.keys() == theirs.keys() and not different
        checks.append(Check(f"{name} after step {step}", is_same, f"{len(different)} of {len(theirs)} tensors differ"))
    return checks


def wandb_rows(wandb: WandbBeside, run_dir: Path) -> Check:
    """W&B's server has each row once."""
    run = wandb.run(wandb_run_id(run_dir))
    held = [] if run is None else [_timeless(row) for row in run.rows()]
    expected = [_timeless(flatten(row)) for row in rows_of(run_dir)]
    return Check("W&B's server has each row", held == expected, f"{len(held)} of {len(expected)}")


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name.rpartition("/")[2] not in TIME_FIELDS}


def all_fired(fired: Counter[Kind]) -> Check:
    missing = [kind for kind in KINDS if not fired[kind]]
    return Check("every kind of fault fired", not missing, ", ".join(missing) or f"{fired.total()} faults")


def well_behaved(*supervisors: Supervisor) -> list[Check]:
    """No end without a cause, no process that outlives its launcher, nothing half written left."""
    unprovoked = sum(len(supervisor.unprovoked) for supervisor in supervisors)
    orphans = sum(len(supervisor.orphans) for supervisor in supervisors)
    longest_s = max(supervisor.longest_gone_s for supervisor in supervisors)
    leftovers = [path.name for supervisor in supervisors for path in supervisor.run_dir.rglob(".*.part")]
    return [
        Check("no end without a fault", not unprovoked, f"{unprovoked}"),
        Check("no orphan", not orphans, f"{orphans}, at most {longest_s:.1f} s from a fault to the last process gone"),
        Check("no file half written", not leftovers, ", ".join(leftovers) or "0"),
    ]


def flat(lives: Lives, *, of: str, epochs_per_min: float) -> list[Check]:
    """Memory and descriptors of the processes that lived longest, by role."""
    checks = []
    limit = max_mib_per_min(epochs_per_min)
    for role, life in sorted(lives.longest().items()):
        memory = slope_of(life.seconds, life.resident_mib)
        descriptors = slope_of(life.seconds, life.descriptors)
        if memory is None or descriptors is None:
            continue
        checks += [
            Check(f"memory, {role}, {of}", memory.is_flat(limit), f"{memory.text('MiB')}, allowed {limit:.3f}"),
            Check(f"descriptors, {role}, {of}", descriptors.is_flat(MAX_DESCRIPTORS_PER_MIN), descriptors.text("")),
        ]
    return checks
