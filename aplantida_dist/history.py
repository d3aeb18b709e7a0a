"""The history: the record of a run, one validated row an epoch, synced to disk before anything else is told of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aplantida_dist.errors import UserError
from aplantida_dist.files import append_line, write_json, write_whole

HISTORY_FILE = "history.jsonl"
COLUMNS_FILE = "training_history.json"
SCHEMA = 1

SPEED_FIELDS = (
    "images_per_s",
    "wait_fraction",
    "host_fraction",
    "device_fraction",
    "read_fraction",
    "loader_images_per_s",
    "bound_by",
)
TIME_FIELDS = ("time_utc", *SPEED_FIELDS, "resumed")
"""What two equal runs may differ in: clock, speed, and what was changed on the way. Everything else in a row is reproducible."""


class HistoryError(UserError):
    """A row that would lie, or a history file that does not hold rows."""


class _Strict(BaseModel):
    """Finite numbers only; more keys may be added to a row, none renamed."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True)

    @model_validator(mode="after")
    def _added_keys_are_finite(self) -> _Strict:
        for name, value in _floats_in(self.model_extra or {}):
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}; numbers in the history are finite")
        return self


class SplitMetrics(_Strict):
    """Metrics over the samples of one split: exact sums divided once. Every `…top1` and `top5` is a fraction.

    `macro_top1` is the mean recall of the classes present; `many_top1`, `medium_top1`, `few_top1` are the same over those of
    a frequency (`data/frequency.py`), and absent where none of it is present.
    """

    loss: float
    top1: float = Field(ge=0.0, le=1.0)
    top5: float = Field(ge=0.0, le=1.0)
    macro_top1: float = Field(ge=0.0, le=1.0)
    many_top1: float | None = Field(default=None, ge=0.0, le=1.0)
    medium_top1: float | None = Field(default=None, ge=0.0, le=1.0)
    few_top1: float | None = Field(default=None, ge=0.0, le=1.0)
    num_samples: int = Field(gt=0)
    expected_samples: int = Field(gt=0)
    void_samples: int = Field(ge=0)
    identity_digest: str = Field(pattern=r"^[0-9a-f]{16}$")

    @model_validator(mode="after")
    def _every_sample_is_accounted_for(self) -> SplitMetrics:
        if self.num_samples + self.void_samples != self.expected_samples:
            raise ValueError(
                f"{self.num_samples} samples counted + {self.void_samples} void are not the {self.expected_samples} expected"
            )
        if self.top1 > self.top5:
            raise ValueError(f"top1 {self.top1} is above top5 {self.top5}")
        return self


class EvaluationMetrics(SplitMetrics):
    """The metrics of an evaluation. Where samples have leaked, `clean` holds those over all others beside the whole.

    `leaked_samples` counts the samples that the weights had been trained on; absent where there is none, as is `clean`. Where
    every sample has leaked there is no clean part, and it is absent, not zero. `logit_adjustment` is the τ of
    `evaluate --logit-adjustment`, absent where the logits are the model's own; `other_classes` what `evaluate --other-classes`
    did with those that the dataset lacks, absent where it lacks none.
    """

    leaked_samples: int | None = Field(default=None, gt=0)
    clean: SplitMetrics | None = None
    logit_adjustment: float | None = Field(default=None, gt=0.0)
    other_classes: Literal["count", "leave-out"] | None = None

    @model_validator(mode="after")
    def _leaked_and_clean_are_the_whole(self) -> EvaluationMetrics:
        leaked, clean = self.leaked_samples or 0, self.clean.expected_samples if self.clean else 0
        if (self.clean is not None and not leaked) or (leaked and leaked + clean != self.expected_samples):
            raise ValueError(
                f"{leaked} leaked samples + {clean} clean ones are not the {self.expected_samples} expected"
            )
        return self


class TrainMetrics(SplitMetrics):
    """The training epoch's metrics, with its speed: images a second over all ranks, share of the time spent waiting for data.

    `device_fraction` is the share in which a GPU had something of the steps to do, absent on CPUs; `host_fraction` what neither
    explains. On a GPU the three may exceed 1 together: a host may wait while the device still works. `read_fraction` is the share of
    the loaders' own time that was reading and not decoding, and `loader_images_per_s` what all of them deliver when none pauses;
    `bound_by` is the verdict (`verdict.py`). These are of the part of the epoch since its last resume, and absent from early histories.
    skipped_steps were left out by the fp16 scaler, whose samples count; nonfinite_steps by `train.on_nonfinite`, whose samples
    are void. Both kinds keep their place in the schedule; each is absent where there was none.
    `distinct_samples` stands where classes are sampled (data.sampling_exponent): the photographs drawn in the epoch, each counted once.
    `top1_label` stands where pictures were mixed: hits, of top-5 and of classes too, are counted by the label of the larger share.
    """

    top1_label: Literal["dominant"] | None = None
    distinct_samples: int | None = Field(default=None, gt=0)
    images_per_s: float = Field(ge=0.0)
    wait_fraction: float = Field(ge=0.0, le=1.0)
    host_fraction: float | None = Field(default=None, ge=0.0, le=1.0)
    device_fraction: float | None = Field(default=None, ge=0.0, le=1.0)
    read_fraction: float | None = Field(default=None, ge=0.0, le=1.0)
    loader_images_per_s: float | None = Field(default=None, ge=0.0)
    bound_by: Literal["decoding", "disk", "bursts", "host", "model"] | None = None
    skipped_steps: int | None = Field(default=None, gt=0)
    nonfinite_steps: int | None = Field(default=None, gt=0)


class Digests(_Strict):
    """What the row was measured on."""

    config: str
    class_map: str
    train_manifest: str
    val_manifest: str | None = None


class Row(_Strict):
    """One line of the history. `epoch` counts from 1; `step` counts completed optimizer updates. A split that was not evaluated is absent.

    `val_ema` is val evaluated with the EMA of the weights, over the same samples; absent where the run keeps none. `resumed`
    stands where the run was resumed within the epoch with something changed: by the step from which it holds, names with the
    value before and after. A resume that changes nothing leaves no trace here: the row is that of the unbroken run.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    epoch: int = Field(ge=1)
    step: int = Field(ge=1)
    time_utc: str
    learning_rate: float = Field(ge=0.0)
    train: TrainMetrics
    val: EvaluationMetrics | None = None
    val_ema: EvaluationMetrics | None = None
    digests: Digests
    resumed: dict[str, dict[str, list[Any]]] | None = None

    @model_validator(mode="after")
    def _ema_is_evaluated_beside_the_model(self) -> Row:
        if self.val_ema is not None and (
            self.val is None or self.val.expected_samples != self.val_ema.expected_samples
        ):
            raise ValueError("val_ema does not stand beside a val of the same samples")
        return self

    def to_json(self) -> dict[str, Any]:
        """The row as the dictionary that history.jsonl, W&B and the console show."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def metric(self, name: str) -> float | None:
        """Look up a metric by its dotted name, such as `val.top1`; None where this row does not hold it."""
        value: Any = self.to_json()
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                return None
            value = value[part]
        return float(value) if isinstance(value, int | float) else None

    def require_metric(self, name: str) -> None:
        """Raise HistoryError, which names those there are, where this row should hold a metric and does not.

        A row without an evaluation is judged by the metrics of train alone.
        """
        judged = self.val is not None or name.startswith("train.")
        if judged and self.metric(name) is None:
            held = ", ".join(_numbers_in(self.to_json()))
            raise HistoryError(
                f"the row of epoch {self.epoch} holds no metric {name!r}; name another in checkpoint.best_metric or "
                f"stopping.metric, and run the same command again to go on: there are {held}"
            )

    def clean_name(self, name: str) -> str:
        """The name of a metric over what the weights had not been trained on: `val.top1` is `val.clean.top1` where val leaks."""
        split, _, metric = name.partition(".")
        leaks = self.metric(f"{split}.leaked_samples") and not metric.startswith("clean.")
        return f"{split}.clean.{metric}" if leaks else name


class History:
    """The rows of a run and their two files: history.jsonl (the record) and training_history.json (the same in columns)."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / HISTORY_FILE
        self.columns_path = run_dir / COLUMNS_FILE
        self._lines: list[bytes] = _whole_lines(self.path) if self.path.exists() else []
        self.rows: list[Row] = _rows_of(self._lines, path=self.path)
        for number, (row, following) in enumerate(pairwise(self.rows), start=2):
            if following.step <= row.step:
                raise HistoryError(
                    f"{self.path}: line {number} is of step {following.step} and follows step {row.step}; "
                    "restore the file or start a new run folder"
                )

    def append(self, row: Row) -> None:
        """Write a row to disk, synced, and then the columns file. Raises HistoryError for a row that does not follow the last."""
        if self.rows and row.step <= self.rows[-1].step:
            raise HistoryError(
                f"{self.path}: a row for step {row.step} cannot follow the row of step {self.rows[-1].step}"
            )
        line = json.dumps(row.to_json(), allow_nan=False).encode()
        append_line(self.path, line)
        self._lines.append(line)
        self.rows.append(row)
        self._write_columns()

    def cut_after(self, step: int) -> int:
        """Cut back to the rows up to a checkpoint's step, so that its resumed run writes them again; returns how many went.

        The rows that are cut stay readable in history.cut.jsonl. A last line that a crash left unfinished is dropped too.
        """
        keep = [row for row in self.rows if row.step <= step]
        gone = self.rows[len(keep) :]
        for line in self._lines[len(keep) :]:
            append_line(self.path.with_name("history.cut.jsonl"), line)
        if self.path.exists():
            write_whole(self.path, b"".join(line + b"\n" for line in self._lines[: len(keep)]))
        self._lines, self.rows = self._lines[: len(keep)], keep
        if keep:
            self._write_columns()
        else:
            self.columns_path.unlink(missing_ok=True)
        return len(gone)

    def line_digests(self) -> list[str]:
        """The sha256 of each line: what a checkpoint remembers the history by."""
        return [hashlib.sha256(line).hexdigest() for line in self._lines]

    def require_unchanged(self, digests: Sequence[str], *, since: Path) -> None:
        """Raise HistoryError for the first line that is not what it was when the checkpoint `since`, which knows its digest, was saved."""
        found = self.line_digests()
        for number, expected in enumerate(digests, start=1):
            if number > len(found):
                what = "is missing or cut"
            elif found[number - 1] != expected:
                what = "was edited (its sha256 differs)"
            else:
                continue
            raise HistoryError(
                f"{self.path}: line {number} {what} since {since} was saved; restore the line, or repeat its epoch from an earlier "
                "checkpoint with --resume step_…, or start a new run folder"
            )

    def best(self, metric: str, mode: Literal["min", "max"]) -> Row | None:
        """The row with the best value of a metric; the earliest of equals. None while no row holds the metric.

        A split that leaks is judged by its clean part: the whole would reward what was learnt by heart.
        """
        held = [(value, row) for row in self.rows if (value := row.metric(row.clean_name(metric))) is not None]
        if not held:
            return None
        choose = max if mode == "max" else min
        best_value = choose(value for value, _ in held)
        return next(row for value, row in held if value == best_value)

    def _write_columns(self) -> None:
        write_json(self.columns_path, columns_of(self.rows))


def make_row(**values: Any) -> Row:
    """Validate the values of a row; HistoryError says which of them would lie."""
    try:
        return Row(**values)
    except ValidationError as error:
        raise HistoryError(
            f"the history refuses the row of epoch {values.get('epoch')}: {_first_fault(error)}"
        ) from None


def read_history(path: Path) -> list[Row]:
    """Read history.jsonl. A last line without its newline was cut by a crash and is left out; any other bad line is an error."""
    return _rows_of(_whole_lines(path), path=path)


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def _rows_of(lines: Sequence[bytes], *, path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(Row.model_validate_json(line))
        except ValidationError as error:
            is_of_another_schema = error.errors()[0]["loc"] == ("schema",)
            remedy = "use the version that wrote it" if is_of_another_schema else "restore the file"
            raise HistoryError(
                f"{path}: line {number} is not a row of schema {SCHEMA}: {_first_fault(error)}; {remedy} or start a new run folder"
            ) from None
    return rows


def columns_of(rows: list[Row]) -> dict[str, list[Any]]:
    """The rows as columns, accuracies in percent; `None` where a row holds no val."""
    columns: dict[str, list[Any]] = {
        "epoch": [row.epoch for row in rows],
        "step": [row.step for row in rows],
        "learning_rate": [row.learning_rate for row in rows],
    }
    clean = [row.val and row.val.clean for row in rows]
    leaked = [row.val and row.val.leaked_samples for row in rows]
    if any(leaked):
        columns["val_leaked_samples"] = leaked
    splits: dict[str, Sequence[SplitMetrics | None]] = {
        "train": [row.train for row in rows],
        "val": [row.val for row in rows],
        "val_clean": clean,
        "val_ema": [row.val_ema for row in rows],
        "val_ema_clean": [row.val_ema and row.val_ema.clean for row in rows],
    }
    for split, parts in splits.items():
        if any(parts):
            columns[f"{split}_loss"] = [part and part.loss for part in parts]
            columns[f"{split}_top1_acc"] = [part and 100.0 * part.top1 for part in parts]
            columns[f"{split}_top5_acc"] = [part and 100.0 * part.top5 for part in parts]
            columns[f"{split}_macro_top1_acc"] = [part and 100.0 * part.macro_top1 for part in parts]
            for name in ("many_top1", "medium_top1", "few_top1"):
                held: list[float | None] = [getattr(part, name, None) for part in parts]
                if any(value is not None for value in held):
                    columns[f"{split}_{name}_acc"] = [None if value is None else 100.0 * value for value in held]
            columns[f"{split}_num_samples"] = [part and part.num_samples for part in parts]
    top1_labels = [row.train.top1_label for row in rows]
    if any(top1_labels):
        columns["train_top1_label"] = top1_labels
    for name in SPEED_FIELDS:
        speeds = [getattr(row.train, name) for row in rows]
        if any(speed is not None for speed in speeds):
            columns[name] = speeds
    return columns


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    """A row without its TIME_FIELDS: what an equal run must reproduce byte for byte."""
    return {
        name: without_time(value) if isinstance(value, dict) else value
        for name, value in row.items()
        if name not in TIME_FIELDS
    }


def _floats_in(content: Any, *, place: str = "") -> Iterator[tuple[str, float]]:
    """Every float of JSON content with its dotted place."""
    if isinstance(content, float):
        yield place, content
    elif isinstance(content, dict | list):
        for name, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _floats_in(value, place=f"{place}.{name}" if place else str(name))


def _numbers_in(content: Mapping[str, Any], *, above: str = "") -> Iterator[str]:
    """The dotted names of the numbers below sections of a row, in its order."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _numbers_in(value, above=f"{above}{name}.")
        elif above and isinstance(value, int | float):
            yield above + name


def _first_fault(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place + ': ' if place else ''}{first['msg']}"
