"""Warm-up, stable, decay: the schedule whose end may be decided late."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from aplantida_dist.config import ConfigError
from aplantida_dist.config_file import load_config
from aplantida_dist.errors import UserError
from aplantida_dist.schedule import Schedule
from tests.ranks import command_on_ranks
from tests.runs import compose, rows_of, write_config


@pytest.mark.parametrize("warmup_steps", [0, 1, 5])
@pytest.mark.parametrize("decay_steps", [1, 8, 35])
def test_wsd_rises_stays_and_falls_in_a_line(warmup_steps: int, decay_steps: int) -> None:
    """Up as in every kind, the peak until decay_steps before the end, then equal steps down to final_lr, which the end would have."""
    schedule = Schedule("wsd", 1e-3, 1e-5, warmup_steps, 40, decay_steps)
    rates = [schedule.learning_rate(step) for step in range(41)]
    assert all(a < b for a, b in itertools.pairwise(rates[: warmup_steps + 1]))
    assert set(rates[warmup_steps : 40 - decay_steps + 1]) == {1e-3}
    falls = [a - b for a, b in itertools.pairwise(rates[40 - decay_steps :])]
    assert falls == pytest.approx([(1e-3 - 1e-5) / decay_steps] * decay_steps)
    assert rates[40] == pytest.approx(1e-5)


def test_a_longer_run_shares_the_stable_part() -> None:
    """What wsd is for: before the shorter one falls, the runs are the same."""
    short, long = (Schedule("wsd", 1.0, 0.0, 3, total, 10) for total in (30, 50))
    assert [short.learning_rate(s) for s in range(21)] == [long.learning_rate(s) for s in range(21)]
    assert short.learning_rate(22) < long.learning_rate(22)


@pytest.mark.parametrize(("decay_epochs", "decay_steps"), [("1.0", 5), ("0.5", 3), ("1.9", 10), ("2.0", 10)])
def test_epochs_become_steps(dataset_dir: Path, tmp_path: Path, decay_epochs: str, decay_steps: int) -> None:
    """Fractions are rounded up, and the fall begins after the warm-up at the earliest."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    overrides = ["schedule.kind=wsd", f"schedule.decay_epochs={decay_epochs}", "schedule.final_lr=0.0001"]
    schedule = compose(config, tmp_path / "run", overrides).job.schedule
    assert schedule == Schedule("wsd", 0.003, 0.0001, 5, 15, decay_steps)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["schedule.kind=wsd"], "schedule.decay_epochs: found null, expected the number of epochs in which wsd falls"),
        (
            ["schedule.kind=wsd", "schedule.decay_epochs=2.5"],
            "schedule.decay_epochs: found 2.5, expected at most 2, what train.epochs has left after schedule.warmup_epochs",
        ),
        (["schedule.kind=wsd", "schedule.decay_epochs=0"], "schedule.decay_epochs: found 0, expected greater than 0"),
    ],
)
def test_wsd_says_when_it_falls(dataset_dir: Path, tmp_path: Path, overrides: list[str], fault: str) -> None:
    """decay_epochs is missing, too long beside the warm-up, or nothing."""
    with pytest.raises(ConfigError, match="decay_epochs") as caught:
        load_config(write_config(tmp_path / "config.yaml", dataset_dir), overrides)
    assert fault in str(caught.value)


def test_other_kinds_do_not_read_decay_epochs(dataset_dir: Path, tmp_path: Path) -> None:
    """A key that nothing reads is an error."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    with pytest.raises(UserError, match=r"decay_epochs: is set to 1\.0, but nothing reads it"):
        compose(config, tmp_path / "run", ["schedule.decay_epochs=1.0"])


def test_wsd_acts_in_the_history_and_on_any_number_of_ranks(dataset_dir: Path, tmp_path: Path) -> None:
    """The rows' rates are the schedule's: the peak, then the last step of the fall; two ranks lose what one loses."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2)
    overrides = ["schedule.kind=wsd", "schedule.decay_epochs=1.0"]
    for ranks in (1, 2):
        run_dir = tmp_path / f"run_{ranks}"
        arguments = ["--config", config, "--run-dir", run_dir, *overrides]
        finished = command_on_ranks(ranks, "aplantida_dist.train", arguments, tmp_path)
        assert [rank.code for rank in finished] == [0] * ranks, finished[0].stderr
        assert rows_of(run_dir)[-1]["learning_rate"] == pytest.approx(0.003 / 5)
    one, two = (json.loads((tmp_path / f"run_{n}" / "training_history.json").read_text()) for n in (1, 2))
    assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-5)
