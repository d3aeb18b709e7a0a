"""Faults of the record itself: numbers that no training can have, each found by one function from curves to a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from aplantida_dist.analysis.curves import Curves, Series, Split, batchless_epochs, finite
from aplantida_dist.analysis.verdict import Verdict
from aplantida_dist.analysis.wording import count_text, list_text, percent_text

ROUNDING = 1e-9
"""Two accuracies of one epoch are counts over the same samples: beyond the rounding of a division they cannot be out of order."""


def no_train_batches(curves: Curves) -> Verdict | None:
    """Train metrics that are all zero."""
    return _no_batches(curves, "train")


def no_val_batches(curves: Curves) -> Verdict | None:
    """Validation metrics that are all zero."""
    return _no_batches(curves, "val")


def _no_batches(curves: Curves, split: Split) -> Verdict | None:
    found = curves.split(split)
    empty = batchless_epochs(found)
    if not empty:
        return None
    phase = "training" if split == "train" else "validation"
    accuracies = finite(found.top1) or finite(found.top5)
    beside = " beside an accuracy of 0 %" if any(i in accuracies for i in empty) else ""
    return Verdict(
        "error",
        f"no batches reached the {'trainer' if split == 'train' else 'validation'}",
        f"{split} loss is exactly 0.0{beside} in {_share(empty, finite(found.loss), curves)}.",
        "A mean loss of 0 says that every sample was right and certain, which an accuracy of 0 contradicts: these are sums over "
        f"nothing, reported as zeros. The {phase} loop saw no batch; a number that grew too large would stand here as NaN or inf.",
        f"Count the {split} samples against the batch size: a set smaller than one batch with `drop_last` gives no batch. Use a "
        "smaller batch or keep the last one, and see that the data path is not empty.",
    )


def not_a_number(curves: Curves) -> Verdict | None:
    """NaN or an infinity anywhere."""
    odd = {name: _not_finite(series) for name, series in curves.series().items()}
    held = {name: indices for name, indices in odd.items() if indices}
    if not held:
        return None
    first = min(indices[0] for indices in held.values())
    counts = [f"{name} ({len(indices)} of {len(curves.epochs)})" for name, indices in held.items()]
    return Verdict(
        "error",
        "not a number",
        f"NaN or an infinity from epoch {curves.epochs[first]} on, in {list_text(counts)}.",
        "The loss or the weights left the range of floating point; whatever was trained after that is lost.",
        "Go back to a checkpoint before that epoch; lower the learning rate, clip the gradient, train in bf16 or fp32 rather "
        "than fp16, and look for broken samples.",
    )


def impossible_accuracy(curves: Curves) -> Verdict | None:
    """An accuracy below 0 or above 100 %."""
    for name, series in curves.series().items():
        bad = [i for i, value in finite(series).items() if not -ROUNDING <= value <= 1.0 + ROUNDING]
        if "top-" in name and bad:
            return Verdict(
                "error",
                "impossible accuracy",
                f"{name} is {percent_text(series[bad[0]])} in epoch {curves.epochs[bad[0]]}, and outside 0 to 100 % in "
                f"{count_text(len(bad), 'epoch')}.",
                "A share of samples cannot leave that range: counts and sample numbers do not belong together.",
                "Divide the hits by the number of samples they were counted over; see that no rank is counted twice.",
            )
    return None


def top1_above_top5(curves: Curves) -> Verdict | None:
    """Top-1 above top-5 in one epoch of one split."""
    for split in ("train", "val"):
        found = curves.split(split)
        top1, top5 = finite(found.top1), finite(found.top5)
        bad = [i for i in top1 if i in top5 and top1[i] > top5[i] + ROUNDING]
        if bad:
            return Verdict(
                "error",
                "top-1 above top-5",
                f"{split} top-1 {percent_text(top1[bad[0]])} is above top-5 {percent_text(top5[bad[0]])} in epoch "
                f"{curves.epochs[bad[0]]}, and in {len(bad)} of {count_text(len(top1), 'epoch')}.",
                "The best guess is one of the best five, so top-5 is never the smaller one: the two were not counted over the same "
                "samples, or their columns are swapped.",
                "Count both from the same logits and divide by the same number of samples.",
            )
    return None


def unequal_lengths(curves: Curves) -> Verdict | None:
    """Columns that do not have one value an epoch."""
    lengths = curves.column_lengths
    if len(set(lengths.values())) <= 1:
        return None
    told = [f"{name} {length}" for name, length in sorted(lengths.items(), key=lambda item: -item[1])]
    return Verdict(
        "warning",
        "lists of unequal length",
        f"The columns hold different numbers of epochs: {list_text(told, most=9)}.",
        "Which epoch a value belongs to is not known; here every list is taken to start at the first epoch.",
        "A list that was appended on some epochs only, or restarted on resume, must be aligned by hand; write one row an epoch.",
    )


def unreadable_values(curves: Curves) -> Verdict | None:
    """Values that are no numbers."""
    if not curves.unreadable:
        return None
    return Verdict(
        "warning",
        "values that are no numbers",
        f"{count_text(len(curves.unreadable), 'value')} could not be read: {list_text(curves.unreadable, most=3)}.",
        "They are left out of the table, the plots and every other verdict.",
        "Mend what writes the file.",
    )


def broken_epochs(curves: Curves) -> Verdict | None:
    """Epochs that are missing, repeated or out of order. A run may count from 0 or from 1."""
    epochs = curves.epochs
    expected = range(epochs[0], epochs[0] + len(epochs))
    if epochs[0] in (0, 1) and tuple(expected) == epochs:
        return None
    if epochs[0] not in (0, 1):
        found = f"The first epoch is {epochs[0]}"
    else:
        i = next(i for i, (a, b) in enumerate(zip(epochs, expected, strict=True)) if a != b)
        found = f"Epoch {epochs[i]} follows epoch {epochs[i - 1]}"
    return Verdict(
        "warning",
        "epochs missing or repeated",
        f"{found}; {count_text(len(epochs), 'row')} in all.",
        "The record is not one unbroken run: it was restarted on resume, cut, or joined from several runs.",
        "Find the missing rows in an older copy of the history; do not compare its epochs with those of another run.",
    )


def _not_finite(series: Series) -> list[int]:
    return [i for i, value in enumerate(series) if value is not None and not math.isfinite(value)]


def _share(indices: Sequence[int], of: Mapping[int, float], curves: Curves) -> str:
    if len(indices) == len(of):
        return "the one epoch" if len(of) == 1 else f"all {len(of)} epochs"
    return f"{len(indices)} of {len(of)} epochs ({list_text([curves.epochs[i] for i in indices])})"
