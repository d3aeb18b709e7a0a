"""Small runs for the tests: a config, and a job put together as the command does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aplantida_dist.checkpoint import Position
from aplantida_dist.compose import Training, compose_across_ranks
from aplantida_dist.config_file import load_config
from aplantida_dist.ground import Request
from aplantida_dist.history import without_time
from aplantida_dist.signals import Listener
from aplantida_dist.world import open_world

CONFIG = """\
seed: 3
data:
  dataset: {dataset}
  image_size: 32
  num_workers: {num_workers}
model:
  name: {model}
optimizer:
  peak_lr: 0.003
schedule:
  kind: cosine
  warmup_epochs: 1
loss:
  label_smoothing: 0.1
train:
  epochs: {epochs}
  global_batch_size: 16
  micro_batch_size: 4
  precision: {precision}
  clip_norm: 1.0
  log_every_steps: 3
evaluation:
  micro_batch_size: 4
checkpoint:
  every_steps: {every_steps}
report:
  wandb: disabled
"""


def write_config(
    path: Path,
    dataset_dir: Path,
    *,
    model: str = "test_convnext",
    epochs: int = 3,
    num_workers: int = 0,
    precision: str = "fp32",
    every_steps: int | str = "null",
) -> Path:
    """A config of 5 steps an epoch on the small dataset: 69 samples in 4 whole steps of 16 and a last one of 5."""
    text = CONFIG.format(
        dataset=dataset_dir,
        model=model,
        epochs=epochs,
        num_workers=num_workers,
        precision=precision,
        every_steps=every_steps,
    )
    path.write_text(text)
    return path


def compose(config_path: Path, run_dir: Path, overrides: Sequence[str] = ()) -> Training:
    """Put a training together on this rank, as the command does."""
    config = load_config(config_path, list(overrides))
    is_spread = config.train.parallel == "fsdp"
    world = open_world(precision=config.train.precision, timeout_s=60, spreads_parameters=is_spread)
    request = Request(run_dir, resume="auto", max_samples=None, extra_checks=False, allow_leak=False)
    return compose_across_ranks(config, world=world, request=request, listener=Listener())


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """A run's history without its clock and speed fields."""
    return [without_time(json.loads(line)) for line in (run_dir / "history.jsonl").read_text().splitlines()]


def position_at(step: int, **known: Any) -> Position:
    """The position of a checkpoint of which nothing is known but the step and what is given."""
    unknown: dict[str, Any] = {
        **dict.fromkeys(("free_fields", "lineage", "train_counts", "history")),
        **{name: {} for name in ("digests", "law_fields", "scaler")},
        **dict.fromkeys(("code_version", "wandb_run_id"), ""),
        **dict.fromkeys(("epoch", "spent_ns", "waited_ns", "skipped_steps"), 0),
        **dict.fromkeys(("nonfinite_steps", "nonfinite_steps_of_run"), 0),
        "world_size": 1,
        "train_s": 0.0,
        "optimizer": {"groups": [], "scalars": {}},
    }
    return Position(**{**unknown, **known, "step": step})


def cut_back(run_dir: Path, *, step: int) -> None:
    """As if the run had died right after the checkpoint of this step: nothing later is on disk but the history's rows."""
    for checkpoint in (run_dir / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
