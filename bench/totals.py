"""The cost of our totals beside torchmetrics' for the same information: loss, top-1, top-5, macro top-1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from aplantida_dist.metrics import Totals
from bench.finding import Finding, Goal, compare, cpu_ms_of, interleave

NUM_SAMPLES = 256
NUM_CLASSES = 7120
GOAL = Goal("at most", 0.2)
SEED = 0


@dataclass(frozen=True)
class Slot:
    """What an update is given: logits float32 [b, classes]; losses, weights float32 [b]; labels, identities int64 [b]."""

    logits: Tensor
    losses: Tensor
    labels: Tensor
    weights: Tensor
    identities: Tensor


def make_slot(num_samples: int, num_classes: int) -> Slot:
    """Draw a slot; the labels run through the classes, so that with enough samples none is absent."""
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.arange(num_samples) % num_classes
    logits = torch.randn(num_samples, num_classes, generator=generator)
    logits[torch.arange(num_samples), labels] += 2.0
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    identities = torch.randint(-(2**62), 2**62, (num_samples,), generator=generator)
    return Slot(logits, losses, labels, torch.ones(num_samples), identities)


@dataclass(frozen=True)
class Peer:
    """The four metrics of torchmetrics, without their checks of the arguments, which cost extra."""

    loss: Metric
    accuracies: Sequence[Metric]

    def update(self, slot: Slot) -> None:
        self.loss.update(slot.losses, slot.weights)
        for accuracy in self.accuracies:
            accuracy.update(slot.logits, slot.labels)

    def compute(self) -> list[float]:
        """Loss, top-1, top-5, macro top-1."""
        return [float(metric.compute()) for metric in (self.loss, *self.accuracies)]


def make_peer(num_classes: int) -> Peer:
    """The peer, at nothing."""
    micro, macro = {"average": "micro"}, {"average": "macro"}
    accuracies = [
        MulticlassAccuracy(num_classes, top_k=1, validate_args=False, **micro),
        MulticlassAccuracy(num_classes, top_k=5, validate_args=False, **micro),
        MulticlassAccuracy(num_classes, top_k=1, validate_args=False, **macro),
    ]
    return Peer(MeanMetric(), accuracies)


def update_ours(totals: Totals, slot: Slot) -> None:
    """One update as the trainer makes it."""
    totals.update(slot.logits, slot.losses, labels=slot.labels, weights=slot.weights, identities=slot.identities)


def bench_totals(*, repeats: int) -> list[Finding]:
    """Compare updates of 256 × 7,120 logits, on the CPU."""
    slot = make_slot(NUM_SAMPLES, NUM_CLASSES)
    totals, peer = Totals(NUM_CLASSES, torch.device("cpu")), make_peer(NUM_CLASSES)

    updates: list[Callable[[], None]] = [lambda: update_ours(totals, slot), lambda: peer.update(slot)]
    for update in updates:
        update()  # the first one imports and allocates
    ours, theirs = interleave([cpu_ms_of(update) for update in updates], repeats=4 * repeats)
    what = f"totals: update of {NUM_SAMPLES} × {NUM_CLASSES:,} logits"
    return [compare(what, "CPU ms", ours, theirs, peer_name="torchmetrics", goal=GOAL)]
