"""What the curves say about the learning itself: each function takes curves and gives a verdict or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from aplantida_dist.analysis.curves import Curves, batchless_epochs, finite, measured_losses, measured_top1
from aplantida_dist.analysis.verdict import Verdict
from aplantida_dist.analysis.wording import count_text, loss_text, percent_text, rate_text

MIN_EPOCHS = 3
"""Fewer epochs show no trend: two equal values can be chance, and a warm-up of two epochs hardly moves anything."""

SAME = 1e-6
"""Relative; the files of other trainers round to four decimals and float32 has seven digits: below this a loss did not move."""

FROZEN_STRETCH = 5
"""Equal validation losses in a row within a history that otherwise moves; two or three may be rounding at the end of a cosine."""

IDLE_RATE = 0.01
"""Share of the peak learning rate below which nothing is expected to move any more."""

LEARNED = 0.2
"""Share of the way from chance to perfect that counts as having learned: far beyond what luck or a class prior gives."""

SETTLED_STEPS = 50
"""After so many updates the running statistics of a BatchNorm (momentum 0.1) hold less than 1 % of where they began."""

UNSEEN = 0.05
"""Validation that comes less than this share of train's way is at chance. A small data set that over-fits keeps a quarter and more."""

ABOVE_CHANCE_LOSS = 1.05
"""Times ln(classes). A fresh head with wide logits starts up to 3 % above it, and its first epoch may end there."""

DIVERGED = 1.25
"""Times the lowest train loss. Epoch means over all samples move by a few percent, and rise by a tenth at a warm restart."""

OVERFIT = 1.10
"""Times the median around the lowest val loss; noise between epochs stays below half of that rise."""

LOSS_FLOOR = 0.05
"""And at least this much, because near a loss of zero a tenth or a quarter is nothing."""

UNLEARNED = 0.99
"""Times the first train loss; one epoch of a slow fine-tuning over 7,120 classes takes off more than this percent."""


def constant_val_loss(curves: Curves) -> Verdict | None:
    """A validation loss that does not move while the weights should."""
    losses = measured_losses(curves.val)
    stretch = _longest_stretch(losses)
    length, whole = len(stretch), len(stretch) == len(losses)
    if length < MIN_EPOCHS or not (whole or (length >= FROZEN_STRETCH and _rate_was_up(curves, stretch))):
        return None
    first, last = stretch[0], stretch[-1]
    where = (
        f"all {length} epochs"
        if whole
        else f"{length} epochs in a row ({curves.epochs[first]} to {curves.epochs[last]})"
    )
    level = losses[first]
    if batchless_epochs(curves.train):
        why = "The weights never changed: it follows from the train batches that never came."
    else:
        why = (
            "The weights did not change between these evaluations, or one evaluation was written down again and again."
        )
    return Verdict(
        "error",
        "validation loss constant",
        f"val loss is {loss_text(level)} in {where}. {_level_of(level, curves)}",
        f"{why} Only an evaluation of the same weights gives the same loss to the last digit.",
        "See that optimizer steps are taken (batches arrive, the scaler does not skip them, parameters are not frozen, the "
        "learning rate is not 0) and that the evaluated model is the trained one.",
    )


def val_at_chance(curves: Curves) -> Verdict | None:
    """Validation at chance while train learns: the class map of the two splits differs.

    Needs both top-1 curves and two evaluated epochs. Silent for our own runs where they are too small to tell: fewer train
    samples than classes cannot know most of what is asked, and a BatchNorm needs its updates before it evaluates well.
    """
    train, val = measured_top1(curves.train), measured_top1(curves.val)
    if not train or len(val) < 2 or _too_small_to_tell(curves):
        return None
    chance = 1.0 / curves.num_classes if curves.num_classes else 0.0
    reached, seen = (
        (max(values.values()) - chance) / (1.0 - chance) if chance < 1.0 else 0.0 for values in (train, val)
    )
    if reached < LEARNED or seen > UNSEEN * reached:
        return None
    known = (
        f"chance is {percent_text(chance)} with {curves.num_classes:,} classes (from {curves.num_classes_from})"
        if curves.num_classes
        else "the number of classes is unknown, so chance was taken as 0 %; give it with --num-classes"
    )
    return Verdict(
        "error",
        "validation at chance while train learns",
        f"train top-1 reaches {percent_text(max(train.values()))}, val top-1 never more than {percent_text(max(val.values()))}; {known}.",
        "A model that knows the train photographs so well knows others better than by luck: a label means one class in train and "
        "another in validation. One missing class shifts every index behind it.",
        "Compare the class maps of the two splits: one classes.json for both. Then look at a few validation pictures with their "
        "labels, and see that both splits are normalised alike.",
    )


def loss_above_chance(curves: Curves) -> Verdict | None:
    """A loss that never came below the one of guessing, ln(classes).

    The train loss of a first epoch is a mean that includes the untrained head, so train is asked from two epochs on.
    """
    if not curves.num_classes or curves.num_classes < 2:
        return None
    guess = math.log(curves.num_classes)
    train, val = measured_losses(curves.train), measured_losses(curves.val)
    lowest = {
        "train": min(train.values(), default=0.0) if len(train) > 1 else 0.0,
        "val": min(val.values(), default=0.0),
    }
    above = {split: loss for split, loss in lowest.items() if loss > ABOVE_CHANCE_LOSS * guess}
    if not above:
        return None
    told = " and ".join(f"{split} loss is never below {loss_text(loss)}" for split, loss in above.items())
    return Verdict(
        "warning",
        "loss above ln(classes)",
        f"{told}, above ln({curves.num_classes}) = {guess:.4f} (classes from {curves.num_classes_from}).",
        "Giving every class the same probability costs ln(classes): a model above it is worse than knowing nothing. It is an "
        "untrained head with wide logits, wrong labels, or a count of classes that is not the head's.",
        "See that the head has as many classes as the class map, that labels and class map belong together, and that training took place.",
    )


def diverged(curves: Curves) -> Verdict | None:
    """A train loss that ends far above its lowest point."""
    losses = measured_losses(curves.train)
    if len(losses) < 2:
        return None
    low = min(losses, key=lambda i: losses[i])
    last = max(losses)
    if losses[last] <= max(DIVERGED * losses[low], losses[low] + LOSS_FLOOR):
        return None
    return Verdict(
        "error",
        "divergence",
        f"train loss rose from {loss_text(losses[low])} (epoch {curves.epochs[low]}) to {loss_text(losses[last])} (epoch "
        f"{curves.epochs[last]}).",
        "The steps are too large for where the weights are; what was learned is being lost.",
        f"Resume from the checkpoint of epoch {curves.epochs[low]} with a lower learning rate or a longer warm-up, and clip the gradient.",
    )


def over_fitted(curves: Curves) -> Verdict | None:
    """A val loss that rises from its lowest point while the train loss falls on."""
    val, train = measured_losses(curves.val), measured_losses(curves.train)
    if len(val) <= MIN_EPOCHS or not train or val_at_chance(curves) is not None:
        return None
    indices = sorted(val)
    values = [val[i] for i in indices]
    low = values.index(min(values))
    level, end = median(values[max(0, low - 1) : low + 2]), median(values[-3:])
    rose = low < len(values) - 2 and end > max(OVERFIT * level, level + LOSS_FLOOR)
    before, after = train.get(indices[low]), train.get(indices[-1])
    if not rose or before is None or after is None or after > before:
        return None
    falling = _top1_fell(curves, indices[low])
    return Verdict(
        "warning",
        "over-fitting",
        f"val loss rose from {loss_text(level)} around epoch {curves.epochs[indices[low]]} to {loss_text(end)} at the end, "
        f"while train loss went from {loss_text(before)} to {loss_text(after)}.{_top1_since(curves, indices[low])}",
        "The model goes on learning the train photographs and no longer the species."
        if falling
        else "The model still ranks as well or better, but grows ever surer where it is wrong: its probabilities do not mean much.",
        f"Use the checkpoint of epoch {curves.epochs[indices[low]]}; train fewer epochs, augment more, raise the weight decay."
        if falling
        else "Raise the label smoothing or augment more, should the probabilities matter, as they do for a distilled student.",
    )


def rate_not_moving(curves: Curves) -> Verdict | None:
    """A learning rate that stands still for three epochs and more, or is 0 throughout."""
    rates = list(finite(curves.learning_rate).values())
    if len(rates) >= 2 and not any(rates):
        return Verdict(
            "error",
            "learning rate is 0",
            f"The learning rate is 0 in all {len(rates)} epochs.",
            "No step changes the weights.",
            "Set the base learning rate; see that the schedule was given the right number of steps.",
        )
    if len(rates) < MIN_EPOCHS or max(rates) - min(rates) > SAME * max(rates):
        return None
    return Verdict(
        "warning",
        "learning rate not moving",
        f"The learning rate is {rate_text(rates[0])} in all {len(rates)} epochs.",
        "Warm-up and decay did not take place: the schedule is never stepped, or a constant rate was asked for.",
        "If a constant rate was asked for, all is well. Otherwise see that the schedule advances with every optimizer step.",
    )


def nothing_learned(curves: Curves) -> Verdict | None:
    """A train loss that does not fall over three epochs and more, in a model that does not know the answers already."""
    losses, top1 = measured_losses(curves.train), finite(curves.train.top1)
    if len(losses) < MIN_EPOCHS or max(top1.values(), default=0.0) > 0.5 or diverged(curves) is not None:
        return None
    first, low = losses[min(losses)], min(losses.values())
    if low < UNLEARNED * first:
        return None
    return Verdict(
        "warning",
        "train loss does not fall",
        f"train loss starts at {loss_text(first)} and is never below {loss_text(low)} in {count_text(len(losses), 'epoch')}. "
        f"{_level_of(low, curves)}",
        "The model does not learn: the steps are too small or not taken, or the labels do not follow from the pictures.",
        "Train on 100 samples until they are known by heart; if that fails, look at the learning rate, at frozen parameters and at the labels.",
    )


def _longest_stretch(losses: Mapping[int, float]) -> list[int]:
    """The indices of the longest run of equal losses; the earliest of equals."""
    stretches: list[list[int]] = [[]]
    for i in sorted(losses):
        last = stretches[-1]
        if last and math.isclose(losses[i], losses[last[-1]], rel_tol=SAME):
            last.append(i)
        else:
            stretches.append([i])
    return max(stretches, key=len)


def _rate_was_up(curves: Curves, indices: Sequence[int]) -> bool:
    rates = finite(curves.learning_rate)
    return any(rates.get(i, 0.0) > IDLE_RATE * max(rates.values()) for i in indices)


def _too_small_to_tell(curves: Curves) -> bool:
    if not curves.rows:
        return False
    last = curves.rows[-1]
    return last.step < SETTLED_STEPS or last.train.expected_samples < (curves.num_classes or 0)


def _level_of(loss: float, curves: Curves) -> str:
    """Say where a loss stands beside the one of guessing."""
    if not curves.num_classes:
        classes = f"{math.exp(loss):,.0f}" if loss < 50 else f"e^{loss:.0f}"
        return f"Guessing among {classes} classes costs that much; the number of classes is unknown (--num-classes)."
    guess = math.log(curves.num_classes)
    side = "above" if loss > guess else "below"
    untrained = ", where an untrained head stands" if loss > guess else ""
    return f"That is {side} ln({curves.num_classes}) = {guess:.2f}, the loss of guessing{untrained} (classes from {curves.num_classes_from})."


def _top1_fell(curves: Curves, index: int) -> bool:
    """Whether val top-1 ends below where it was at that index; True where it is unknown."""
    top1 = finite(curves.val.top1)
    return index not in top1 or top1[max(top1)] < top1[index]


def _top1_since(curves: Curves, index: int) -> str:
    top1 = finite(curves.val.top1)
    if index not in top1:
        return ""
    return f" val top-1 went from {percent_text(top1[index])} to {percent_text(top1[max(top1)])}."
