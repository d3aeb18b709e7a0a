"""Garbage is found while a run goes on: memory does not rise with the number of checkpoints."""

from __future__ import annotations

import gc
from pathlib import Path

from tests.ranks import run_module, run_ranks
from tests.runs import write_config

MAX_WATCHED = 60_000
"""Objects that the collector watches after a short run; the imports alone are 440,000."""


def test_the_collector_watches_what_a_run_makes_and_not_what_it_imported(dataset_dir: Path, tmp_path: Path) -> None:
    """CPython's full collection waits for a quarter as much as is watched, so what is watched must be little."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, model="test_resnet", epochs=1)
    arguments = ["--config", str(config), "--run-dir", str(tmp_path / "run")]
    outputs = [(tmp_path / "stdout", tmp_path / "stderr")]
    ((code, before, after),) = run_ranks(1, _watched_around_training, arguments, outputs)
    assert code == 0, (tmp_path / "stderr").read_text()
    assert after < MAX_WATCHED < before


def _watched_around_training(arguments: list[str], outputs: list[tuple[Path, Path]]) -> tuple[int, int, int]:
    """The command's exit code, and how many objects the collector watches before and after it."""
    gc.unfreeze()  # what this process was forked with counts, as what a launcher's rank imports does
    before = len(gc.get_objects())
    code = run_module("aplantida_dist.train", arguments, outputs)
    return code, before, len(gc.get_objects())
