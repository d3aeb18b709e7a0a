"""Totals: exact sums of loss, hits and identities over samples, which order and partition cannot change by one bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from aplantida_dist.data.frequency import MEANING_OF_FREQUENCY, Frequency, frequency_of
from aplantida_dist.data.manifest import identity_digest
from aplantida_dist.errors import UserError

FRACTION_BITS = 32
"""A loss is rounded to a multiple of 2^-32 before it is summed, so one loss is wrong by at most 2^-33."""
LIMB_BITS = 24
"""Sums are kept in two limbs cut here: the low one has room for 2^39 samples, the high one for 2^25 of the largest loss."""
LARGEST_LOSS = 2.0**30
"""Losses at or beyond this, NaN and infinities do not fit the fixed point: they are left out and counted as void."""

_FIELDS = ("loss_high", "loss_low", "weight_high", "weight_low", "top1", "top5", "samples", "void", "identity")


class MetricsError(UserError):
    """Metrics were asked of no samples at all."""


class CoverageError(UserError):
    """An epoch did not read exactly the samples that the manifest names."""


@dataclass(frozen=True)
class Metrics:
    """What totals amount to, divided once: loss = Σ w·ℓ / Σ w; top1, top5 as fractions of num_samples."""

    loss: float
    top1: float
    top5: float
    macro_top1: float
    num_samples: int
    void_samples: int
    identity_digest: str
    class_support: tuple[int, ...]
    class_hits: tuple[int, ...]


class Totals:
    """The running sums, one int64 vector on the device. `update` never waits for the device."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.vector = torch.zeros(len(_FIELDS) + 2 * num_classes, dtype=torch.int64, device=device)
        self._class_indices = torch.arange(num_classes, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, losses: Tensor, *, labels: Tensor, weights: Tensor, identities: Tensor) -> None:
        """Add the samples with weight > 0.

        logits: float [b, classes]; losses: float32 [b]; labels, identities: int64 [b]; weights: float32 [b].
        A sample whose weighted loss is not finite, or not below 2^30, adds to `void` and to nothing else but the identities.
        """
        present = weights > 0
        weighted = losses * weights
        counted = present & (weighted.abs() < LARGEST_LOSS)
        kept_losses = torch.where(counted, weighted, 0.0)
        kept_weights = torch.where(counted, weights, 0.0)
        ranks = rank_of_label(logits, labels, self._class_indices)
        top1 = counted & (ranks < 1)
        sums = torch.stack(
            (
                *_limbs(kept_losses),
                *_limbs(kept_weights),
                top1.sum(),
                (counted & (ranks < 5)).sum(),
                counted.sum(),
                (present & ~counted).sum(),
                torch.where(present, identities, 0).sum(),
            )
        )
        head, support, hits = self._parts()
        head += sums
        support.index_add_(0, labels, counted.to(torch.int64))
        hits.index_add_(0, labels, top1.to(torch.int64))

    def merge(self, other: Tensor) -> None:
        """Add the vector of other totals, such as those of the first half of an epoch from a checkpoint."""
        self.vector += other.to(self.vector.device)

    def add_void(self, identities: Tensor) -> None:
        """Count samples of which nothing is known but who they are, int64 [n]: as void, and as nothing else but the identities."""
        head, _, _ = self._parts()
        head[_FIELDS.index("void")] += len(identities)
        head[_FIELDS.index("identity")] += identities.sum()

    def void_since(self, before: Tensor) -> None:
        """Count every sample since `before`, a copy of the vector, as void and, but for the identities, as nothing else."""
        samples, void, identity = (_FIELDS.index(name) for name in ("samples", "void", "identity"))
        now = self.vector.clone()
        self.vector.copy_(before)
        self.vector[void] = now[void] + now[samples] - before[samples]
        self.vector[identity] = now[identity]

    def reset(self) -> None:
        """Start again from nothing."""
        self.vector.zero_()

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the vector: the nine sums, samples of each class, top-1 hits of each class."""
        first, second = len(_FIELDS), len(_FIELDS) + self.num_classes
        return self.vector[:first], self.vector[first:second], self.vector[second:]


def compute(vector: Tensor) -> Metrics:
    """Divide, once, what `Totals` have summed (the vector after the all-reduce). Waits for the device.

    macro_top1 is the mean recall of the classes present. Raises MetricsError for zero samples: nothing is not zero.
    """
    numbers = vector.tolist()
    head = dict(zip(_FIELDS, numbers, strict=False))
    num_classes = (len(numbers) - len(_FIELDS)) // 2
    support, hits = numbers[len(_FIELDS) : len(_FIELDS) + num_classes], numbers[len(_FIELDS) + num_classes :]
    if head["samples"] == 0:
        raise MetricsError(
            f"no sample was counted ({head['void']} void), so there is no loss to report; every loss was NaN or there was no data"
        )
    loss_sum = (head["loss_high"] << LIMB_BITS) + head["loss_low"]
    weight_sum = (head["weight_high"] << LIMB_BITS) + head["weight_low"]
    return Metrics(
        loss=float(Fraction(loss_sum, weight_sum)),
        top1=head["top1"] / head["samples"],
        top5=head["top5"] / head["samples"],
        macro_top1=_mean_recall(zip(hits, support, strict=True)),
        num_samples=head["samples"],
        void_samples=head["void"],
        identity_digest=identity_digest(head["identity"]),
        class_support=tuple(support),
        class_hits=tuple(hits),
    )


def top1_of_frequencies(metrics: Metrics, train_counts: Sequence[int]) -> dict[Frequency, float]:
    """Mean recall of the classes present that are many, medium or few among the train samples (Liu et al. 2019).

    train_counts: the train samples of each class index. It is macro_top1 over a part of the classes, each class of equal
    weight however often the evaluated split holds it. A frequency of which no class is present is absent, not zero.
    """
    parts: dict[Frequency, list[tuple[int, int]]] = {frequency: [] for frequency in MEANING_OF_FREQUENCY}
    for hits, support, train_count in zip(metrics.class_hits, metrics.class_support, train_counts, strict=True):
        if support:
            parts[frequency_of(train_count)].append((hits, support))
    return {frequency: _mean_recall(part) for frequency, part in parts.items() if part}


def _mean_recall(hits_and_support: Iterable[tuple[int, int]]) -> float:
    """The mean of hits / support over the classes that have any."""
    recalls = [hits / support for hits, support in hits_and_support if support]
    return math.fsum(recalls) / len(recalls)


def rank_of_label(logits: Tensor, labels: Tensor, class_indices: Tensor) -> Tensor:
    """Count the classes that rank above the label, so that `< k` means "among the k largest".

    logits: float [b, classes]; labels: int64 [b]; class_indices: int64 [classes], 0 … classes − 1; returns int64 [b].
    Equal logits rank by class index, lowest first. A row with a NaN ranks its label last: it is never correct.
    """
    columns = labels.unsqueeze(1)
    label_logits = logits.gather(1, columns)
    above = (logits > label_logits) | ((logits == label_logits) & (class_indices < columns))
    has_nan = logits.amax(1).isnan()
    return torch.where(has_nan, logits.shape[1], above.sum(1))


def _limbs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum float32 values below 2^30 in fixed point; returns (high, low), int64 [] each: the sum is high · 2^24 + low."""
    fixed = torch.round(values * 2.0**FRACTION_BITS).to(torch.int64)
    return (fixed >> LIMB_BITS).sum(), (fixed & (2**LIMB_BITS - 1)).sum()


def require_coverage(metrics: Metrics, *, split: str, expected_samples: int, expected_identities: str) -> None:
    """Raise CoverageError unless exactly the samples of the manifest were counted: as many, and the same ones."""
    found = metrics.num_samples + metrics.void_samples
    if found != expected_samples or metrics.identity_digest != expected_identities:
        raise CoverageError(
            f"{split}: counted {found} samples with identity digest {metrics.identity_digest}, the manifest says "
            f"{expected_samples} with {expected_identities}; the shards have changed since they were indexed, or a rank "
            "was lost: run `python shards/verify.py` on the dataset, then the same command again"
        )
