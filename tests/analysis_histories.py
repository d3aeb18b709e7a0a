"""Made-up histories for the tests of the analysis: seeded, smooth as real ones, written through our own history."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aplantida_dist.data.classmap import ClassMap
from aplantida_dist.history import History, Row, make_row
from aplantida_dist.seeds import derive

Columns = dict[str, list[Any]]

INCIDENT: Columns = {
    "train_loss": [0.0] * 15,
    "train_top1_acc": [0.0] * 15,
    "train_top5_acc": [0.0] * 15,
    "val_loss": [9.5393] * 15,
    "val_top1_acc": [0.0] * 15,
    "val_top5_acc": [0.0] * 15,
}
"""The first trainer's incident: a debug set smaller than one batch, with `drop_last`."""


def healthy_columns(*, epochs: int, num_classes: int, seed: int = 0, noise: float = 0.02, digits: int = 4) -> Columns:
    """A training that goes well: losses fall from a fresh head's, warm-up and cosine, noise between epochs, rounded.

    Accuracies are percent. The first epoch starts 3 % above ln(classes), as a head with wide logits does.
    """
    draw = random.Random(derive(seed, "healthy", epochs, num_classes))
    guess, chance = math.log(num_classes), 1.0 / num_classes
    columns: Columns = {name: [] for name in INCIDENT} | {"learning_rate": []}
    for epoch in range(epochs):
        done = (epoch + 1) / max(epochs, 8)
        skill = (1.0 - math.exp(-4.0 * done)) * 0.92
        for split, lag in (("train", 0.0), ("val", 0.12)):
            shown = skill * (1.0 - lag)
            level = guess * 1.03 if epoch == 0 and split == "train" else guess * (1.0 - 0.9 * shown)
            top1 = chance + (1.0 - chance) * max(0.0, shown - 0.1) * (1.0 + noise * draw.uniform(-1, 1) / 2)
            columns[f"{split}_loss"].append(round(level * (1.0 + noise * draw.uniform(-1, 1)), digits))
            columns[f"{split}_top1_acc"].append(round(100.0 * top1, digits))
            columns[f"{split}_top5_acc"].append(
                round(100.0 * min(1.0, top1 + 0.6 * (1.0 - top1) * min(1.0, 5 * chance + shown)), digits)
            )
        warm = min(1.0, (epoch + 1) / 2)
        columns["learning_rate"].append(3e-5 * warm * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs)))
    return columns


def rows_of(
    columns: Mapping[str, Sequence[Any]], *, changes: Mapping[int, Mapping[str, Any]] | None = None
) -> list[Row]:
    """Turn columns into rows of our own history. `changes` maps an epoch (from 1) to dotted fields and their values."""
    rows = []
    for i in range(len(columns["train_loss"])):
        values: dict[str, Any] = {
            "epoch": i + 1,
            "step": 100 * (i + 1),
            "time_utc": f"2026-03-01T{i // 60 % 24:02d}:{i % 60:02d}:00Z",
            "learning_rate": columns["learning_rate"][i],
            "train": _split(columns, "train", i)
            | {"images_per_s": 812.4 + 9 * math.sin(i), "wait_fraction": 0.03 if i else 0.4},
            "digests": {
                "config": "c" * 64,
                "class_map": "d" * 64,
                "train_manifest": "e" * 64,
                "val_manifest": "f" * 64,
            },
        }
        if columns["val_loss"][i] is not None:
            values["val"] = _split(columns, "val", i)
        for dotted, value in (changes or {}).get(i + 1, {}).items():
            *parents, name = dotted.split(".")
            place = values
            for parent in parents:
                place = place[parent]
            place[name] = value
        rows.append(make_row(**values))
    return rows


def write_run(run_dir: Path, rows: Sequence[Row], *, num_classes: int | None = None, config: str = "") -> Path:
    """Write a run folder as the trainer does."""
    run_dir.mkdir(parents=True, exist_ok=True)
    history = History(run_dir)
    for row in rows:
        history.append(row)
    if num_classes:
        ClassMap(tuple(f"species {i}" for i in range(num_classes))).save(run_dir / "classes.json")
    if config:
        (run_dir / "config.yaml").write_text(config)
    return run_dir


def write_file(path: Path, content: Any) -> Path:
    """Write a training_history.json as the first trainer did: NaN stands literally."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def _split(columns: Mapping[str, Sequence[Any]], split: str, i: int) -> dict[str, Any]:
    total = 136312 if split == "train" else 17040
    top1 = columns[f"{split}_top1_acc"][i] / 100.0
    return {
        "loss": columns[f"{split}_loss"][i],
        "top1": top1,
        "top5": columns[f"{split}_top5_acc"][i] / 100.0,
        "macro_top1": 0.9 * top1,
        "num_samples": total,
        "expected_samples": total,
        "void_samples": 0,
        "identity_digest": "a" * 16 if split == "train" else "b" * 16,
    }
