"""Every form of a history is read into the same curves, and what is no history is refused in one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from analysis_histories import INCIDENT, Columns, healthy_columns, rows_of, write_file, write_run

from aplantida_dist.analysis.curves import Curves, best_epoch
from aplantida_dist.analysis.sources import read_sources
from aplantida_dist.errors import UserError


def read(path: Path, *, num_classes: int | None = None) -> Curves:
    (curves,) = read_sources([path], num_classes=num_classes)
    return curves


def as_epochs(columns: Columns) -> list[dict[str, Any]]:
    """The list-of-epochs form of columns."""
    num_epochs = max(map(len, columns.values()))
    return [{"epoch": i + 1} | {name: values[i] for name, values in columns.items()} for i in range(num_epochs)]


@pytest.mark.parametrize("epochs", [1, 2, 30])
@pytest.mark.parametrize("num_classes", [2, 10, 7120])
def test_all_forms_of_one_history_give_the_same_curves(tmp_path: Path, epochs: int, num_classes: int) -> None:
    """Run folder, its record, our columns file, foreign columns, list of epochs, wrapped list: one reading."""
    columns = healthy_columns(epochs=epochs, num_classes=num_classes)
    run_dir = write_run(tmp_path / "run", rows_of(columns))
    sources = [
        run_dir,
        run_dir / "history.jsonl",
        run_dir / "training_history.json",
        write_file(tmp_path / "columns.json", columns),
        write_file(tmp_path / "epochs.json", as_epochs(columns)),
        write_file(tmp_path / "wrapped.json", {"history": as_epochs(columns), "best_val_acc": 12.0}),
    ]
    first, *others = [read(source) for source in sources]
    assert first.train.loss == tuple(columns["train_loss"])
    assert first.val.top1 == pytest.approx([value / 100.0 for value in columns["val_top1_acc"]], rel=1e-12)
    for other in others:
        assert other.epochs == first.epochs == tuple(range(1, epochs + 1))
        for name in ("train top-1", "train loss", "val top-1", "val top-5", "val loss", "learning rate"):
            assert other.series()[name] == pytest.approx(first.series()[name], rel=1e-12), name


def test_percent_is_never_guessed(tmp_path: Path) -> None:
    """0.03 in an accuracy column is 0.03 %, as the format says, however small the whole column is."""
    curves = read(write_file(tmp_path / "h.json", {"val_top1_acc": [0.03, 0.02]}))
    assert curves.val.top1 == pytest.approx([0.0003, 0.0002])


def test_odd_values_are_kept_or_named(tmp_path: Path) -> None:
    """NaN and infinities stay, null is absent, numbers in text are numbers, and everything else is named."""
    path = tmp_path / "h.json"
    path.write_text(
        '{"train_loss": [NaN, null, "1.5", "n/a", true, [1], Infinity, "nan", 1e999], "val_loss": [2.0], "lr": []}'
    )
    curves = read(path)
    loss = curves.train.loss
    assert math.isnan(loss[0] or 0.0)
    assert math.isnan(loss[7] or 0.0)
    assert loss[1:7] == (None, 1.5, None, None, None, math.inf)
    assert loss[8] == math.inf
    assert curves.val.loss == (2.0, *[None] * 8)
    assert curves.column_lengths == {"train_loss": 9, "val_loss": 1}
    assert [text.split(" = ")[0] for text in curves.unreadable] == ["train_loss[3]", "train_loss[4]", "train_loss[5]"]


def test_epochs_are_those_of_the_file(tmp_path: Path) -> None:
    """A file that numbers its epochs is believed, one that does not is counted from 1."""
    assert read(
        write_file(tmp_path / "a.json", [{"epoch": 7, "val_loss": 1.0}, {"epoch": 8, "val_loss": 1.0}])
    ).epochs == (7, 8)
    assert read(write_file(tmp_path / "b.json", [{"val_loss": 1.0}, {"val_loss": 1.0}])).epochs == (1, 2)


def test_the_number_of_classes_comes_from_the_run_before_the_option(tmp_path: Path) -> None:
    """classes.json tells it; --num-classes is for those that have none; without either it stays unknown."""
    columns = healthy_columns(epochs=2, num_classes=10)
    with_classes = write_run(tmp_path / "a", rows_of(columns), num_classes=10)
    without = write_run(tmp_path / "b", rows_of(columns))
    known, given = read_sources([with_classes, without], num_classes=99)
    assert (known.num_classes, known.num_classes_from) == (10, "classes.json")
    assert (given.num_classes, given.num_classes_from) == (99, "--num-classes")
    assert read(without).num_classes is None


def test_names_tell_sources_apart(tmp_path: Path) -> None:
    """The shortest ending of the path that differs; the usual file name says nothing and is left out."""
    paths = [
        write_file(tmp_path / part / "training_history.json", INCIDENT) for part in ("a/seed1", "b/seed1", "b/seed2")
    ]
    assert [curves.name for curves in read_sources(paths)] == ["a/seed1", "b/seed1", "b/seed2"]
    assert [curves.name for curves in read_sources([paths[0], paths[2]])] == ["seed1", "seed2"]
    run_dir = write_run(tmp_path / "run", rows_of(healthy_columns(epochs=2, num_classes=4)))
    names = [curves.name for curves in read_sources([run_dir, run_dir / "training_history.json"])]
    assert len(set(names)) == 2


@pytest.mark.parametrize(
    ("val_top1", "val_loss", "expected"),
    [
        ([10.0, 30.0, 30.0], [3.0, 2.0, 1.0], (1, "val top-1")),
        ([None, None, None], [3.0, 1.0, 2.0], (1, "val loss")),
        ([0.0, 0.0, 0.0], [3.0, 2.0, 2.5], (1, "val loss")),
        ([math.nan, 5.0, math.nan], [3.0, 2.0, 1.0], (1, "val top-1")),
        ([0.0, 0.0, 0.0], [9.5, 9.5, 9.5], None),
        ([], [], None),
    ],
)
def test_the_best_epoch_is_the_earliest_of_the_highest_val_top1(
    tmp_path: Path, val_top1: list[Any], val_loss: list[Any], expected: tuple[int, str] | None
) -> None:
    """Without a top-1 that moves, the lowest val loss; without either, none."""
    content = {"train_loss": [1.0, 1.0, 1.0], "val_top1_acc": val_top1, "val_loss": val_loss}
    best = best_epoch(read(write_file(tmp_path / "h.json", content)))
    assert (None if best is None else (best.index, best.metric)) == expected


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "not readable as a history"),
        ("not json", "not readable as a history"),
        ("\x80\xff", "not readable as a history"),
        ("[]", "an empty list"),
        ("[1, 2]", "a list of other things than epochs"),
        ("3", "a int"),
        ("{}", "holds no epoch"),
        ('{"train_loss": []}', "holds no epoch"),
        ('{"train_loss": 1.0}', "holds no epoch"),
        ('{"accuracy": [1.0]}', "holds no epoch"),
        ('[{"epoch": 1}]', "holds no epoch"),
        ('{"train_loss": [null, "x"]}', "holds no number"),
    ],
)
def test_what_is_no_history_is_refused(tmp_path: Path, content: str, told: str) -> None:
    """One line that names the file, what was found and what to give instead."""
    path = tmp_path / "training_history.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        read(path)
    assert told in str(error.value)
    assert str(path) in str(error.value)
    assert "give a run folder" in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_without_a_history_are_refused(tmp_path: Path) -> None:
    """A missing path, a folder without a history, a history without an epoch, and one given twice."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "history.jsonl").write_bytes(b"")
    good = write_file(tmp_path / "run" / "training_history.json", INCIDENT)
    for sources, told in (
        ([tmp_path / "nowhere"], "no such file or folder"),
        ([tmp_path / "empty"], "no history.jsonl and no training_history.json"),
        ([tmp_path / "new"], "no finished epoch"),
        ([good, good.parent], "given 2 times"),
    ):
        with pytest.raises(UserError, match=told):
            read_sources(sources)
