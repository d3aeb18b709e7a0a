"""Each verdict fires on its fault, wherever the fault lies, and none fires on a training that goes well."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from analysis_histories import INCIDENT, Columns, healthy_columns, rows_of, write_file, write_run

from aplantida_dist.analysis.sources import read_sources
from aplantida_dist.analysis.verdict import Verdict
from aplantida_dist.analysis.verdicts import compare, judge


def judged(tmp_path: Path, content: Any, *, num_classes: int | None = None) -> dict[str, Verdict]:
    """The verdicts on a foreign file, by name."""
    (curves,) = read_sources([write_file(tmp_path / "training_history.json", content)], num_classes=num_classes)
    return {verdict.name: verdict for verdict in judge(curves)}


def judged_run(
    tmp_path: Path, columns: Columns, *, changes: dict[int, dict[str, Any]] | None = None, num_classes: int = 10
) -> dict[str, Verdict]:
    """The verdicts on a run folder of ours, by name."""
    (curves,) = read_sources([write_run(tmp_path / "run", rows_of(columns, changes=changes), num_classes=num_classes)])
    return {verdict.name: verdict for verdict in judge(curves)}


def grave(verdicts: dict[str, Verdict]) -> set[str]:
    return {name for name, verdict in verdicts.items() if verdict.severity in ("error", "warning")}


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 8, 15, 60, 300])
@pytest.mark.parametrize("num_classes", [2, 10, 100, 7120])
def test_healthy_histories_are_healthy(tmp_path: Path, epochs: int, num_classes: int) -> None:
    """Noise of up to 4 % between epochs and rounding to four decimals call no verdict, whether the classes are known or not."""
    for seed in range(6):
        for noise in (0.0, 0.02, 0.04):
            columns = healthy_columns(epochs=epochs, num_classes=num_classes, seed=seed, noise=noise)
            for known in (None, num_classes):
                verdicts = judged(tmp_path, columns, num_classes=known)
                assert grave(verdicts) == set()
                assert "healthy" in verdicts


def test_our_own_healthy_history_proves_its_coverage(tmp_path: Path) -> None:
    """A run folder of ours is healthy, and says how many samples stand behind it."""
    verdicts = judged_run(tmp_path, healthy_columns(epochs=5, num_classes=10))
    assert list(verdicts) == ["every sample accounted for", "healthy"]
    assert "136,312 samples × 5 epochs" in verdicts["every sample accounted for"].evidence


@pytest.mark.parametrize(
    "change",
    [
        {"train_loss": [1e-9] * 6, "train_top1_acc": [100.0] * 6, "train_top5_acc": [100.0] * 6},
        {
            "train_loss": [0.9, 0.2, 0.01, 0.0, 0.0, 0.0],
            "train_top1_acc": [70.0, 90.0, 100.0, 100.0, 100.0, 100.0],
            "train_top5_acc": [100.0] * 6,
        },
        {"val_loss": [], "val_top1_acc": [], "val_top5_acc": []},
        {"val_loss": [None] * 5 + [1.0], "val_top1_acc": [None] * 5 + [50.0], "val_top5_acc": [None] * 5 + [90.0]},
        {"train_top1_acc": [], "train_top5_acc": [], "val_top1_acc": [], "val_top5_acc": []},
        {"learning_rate": []},
        {"train_loss": [2.3, 1.9, 1.5, 1.2, 1.1, 0.8]},
        {"val_loss": [0.013, 0.011, 0.012, 0.016, 0.012, 0.014]},
    ],
)
def test_unusual_but_sound_histories_call_no_verdict(tmp_path: Path, change: Columns) -> None:
    """A memorised set, validation seldom or never, losses alone, no learning rate, losses near zero."""
    columns = healthy_columns(epochs=6, num_classes=10) | change
    assert grave(judged(tmp_path, columns, num_classes=10)) == set()


def test_the_incident_is_no_batches_and_never_overflow(tmp_path: Path) -> None:
    """The first trainer's incident: zeros over nothing, an untrained head, and not one word of overflow."""
    verdicts = judged(tmp_path, INCIDENT, num_classes=7120)
    assert list(verdicts) == ["no batches reached the trainer", "validation loss constant", "loss above ln(classes)"]
    assert "all 15 epochs" in verdicts["no batches reached the trainer"].evidence
    assert "drop_last" in verdicts["no batches reached the trainer"].remedy
    assert "9.5393 in all 15 epochs" in verdicts["validation loss constant"].evidence
    assert "above ln(7120) = 8.87" in verdicts["validation loss constant"].evidence
    assert "9.5393, above ln(7120) = 8.8707" in verdicts["loss above ln(classes)"].evidence
    for verdict in verdicts.values():
        assert "overflow" not in f"{verdict.evidence}{verdict.meaning}{verdict.remedy}".lower()
    unknown = judged(tmp_path, INCIDENT)
    assert list(unknown) == ["no batches reached the trainer", "validation loss constant"]
    assert "among 13,895 classes" in unknown["validation loss constant"].evidence


@pytest.mark.parametrize("form", ["list", "wrapped", "losses only"])
def test_the_incident_is_recognised_in_every_form(tmp_path: Path, form: str) -> None:
    """As a list of epochs, wrapped, and without the accuracies."""
    epochs = [{"epoch": i + 1} | {name: values[i] for name, values in INCIDENT.items()} for i in range(15)]
    content: Any = {
        "list": epochs,
        "wrapped": {"history": epochs},
        "losses only": {name: INCIDENT[name] for name in ("train_loss", "val_loss")},
    }[form]
    assert grave(judged(tmp_path, content)) == {"no batches reached the trainer", "validation loss constant"}


@pytest.mark.parametrize("first", range(6))
def test_batchless_epochs_are_found_wherever_they_lie(tmp_path: Path, first: int) -> None:
    """From any epoch on, in train or in val, and the other verdicts do not take the zeros for losses."""
    for split, name in (("train", "no batches reached the trainer"), ("val", "no batches reached the validation")):
        columns = healthy_columns(epochs=6, num_classes=10)
        for metric in ("loss", "top1_acc", "top5_acc"):
            columns[f"{split}_{metric}"][first:] = [0.0] * (6 - first)
        assert grave(judged(tmp_path, columns, num_classes=10)) == {name}


@pytest.mark.parametrize("frozen_from", [0, 1, 5, 9])
def test_a_frozen_validation_loss_is_found(tmp_path: Path, frozen_from: int) -> None:
    """Equal for the whole history, or for five epochs and more at a rate that should move it."""
    columns = healthy_columns(epochs=15, num_classes=10, noise=0.0)
    columns["val_loss"][frozen_from:] = [columns["val_loss"][frozen_from]] * (15 - frozen_from)
    assert "validation loss constant" in judged(tmp_path, columns)


def test_equal_losses_at_the_end_of_a_cosine_are_rounding(tmp_path: Path) -> None:
    """A rate below a hundredth of its peak moves nothing that four decimals show."""
    columns = healthy_columns(epochs=300, num_classes=10, noise=0.0)
    columns["val_loss"][-10:] = [columns["val_loss"][-10]] * 10
    assert grave(judged(tmp_path, columns)) == set()


@pytest.mark.parametrize(("num_classes", "val_top1"), [(7120, 0.03), (100, 1.1), (10, 9.0), (4, 25.5), (None, 0.03)])
def test_validation_at_chance_while_train_learns(tmp_path: Path, num_classes: int | None, val_top1: float) -> None:
    """Train 98.6 %, validation at chance: the class maps differ, and it is not called over-fitting."""
    columns = healthy_columns(epochs=8, num_classes=10) | {
        "train_top1_acc": [20.0, 50.0, 70.0, 85.0, 92.0, 96.0, 98.0, 98.6],
        "train_top5_acc": [99.0] * 8,
        "val_top1_acc": [val_top1] * 4 + [val_top1 * 0.9] * 4,
        "val_top5_acc": [5 * val_top1 if num_classes != 4 else 100.0] * 8,
        "val_loss": [3.0 + i for i in range(8)],
    }
    verdicts = judged(tmp_path, columns, num_classes=num_classes)
    verdict = verdicts["validation at chance while train learns"]
    assert "98.60 %" in verdict.evidence
    assert "class map" in verdict.remedy
    assert "over-fitting" not in verdicts
    assert ("--num-classes" in verdict.evidence) or num_classes is None


def test_a_small_debug_run_is_not_called_a_mismatch(tmp_path: Path) -> None:
    """Fewer train samples than classes: most of what validation asks was never shown."""
    columns = healthy_columns(epochs=4, num_classes=1000) | {"val_top1_acc": [0.1] * 4, "val_top5_acc": [0.5] * 4}
    small = {i: {"train.num_samples": 500, "train.expected_samples": 500} for i in range(1, 5)}
    name = "validation at chance while train learns"
    assert name not in judged_run(tmp_path / "small", columns, changes=small, num_classes=1000)
    assert name in judged_run(tmp_path / "full", columns, num_classes=1000)


def test_a_run_of_a_few_steps_is_not_called_a_mismatch(tmp_path: Path) -> None:
    """A BatchNorm evaluates at chance for its first updates; the same curves over more of them are a mismatch."""
    columns = healthy_columns(epochs=2, num_classes=5) | {"val_top1_acc": [20.0] * 2, "val_top5_acc": [100.0] * 2}
    columns |= {"train_top1_acc": [40.0, 60.0], "train_top5_acc": [100.0] * 2}
    name = "validation at chance while train learns"
    few, many = ({i: {"step": i * a_epoch} for i in (1, 2)} for a_epoch in (3, 100))
    assert name not in judged_run(tmp_path / "few", columns, changes=few, num_classes=5)
    assert name in judged_run(tmp_path / "many", columns, changes=many, num_classes=5)


@pytest.mark.parametrize("epoch", [0, 3, 7])
@pytest.mark.parametrize("split", ["train", "val"])
def test_top1_above_top5_is_found_in_one_epoch(tmp_path: Path, epoch: int, split: str) -> None:
    """One epoch of one split is enough; equal values are sound."""
    columns = healthy_columns(epochs=8, num_classes=10)
    columns[f"{split}_top5_acc"][epoch] = columns[f"{split}_top1_acc"][epoch]
    assert grave(judged(tmp_path, columns)) == set()
    columns[f"{split}_top5_acc"][epoch] -= 0.01
    assert grave(judged(tmp_path, columns)) == {"top-1 above top-5"}


@pytest.mark.parametrize("bad", [-1.0, 100.5, 5000.0])
def test_an_accuracy_out_of_range_is_impossible(tmp_path: Path, bad: float) -> None:
    """Below 0 or above 100 %."""
    columns = healthy_columns(epochs=5, num_classes=10)
    columns["train_top5_acc"][2] = bad
    assert "impossible accuracy" in judged(tmp_path, columns)


@pytest.mark.parametrize("column", ["train_loss", "val_loss", "val_top1_acc", "learning_rate"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "nan", "NaN"])
def test_one_value_that_is_not_a_number_is_found(tmp_path: Path, column: str, bad: Any) -> None:
    """In any column, written literally or as text; the epoch is named."""
    columns = healthy_columns(epochs=6, num_classes=10)
    columns[column][3] = bad
    verdicts = judged(tmp_path, columns)
    assert grave(verdicts) == {"not a number"}
    assert "from epoch 4 on" in verdicts["not a number"].evidence


def test_a_history_of_nothing_but_nan_is_judged(tmp_path: Path) -> None:
    """Every loss a NaN and accuracies of 0: the overflow that the incident was not."""
    content = {"train_loss": [math.nan] * 5, "train_top1_acc": [0.0] * 5, "val_loss": [math.nan] * 5}
    assert grave(judged(tmp_path, content, num_classes=7120)) == {"not a number"}


def test_lists_of_unequal_length_are_told(tmp_path: Path) -> None:
    """With the length of each; an empty list is an absent metric."""
    columns = healthy_columns(epochs=6, num_classes=10)
    columns["val_loss"] = columns["val_loss"][:4]
    columns["val_top1_acc"] = []
    verdicts = judged(tmp_path, columns)
    assert grave(verdicts) == {"lists of unequal length"}
    assert "val_loss 4" in verdicts["lists of unequal length"].evidence
    assert "train_loss 6" in verdicts["lists of unequal length"].evidence


@pytest.mark.parametrize("num_classes", [10, 7120, 9323])
def test_a_loss_that_never_beats_guessing(tmp_path: Path, num_classes: int) -> None:
    """6 % above ln(classes) throughout; one epoch below it is enough to be silent, and so are unknown classes."""
    columns = healthy_columns(epochs=5, num_classes=num_classes)
    columns["val_loss"] = [math.log(num_classes) * (1.06 + 0.01 * i) for i in range(5)]
    verdicts = judged(tmp_path, columns, num_classes=num_classes)
    assert "val loss is never below" in verdicts["loss above ln(classes)"].evidence
    assert "loss above ln(classes)" not in judged(tmp_path, columns)
    columns["val_loss"][2] = math.log(num_classes)
    assert "loss above ln(classes)" not in judged(tmp_path, columns, num_classes=num_classes)


@pytest.mark.parametrize("epochs", [8, 20, 100])
@pytest.mark.parametrize("rise", [0.3, 1.0, 3.0])
def test_over_fitting_is_found(tmp_path: Path, epochs: int, rise: float) -> None:
    """Val loss falls for a third of the run and then rises, while train loss falls on; top-1 decides what it means."""
    for falling in (True, False):
        columns = healthy_columns(epochs=epochs, num_classes=10)
        turn = epochs // 3
        low = columns["val_loss"][turn]
        columns["val_loss"][turn:] = [low * (1.0 + rise * i / (epochs - turn)) for i in range(epochs - turn)]
        if falling:
            columns["val_top1_acc"][turn:] = [
                columns["val_top1_acc"][turn] * (1.0 - 0.2 * i / epochs) for i in range(epochs - turn)
            ]
        verdicts = judged(tmp_path, columns)
        assert grave(verdicts) == {"over-fitting"}
        assert ("ranks as well" in verdicts["over-fitting"].meaning) is not falling


@pytest.mark.parametrize("low", range(5))
def test_divergence_is_found(tmp_path: Path, low: int) -> None:
    """A train loss that rises from any epoch on and stays up."""
    columns = healthy_columns(epochs=6, num_classes=10)
    columns["train_loss"][low + 1 :] = [columns["train_loss"][low] * (1.4 + 0.3 * i) for i in range(5 - low)]
    verdicts = judged(tmp_path, columns)
    assert "divergence" in verdicts
    assert f"(epoch {low + 1})" in verdicts["divergence"].evidence
    assert "over-fitting" not in verdicts


@pytest.mark.parametrize(("epochs", "fires"), [(1, False), (2, False), (3, True), (50, True)])
def test_a_learning_rate_that_stands_still(tmp_path: Path, epochs: int, fires: bool) -> None:
    """One or two epochs may well have one rate; a rate of 0 is an error from two epochs on."""
    columns = healthy_columns(epochs=epochs, num_classes=10)
    assert ("learning rate not moving" in judged(tmp_path, columns | {"learning_rate": [1e-3] * epochs})) is fires
    assert ("learning rate is 0" in judged(tmp_path, columns | {"learning_rate": [0.0] * epochs})) is (epochs > 1)


def test_a_train_loss_that_does_not_fall(tmp_path: Path) -> None:
    """Flat at the loss of guessing; a model that knows the answers already may stay flat."""
    columns = healthy_columns(epochs=6, num_classes=10)
    columns |= {
        "train_loss": [2.303, 2.301, 2.304, 2.302, 2.300, 2.302],
        "train_top1_acc": [10.0] * 6,
        "train_top5_acc": [50.0] * 6,
    }
    assert "train loss does not fall" in judged(tmp_path, columns, num_classes=10)
    known = columns | {
        "train_loss": [0.30, 0.31, 0.30, 0.30, 0.31, 0.30],
        "train_top1_acc": [95.0] * 6,
        "train_top5_acc": [99.0] * 6,
    }
    assert grave(judged(tmp_path, known, num_classes=10)) == set()


@pytest.mark.parametrize(
    ("epochs", "fires"),
    [([1, 2, 3], False), ([0, 1, 2], False), ([1, 2, 2], True), ([1, 3, 4], True), ([6, 7, 8], True)],
)
def test_epochs_that_are_missing_or_repeated(tmp_path: Path, epochs: list[int], fires: bool) -> None:
    """A history restarted on resume shows in its numbering."""
    content = [{"epoch": epoch, "val_loss": 2.0 - 0.1 * i} for i, epoch in enumerate(epochs)]
    assert ("epochs missing or repeated" in judged(tmp_path, content)) is fires


def test_values_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    """With their place in the file."""
    columns = healthy_columns(epochs=4, num_classes=10)
    columns["train_loss"][1] = "oops"
    verdicts = judged(tmp_path, columns)
    assert "train_loss[1] = 'oops'" in verdicts["values that are no numbers"].evidence


@pytest.mark.parametrize(("void", "severity"), [(10, "note"), (5000, "warning")])
def test_void_samples_are_told(tmp_path: Path, void: int, severity: str) -> None:
    """A few are a note, more than a hundredth a warning."""
    changes = {3: {"train.void_samples": void, "train.num_samples": 136312 - void}}
    verdict = judged_run(tmp_path, healthy_columns(epochs=4, num_classes=10), changes=changes)["void samples"]
    assert verdict.severity == severity
    assert f"{void:,} of 136,312 train samples" in verdict.evidence


@pytest.mark.parametrize(("wait", "severity"), [(0.1, None), (0.3, "note"), (0.8, "warning")])
def test_a_run_that_waits_for_data_is_told(tmp_path: Path, wait: float, severity: str | None) -> None:
    """By the median without the first epoch, in which caches fill."""
    changes = {i: {"train.wait_fraction": wait} for i in range(2, 6)}
    verdict = judged_run(tmp_path, healthy_columns(epochs=5, num_classes=10), changes=changes).get("waiting for data")
    assert (verdict and verdict.severity) == severity


@pytest.mark.parametrize(
    ("bound_by", "remedy"), [("decoding", "--max-side"), ("disk", "faster disk"), (None, "local disk")]
)
def test_what_a_run_waits_for_is_told(tmp_path: Path, bound_by: str | None, remedy: str) -> None:
    """As its rows say; early ones do not."""
    speed = {"train.wait_fraction": 0.6} | (
        {"train.bound_by": bound_by, "train.read_fraction": 0.7} if bound_by else {}
    )
    columns = healthy_columns(epochs=5, num_classes=10)
    verdict = judged_run(tmp_path, columns, changes=dict.fromkeys(range(2, 6), speed))["waiting for data"]
    assert remedy in verdict.remedy
    assert ("70.00 % of the loaders' own time was reading" in verdict.evidence) == (bound_by is not None)


def test_other_samples_under_one_manifest_are_an_error(tmp_path: Path) -> None:
    """The identity digest moves and the manifest does not; with a new manifest it is the ground that changed."""
    other = {"val.identity_digest": "9" * 16}
    columns = healthy_columns(epochs=4, num_classes=10)
    assert grave(judged_run(tmp_path / "a", columns, changes={3: other})) == {"epochs read different samples"}
    moved = other | {"digests.val_manifest": "8" * 64}
    assert grave(judged_run(tmp_path / "b", columns, changes={4: moved})) == {"changed in mid-run"}


def test_a_run_without_validation_is_told(tmp_path: Path) -> None:
    """As a note: nothing is wrong with what there is."""
    columns = healthy_columns(epochs=4, num_classes=10) | {"val_loss": [None] * 4}
    verdicts = judged_run(tmp_path, columns)
    assert verdicts["no validation"].severity == "note"
    assert grave(verdicts) == set()


def test_runs_on_different_validation_data_are_not_comparable(tmp_path: Path) -> None:
    """Accuracies over other samples answer another question; foreign files cannot tell."""
    columns = healthy_columns(epochs=3, num_classes=10)
    change = {i: {"digests.val_manifest": "1" * 64} for i in range(1, 4)}
    a, b = (write_run(tmp_path / name, rows_of(columns)) for name in "ab")
    c = write_run(tmp_path / "c", rows_of(columns, changes=change))
    foreign = write_file(tmp_path / "h.json", columns)
    assert compare(read_sources([a, b, foreign])) == ()
    assert [verdict.severity for verdict in compare(read_sources([a, c]))] == ["warning"]


@pytest.mark.parametrize("fault", [lambda c: c, lambda c: c | {"train_loss": [math.nan] * 6}, lambda c: INCIDENT])
def test_verdicts_are_whole_sentences_and_gravest_first(tmp_path: Path, fault: Callable[[Columns], Columns]) -> None:
    """Every verdict has evidence and meaning that end as sentences do, and errors come before the rest."""
    order = ["error", "warning", "note", "good"]
    verdicts = list(judged(tmp_path, fault(healthy_columns(epochs=6, num_classes=10)), num_classes=10).values())
    ranks = [order.index(verdict.severity) for verdict in verdicts]
    assert verdicts
    assert ranks == sorted(ranks)
    for verdict in verdicts:
        assert verdict.evidence.endswith(".")
        assert verdict.meaning.endswith(".")
