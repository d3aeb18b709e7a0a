"""The readers: a run folder, a columns file or a list of epochs in, curves out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from aplantida_dist.analysis.curves import Curves, Series, SplitCurves
from aplantida_dist.analysis.wording import name_text
from aplantida_dist.data.classmap import CLASSES_FILE, load_class_map
from aplantida_dist.errors import UserError
from aplantida_dist.files import read_json
from aplantida_dist.history import COLUMNS_FILE, HISTORY_FILE, SplitMetrics, read_history

CONFIG_FILE = "config.yaml"

COLUMN_NAMES: Mapping[str, tuple[str, ...]] = {
    "train_loss": ("train_loss",),
    "train_top1": ("train_top1_acc", "train_acc"),
    "train_top5": ("train_top5_acc",),
    "val_loss": ("val_loss",),
    "val_top1": ("val_top1_acc", "val_acc"),
    "val_top5": ("val_top5_acc",),
    "clean_loss": ("val_clean_loss",),
    "clean_top1": ("val_clean_top1_acc",),
    "clean_top5": ("val_clean_top5_acc",),
    "ema_loss": ("val_ema_clean_loss", "val_ema_loss"),
    "ema_top1": ("val_ema_clean_top1_acc", "val_ema_top1_acc"),
    "ema_top5": ("val_ema_clean_top5_acc", "val_ema_top5_acc"),
    **{
        f"{split}_{name}": (f"{column}_{name}_acc",)
        for split, column in (("val", "val"), ("clean", "val_clean"))
        for name in ("macro_top1", "many_top1", "medium_top1", "few_top1")
    },
    "leaked": ("val_leaked_samples",),
    "learning_rate": ("learning_rate", "lr"),
    "images_per_s": ("images_per_s",),
    "wait_fraction": ("wait_fraction",),
}
"""What each series is called in training_history.json; the first name that a file holds is read."""

_PERCENT = frozenset(series for series in COLUMN_NAMES if "_top" in series)
_REMEDY = f"give a run folder with {HISTORY_FILE}, or a {COLUMNS_FILE}"


class SourceError(UserError):
    """A path that holds no history."""


def read_sources(sources: Sequence[Path], *, num_classes: int | None = None) -> tuple[Curves, ...]:
    """Read each source into curves, in the order given, named so that no two share a name.

    `num_classes` is for the sources that do not tell it themselves (a run folder does, by its classes.json).
    Raises SourceError for a path without a history, or one that is given twice.
    """
    records = [_record_path(source) for source in sources]
    for record in records:
        if records.count(record) > 1:
            raise SourceError(
                f"{record}: given {records.count(record)} times, expected each history once; leave out all but one"
            )
    return tuple(
        _read_run(record, name=name, num_classes=num_classes)
        if record.suffix == ".jsonl"
        else _read_file(record, name=name, num_classes=num_classes)
        for record, name in zip(records, _names(records), strict=True)
    )


def _record_path(source: Path) -> Path:
    """The file that holds the history of a source; our own record before its columns."""
    if not source.exists():
        raise SourceError(f"{source}: no such file or folder; {_REMEDY}")
    if source.is_file():
        return source.resolve()
    held = [source / name for name in (HISTORY_FILE, COLUMNS_FILE) if (source / name).is_file()]
    if not held:
        raise SourceError(f"{source}: no {HISTORY_FILE} and no {COLUMNS_FILE} in this folder; {_REMEDY}")
    return held[0].resolve()


def _names(records: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell the records apart; the usual file names are left out."""
    usual = {HISTORY_FILE, COLUMNS_FILE}
    parts = [r.parent.parts if r.name in usual else (*r.parent.parts, r.stem) for r in records]
    parts = [tuple(map(name_text, part)) for part in parts]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(record) for record in records]


def _read_run(record: Path, *, name: str, num_classes: int | None) -> Curves:
    """Read our own record, with the class map and the config that lie beside it."""
    try:
        rows = read_history(record)
    except OSError as error:
        raise SourceError(f"{record}: not readable: {error.strerror}; {_REMEDY}") from error
    if not rows:
        raise SourceError(f"{record}: holds no finished epoch; wait for the first epoch to end")
    classes_path, config_path = record.with_name(CLASSES_FILE), record.with_name(CONFIG_FILE)
    known = load_class_map(classes_path).num_classes if classes_path.is_file() else None
    return Curves(
        name=name,
        path=record,
        epochs=tuple(row.epoch for row in rows),
        train=_split_of([row.train for row in rows]),
        val=_split_of([row.val for row in rows]),
        learning_rate=tuple(row.learning_rate for row in rows),
        images_per_s=tuple(row.train.images_per_s for row in rows),
        wait_fraction=tuple(row.train.wait_fraction for row in rows),
        num_classes=known or num_classes,
        num_classes_from=_classes_from(known, num_classes),
        rows=tuple(rows),
        config_text=config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else "",
        clean=_split_of([row.val and row.val.clean for row in rows]),
        leaked=tuple(row.val.leaked_samples if row.val else None for row in rows),
        ema=_split_of(
            [row.val_ema and (row.val_ema.clean if row.val_ema.leaked_samples else row.val_ema) for row in rows]
        ),
    )


def _split_of(metrics: Sequence[SplitMetrics | None]) -> SplitCurves:
    return SplitCurves(
        loss=tuple(None if m is None else m.loss for m in metrics),
        top1=tuple(None if m is None else m.top1 for m in metrics),
        top5=tuple(None if m is None else m.top5 for m in metrics),
        macro_top1=tuple(None if m is None else m.macro_top1 for m in metrics),
        many_top1=tuple(None if m is None else m.many_top1 for m in metrics),
        medium_top1=tuple(None if m is None else m.medium_top1 for m in metrics),
        few_top1=tuple(None if m is None else m.few_top1 for m in metrics),
    )


def _classes_from(known: int | None, given: int | None) -> str:
    if known is not None:
        return CLASSES_FILE
    return "--num-classes" if given is not None else ""


def _read_file(record: Path, *, name: str, num_classes: int | None) -> Curves:
    """Read a training_history.json in either form; accuracies are percent by the format and never guessed."""
    content = read_json(record, what="history", remedy=_REMEDY)
    if isinstance(content, dict) and isinstance(content.get("history"), list | dict):
        content = content["history"]
    columns = _columns_of(content, record=record)
    found = {
        series: next((name for name in names if isinstance(columns.get(name), list) and columns[name]), None)
        for series, names in COLUMN_NAMES.items()
    }
    lengths = {name: len(columns[name]) for name in found.values() if name is not None}
    if not lengths:
        raise SourceError(f"{record}: holds no epoch of train_loss, val_loss or an accuracy; {_REMEDY}")
    length = max(lengths.values())
    unreadable: list[str] = []
    values: dict[str, Series] = {}
    for series, column in found.items():
        read = [
            _number(value, where=f"{column}[{i}]", unreadable=unreadable)
            for i, value in enumerate(columns[column] if column else [])
        ]
        scale = 100.0 if series in _PERCENT else 1.0
        filled = read + [None] * (length - len(read))
        values[series] = tuple(value if value is None else value / scale for value in filled)
    if all(value is None for series in values.values() for value in series):
        raise SourceError(f"{record}: holds no number; {_REMEDY}")
    return Curves(
        name=name,
        path=record,
        epochs=_epochs_of(columns.get("epoch"), length=length),
        train=SplitCurves(values["train_loss"], values["train_top1"], values["train_top5"]),
        val=_split_of_columns(values, "val"),
        learning_rate=values["learning_rate"],
        images_per_s=values["images_per_s"],
        wait_fraction=values["wait_fraction"],
        num_classes=num_classes,
        num_classes_from=_classes_from(None, num_classes),
        column_lengths=lengths,
        unreadable=tuple(unreadable),
        clean=_split_of_columns(values, "clean"),
        leaked=values["leaked"],
        ema=SplitCurves(values["ema_loss"], values["ema_top1"], values["ema_top5"]),
    )


def _split_of_columns(values: Mapping[str, Series], split: str) -> SplitCurves:
    return SplitCurves(**{part.name: values[f"{split}_{part.name}"] for part in fields(SplitCurves)})


def _columns_of(content: Any, *, record: Path) -> dict[str, Any]:
    """Turn a list of epochs into columns; columns stay as they are."""
    if isinstance(content, dict):
        return content
    if not isinstance(content, list) or not content or not all(isinstance(epoch, dict) for epoch in content):
        raise SourceError(
            f'{record}: found {_kind(content)}, expected columns ({{"train_loss": […], …}}) or a list of epochs '
            f'([{{"epoch": 1, "train_loss": …}}, …]); {_REMEDY}'
        )
    names = {name: None for epoch in content for name in epoch}
    return {name: [epoch.get(name) for epoch in content] for name in names}


def _kind(content: Any) -> str:
    if isinstance(content, list):
        return "an empty list" if not content else "a list of other things than epochs"
    return f"a {type(content).__name__}"


def _number(value: Any, *, where: str, unreadable: list[str]) -> float | None:
    """A number, or a text that is one ("NaN" too); null is None. Anything else is None and named in `unreadable`."""
    if value is None:
        return None
    try:
        if not isinstance(value, bool):
            return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        pass
    unreadable.append(f"{where} = {str(value)[:40]!r}")
    return None


def _epochs_of(column: Any, *, length: int) -> tuple[int, ...]:
    """The epochs as the file numbers them, or 1, 2, 3, …, should it not number each."""
    if isinstance(column, list) and len(column) == length and all(type(epoch) is int for epoch in column):
        return tuple(column)
    return tuple(range(1, length + 1))
