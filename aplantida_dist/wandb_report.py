"""The history's rows in W&B, as one run whose id outlives the process. The only importer of wandb."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import wandb
from wandb.sdk import wandb_setup
from wandb.sdk.lib import wbauth

from aplantida_dist.errors import UserError
from aplantida_dist.history import COLUMNS_FILE, HISTORY_FILE, Row
from aplantida_dist.signals import STOPPED_CODE

FLUSH_INTERVAL_S = 1.0
"""W&B writes its folder every 15 s by itself; a kill would take those rows with it."""
REQUEST_S = 5
"""For the requests that a check of the key makes, at the start and before the artifact; by itself W&B takes 10 s and 19 s for them."""
EARLIER_DIR = "earlier"
ROOM_BYTES = 65_536
"""More than W&B's own buffer holds back, and some tens of rows."""


class ReportError(UserError):
    """W&B cannot be reported to in the mode that was asked for."""


@dataclass(frozen=True)
class WandbRun:
    """What a run is in W&B. Its files lie in `run_dir`/wandb."""

    project: str
    name: str
    tags: list[str]
    run_id: str
    run_dir: Path
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where W&B's own folders of this run lie, one a process."""
        return self.run_dir / "wandb"

    @property
    def sync_command(self) -> str:
        """What hands everything over later. `latest-run` is W&B's link to the newest folder, which holds every row."""
        return f"wandb sync --include-online {self.folder / 'latest-run'}"


@dataclass(frozen=True)
class Limits:
    """How long W&B may take, in seconds: a silent server must not hold up a run whose results are on disk already."""

    init_s: float
    """Until its server answers the start of a run, which takes two seconds where all is well. Then the run goes on offline."""
    finish_s: float
    """To hand over what is left, a second's work where all is well. Then `wandb sync` does it later."""
    grace_s: float
    """Beyond both, for W&B's own process to start on a busy machine and to notice that its time is up. Then it is given up."""


class WandbReport:
    """An open W&B run. Rows are W&B steps by their epoch: one that its server has already is left out by its client."""

    def __init__(self, run: Any, described: WandbRun) -> None:
        self._run = run
        self._described = described
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")

    def show(self, row: Row, *, best: Row | None) -> None:
        """Log the numbers of the row under `train/loss`, `val/top1`, … and the best row's as `best/…` in the summary."""
        self._run.log(flatten(row.to_json()), step=row.epoch, commit=True)
        if best is not None:
            self._run.summary.update({f"best/{name}": value for name, value in flatten(best.to_json()).items()})
        _require_room(self._described.folder)

    def finish(self, *, exit_code: int) -> None:
        """Keep config, class map and history as an artifact of the run, and close it, also where a server takes no artifact."""
        try:
            self._keep_files()
        finally:
            if exit_code == STOPPED_CODE:
                self._run.mark_preempting()
            self._run.finish(exit_code=exit_code)

    def _keep_files(self) -> None:
        artifact = wandb.Artifact(f"history-{self._run.id}", type="history")
        for name in ("config.yaml", "classes.json", HISTORY_FILE, COLUMNS_FILE):
            if (self._described.run_dir / name).exists():
                artifact.add_file(str(self._described.run_dir / name), name=name)
        self._run.log_artifact(artifact)


def require_key() -> None:
    """Raise ReportError unless a key for W&B's server lies on this machine: in the environment, netrc or settings. Asks nobody."""
    try:
        auth = wbauth.authenticate_session(
            host=wandb_setup.singleton().settings.base_url, source="report.wandb", prompt=False, update_session=False
        )
    except wandb.errors.Error as error:
        raise _refused(error) from None
    if auth is None:
        raise ReportError(
            "report.wandb is online and no API key is configured on this machine; log in with `wandb login`, set WANDB_API_KEY, "
            "or set report.wandb=offline"
        )


def open_wandb(
    described: WandbRun, *, mode: Literal["offline", "online"], limits: Limits, warn: Callable[[str], None]
) -> WandbReport:
    """Open the run, online or in an offline folder; offline with a warning where the server is not reached or does not want us.

    The folders of earlier processes go aside: the new one will hold every row, and two folders with the same rows, both
    synced, would be doubles.
    """
    _set_earlier_folders_aside(described.folder)
    if mode == "online":
        try:
            return WandbReport(_init(described, mode="online", limits=limits), described)
        except Exception as error:
            warn(
                f"W&B: {one_line(error)}; going on offline, everything is kept: sync it later with `{described.sync_command}`"
            )
            # W&B's process goes on holding the run's id, and would refuse it.
            wandb.teardown()
            _set_earlier_folders_aside(described.folder)
    return WandbReport(_init(described, mode="offline", limits=limits), described)


def stop_service() -> None:
    """End W&B's own process below this one, if it does not answer: its exit handler would wait for it for ever."""
    for pid in _children():
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == "wandb-core":
                os.kill(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names to one level: {"val": {"top1": 0.5}} → {"val/top1": 0.5}."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}/"))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def one_line(error: Exception) -> str:
    """An error's text without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _init(described: WandbRun, *, mode: Literal["offline", "online"], limits: Limits) -> Any:
    # Artifacts are staged in the home folder unless told otherwise; a run keeps to its own.
    os.environ.setdefault("WANDB_DATA_DIR", str(described.folder))
    os.environ.setdefault("WANDB_CACHE_DIR", str(described.folder / "cache"))
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(REQUEST_S))
    return wandb.init(
        project=described.project,
        name=described.name,
        id=described.run_id,
        # A server that knows the run tells how far its rows go, and the client leaves those out.
        resume="allow" if mode == "online" else None,
        mode=mode,
        dir=described.run_dir,
        tags=described.tags,
        config=dict(described.config),
        settings=wandb.Settings(
            console="off",
            silent=True,
            init_timeout=limits.init_s,
            finish_timeout=limits.finish_s,
            x_disable_meta=True,
            x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
        ),
    )


def _set_earlier_folders_aside(folder: Path) -> None:
    """Move what earlier processes left to `earlier/`, where `wandb sync` does not look."""
    for path in sorted([*folder.glob("offline-run-*"), *folder.glob("run-*")]):
        aside = folder / EARLIER_DIR / path.name
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)


def _require_room(folder: Path) -> None:
    """Raise ReportError where the folder takes no more. W&B's own process writes that to its log and loses the rows in silence."""
    path = folder / "room"
    try:
        path.write_bytes(bytes(ROOM_BYTES))
    except OSError as error:
        raise ReportError(f"{folder}: takes no more files: {error.strerror}; make room") from error
    finally:
        path.unlink(missing_ok=True)


def _children() -> list[int]:
    """The processes that this one started."""
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return [int(pid) for text in lists for pid in text.split()]


def _refused(error: Exception) -> ReportError:
    return ReportError(
        f"report.wandb is online and W&B says: {one_line(error)}; log in with `wandb login`, or set report.wandb=offline"
    )
