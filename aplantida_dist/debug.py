"""Debug mode: the same config, small and fast on one device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from aplantida_dist.config import Change, Config, changes, flat
from aplantida_dist.config_file import load_config
from aplantida_dist.config_sections import DistillationSection
from aplantida_dist.strict_yaml import show

LARGEST = 8
"""Samples that --debug forwards at once, at most."""


def load_debug_config(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, list[Change]]:
    """Read a config and make it small and fast on one device, beneath the overrides; also returns what that changed."""
    asked = load_config(path, overrides)
    small = debug_overrides(asked, fixed={override.partition("=")[0] for override in overrides})
    config = load_config(path, [*(f"{name}={show(value)}" for name, value in small.items()), *overrides])
    return config, changes(flat(asked.to_dict()), flat(config.to_dict()))


def debug_overrides(config: Config, *, fixed: Collection[str] = ()) -> dict[str, Any]:
    """What --debug sets, by dotted name: a model of 0.3 million weights, 2 epochs, steps of at most 32 samples, no W&B.

    The `fixed` names are the user's and stay; batch sizes fit themselves to those that are fixed.
    """
    now = flat(config.to_dict())
    asked = now["train.micro_batch_size"]
    micro, whole = _batch_sizes(LARGEST if asked == "auto" else asked, now["train.global_batch_size"], fixed=fixed)
    small = {
        "data.image_size": 96,
        "data.num_workers": 0,
        "model.name": "test_vit",
        "model.pretrained": False,
        "model.init_from": None,
        "model.kwargs": {},
        "model.freeze": [],
        "model.head_only_epochs": min(1.0, now["model.head_only_epochs"]),
        "model.compile": None,
        "model.sync_batchnorm": False,
        "schedule.warmup_epochs": min(1.0, now["schedule.warmup_epochs"]),
        "mixing.last_epochs_off": min(1, now["mixing.last_epochs_off"]),
        "schedule.decay_epochs": None
        if now["schedule.decay_epochs"] is None
        else min(1.0, now["schedule.decay_epochs"]),
        "train.epochs": min(2, now["train.epochs"]),
        "train.global_batch_size": whole,
        "train.micro_batch_size": micro,
        "train.precision": "fp32",
        "train.log_every_steps": 1,
        "evaluation.every_epochs": min(1, now["evaluation.every_epochs"]),
        "evaluation.micro_batch_size": micro,
        "report.wandb": "disabled",
    }
    if not {"distillation", "distillation.teachers"} & set(fixed):
        # Without teachers nothing of the section is read.
        small |= {f"distillation.{name}": field.default for name, field in DistillationSection.model_fields.items()}
    return {name: value for name, value in small.items() if name not in fixed}


def _batch_sizes(micro: int, whole: int, *, fixed: Collection[str]) -> tuple[int, int]:
    """A micro-batch of at most 8 that divides a step of at most 32, apart from what is fixed."""
    micro_is_fixed = "train" in fixed or "train.micro_batch_size" in fixed
    whole_is_fixed = "train" in fixed or "train.global_batch_size" in fixed
    if not micro_is_fixed:
        micro = max(size for size in range(1, min(LARGEST, micro) + 1) if not whole_is_fixed or whole % size == 0)
    if not whole_is_fixed:
        whole = micro * max(1, min(32, whole) // micro)
    return micro, whole
