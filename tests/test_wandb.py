"""W&B shows the history's rows and nothing else: a real offline run is read back with W&B's own tool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aplantida_dist.wandb_report import flatten
from tests.ranks import command_on_ranks
from tests.runs import write_config


def runs_of(run_dir: Path, below: str = "wandb") -> list[list[dict[str, Any]]]:
    """The records of each offline run below a run folder, oldest first."""
    found = []
    for folder in sorted((run_dir / below).glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        printed = subprocess.run(command, capture_output=True, check=True).stdout
        found.append([json.loads(line) for line in printed.splitlines()])
    return found


def rows_in(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that were logged, without W&B's own underscored fields."""
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [{name: value for name, value in item.items() if not name.startswith("_")} for item in items]


def summary_in(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary after its last update."""
    summary: dict[str, Any] = {}
    for record in records:
        if record["type"] == "summary":
            summary |= record["summary"].get("update", {})
    return summary


def train(config: Path, run_dir: Path, folder: Path, *overrides: str) -> None:
    finished = command_on_ranks(
        2, "aplantida_dist.train", ["--config", config, "--run-dir", run_dir, *overrides], folder
    )
    assert [rank.code for rank in finished] == [0, 0], finished[0].stderr


def test_offline_runs_show_the_rows_of_the_history(dataset_dir: Path, tmp_path: Path) -> None:
    """One W&B run for two processes and a resume, whose folder holds all rows of the history, the first process's aside; best/* in the summary, config, class map and history kept."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2)
    run_dir = tmp_path / "run"
    train(config, run_dir, tmp_path, "report.wandb=offline", "schedule.kind=constant")
    train(config, run_dir, tmp_path, "report.wandb=offline", "schedule.kind=constant", "train.epochs=3")
    (first,), (resumed,) = runs_of(run_dir, "wandb/earlier"), runs_of(run_dir)
    rows = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert rows_in(first) == [flatten(row) for row in rows[:2]]
    assert rows_in(resumed) == [flatten(row) for row in rows]
    best = max(rows, key=lambda row: row["val"]["top1"])
    assert {name: value for name, value in summary_in(resumed).items() if name.startswith("best/")} == {
        f"best/{name}": value for name, value in flatten(best).items()
    }
    described = [next(record["run"] for record in records if record["type"] == "run") for records in (first, resumed)]
    assert described[0]["run_id"] == described[1]["run_id"]
    assert described[0]["config"]["update"]["optimizer"]["peak_lr"] == 0.003
    metrics = [record["metric"] for record in first if record["type"] == "metric"]
    assert any(metric.get("glob_name") == "*" and metric["step_metric"] == "epoch" for metric in metrics)
    artifact = next(record["artifact"] for record in resumed if record["type"] == "artifact")
    kept = {entry["path"] for entry in artifact["manifest"]["contents"]}
    assert kept == {"config.yaml", "classes.json", "history.jsonl", "training_history.json"}


@pytest.mark.slow
def test_a_run_is_found_by_project_name_and_tags(dataset_dir: Path, tmp_path: Path) -> None:
    """As the config says; without a name it has the run folder's."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    offline = ["report.wandb=offline"]
    train(config, tmp_path / "plain", tmp_path, *offline)
    train(
        config, tmp_path / "told", tmp_path, *offline, "report.project=herb", "report.name=Rosa", "report.tags=[a, b]"
    )
    told = []
    for name in ("plain", "told"):
        (records,) = runs_of(tmp_path / name)
        run = next(record["run"] for record in records if record["type"] == "run")
        told.append((run["project"], run["display_name"], run.get("tags", [])))
    assert told == [("aplantida", "plain", []), ("herb", "Rosa", ["a", "b"])]


def test_disabled_leaves_no_trace(dataset_dir: Path, tmp_path: Path) -> None:
    """No folder, no file."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    train(config, tmp_path / "run", tmp_path, "report.wandb=disabled")
    assert not (tmp_path / "run" / "wandb").exists()


def test_online_without_a_key_is_an_error_before_the_first_step(
    dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that nobody could ever see online is not begun, and no file of it is made."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    arguments = ["--config", config, "--run-dir", tmp_path / "run", "report.wandb=online"]
    (finished,) = command_on_ranks(1, "aplantida_dist.train", arguments, tmp_path)
    assert finished.code == 2
    assert "report.wandb is online and no API key is configured" in finished.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
