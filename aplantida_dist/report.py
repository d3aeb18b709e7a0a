"""The live report: the history's rows in W&B, from the main process. The only importer of wandb."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import wandb

from aplantida_dist.errors import UserError
from aplantida_dist.history import COLUMNS_FILE, HISTORY_FILE, Row
from aplantida_dist.signals import STOPPED_CODE

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 60.0
"""A server that does not answer must not hold up a run whose results are on disk already."""


class ReportError(UserError):
    """W&B cannot be reported to in the mode that was asked for."""


class Report(Protocol):
    """A view of the history."""

    def show(self, row: Row, *, best: Row | None) -> None:
        """Show a row that the history holds, and which row is the best so far."""

    def finish(self, *, exit_code: int) -> None:
        """Hand over what is left, the files of the record and how the command ends. Returns within its budget."""


class NullReport:
    """The report of a run without W&B, and of every rank but the main process."""

    def show(self, row: Row, *, best: Row | None) -> None:
        """Nothing."""

    def finish(self, *, exit_code: int) -> None:
        """Nothing."""


class WandbReport:
    """A W&B run whose id outlives the process: a resumed training goes on in the same run."""

    def __init__(self, run: Any, run_dir: Path) -> None:
        self._run = run
        self._run_dir = run_dir
        # A step that goes backwards makes W&B drop the row, so the x axis is the row's own epoch.
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")

    def show(self, row: Row, *, best: Row | None) -> None:
        """Log the numbers of the row under `train/loss`, `val/top1`, … and the best row's as `best/…` in the summary."""
        self._run.log(flatten(row.to_json()), commit=True)
        if best is not None:
            self._run.summary.update({f"best/{name}": value for name, value in flatten(best.to_json()).items()})

    def finish(self, *, exit_code: int) -> None:
        """Keep config, class map and history as an artifact of the run, and close it."""
        artifact = wandb.Artifact(f"history-{self._run.id}", type="history")
        for name in ("config.yaml", "classes.json", HISTORY_FILE, COLUMNS_FILE):
            if (self._run_dir / name).exists():
                artifact.add_file(str(self._run_dir / name), name=name)
        self._run.log_artifact(artifact)
        if exit_code == STOPPED_CODE:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)


def new_run_id() -> str:
    """A W&B run id, drawn once a run and kept in its checkpoints."""
    return secrets.token_hex(4)


def open_report(
    *,
    mode: Literal["offline", "online", "disabled"],
    project: str,
    name: str,
    tags: list[str],
    run_id: str,
    run_dir: Path,
    config: Mapping[str, Any],
) -> Report:
    """Open the run in W&B, or nothing when disabled. For the main process. ReportError says what `online` lacks."""
    if mode == "disabled":
        return NullReport()
    # Artifacts are staged in the home folder unless told otherwise; a run keeps to its own.
    os.environ.setdefault("WANDB_DATA_DIR", str(run_dir / "wandb"))
    os.environ.setdefault("WANDB_CACHE_DIR", str(run_dir / "wandb" / "cache"))
    settings = wandb.Settings(
        console="off", silent=True, init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S, x_disable_meta=True
    )
    try:
        run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=run_dir,
            tags=tags,
            config=dict(config),
            settings=settings,
        )
    except (wandb.errors.Error, wandb.errors.UsageError) as error:
        reason = " ".join(str(error).split())
        raise ReportError(
            f"report.wandb is {mode} and W&B says: {reason}; log in with `wandb login`, or set report.wandb=offline"
        ) from error
    return WandbReport(run, run_dir)


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names to one level: {"val": {"top1": 0.5}} → {"val/top1": 0.5}."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}/"))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
