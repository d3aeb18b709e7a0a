"""Evaluation: a model over a split, each sample once, on all ranks together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aplantida_dist.data.bad_sample import BadSample
from aplantida_dist.data.batch import Batch
from aplantida_dist.data.dataset import Split
from aplantida_dist.data.images import EvaluationTransform
from aplantida_dist.data.manifest import identity_digest
from aplantida_dist.data.plan import Coordinates, StoredPlan
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from aplantida_dist.history import EvaluationMetrics, SplitMetrics
from aplantida_dist.lineage import Identities
from aplantida_dist.loss import cross_entropy
from aplantida_dist.metrics import Metrics, Totals, compute, require_coverage, top1_of_frequencies
from aplantida_dist.world import World

TOP = 5


@dataclass(frozen=True)
class Evaluation:
    """Metrics over a whole split, and over its clean part where `leaked_samples` of it had been trained on.

    `clean` is None where nothing has leaked, and where everything has. `bad` are the samples that could not be delivered, in the
    stored order; they are void in both.
    """

    whole: Metrics
    leaked_samples: int
    clean: Metrics | None
    bad: tuple[BadSample, ...] = ()


def evaluate_across_ranks(
    model: nn.Module,
    *,
    world: World,
    split: Split,
    num_classes: int,
    transform: EvaluationTransform,
    normalize: nn.Module,
    micro_batch_size: int,
    reading: Reading,
    leaked: Identities,
    between_rounds: Callable[[], None],
    voids_bad_samples: bool,
    write_predictions: Callable[[str], Any] | None = None,
) -> Evaluation:
    """Collective. Evaluate a bare model (not wrapped in DDP) on every sample of a split; each rank returns the same metrics.

    The loss is the plain cross-entropy. What a micro-batch holds does not depend on the number of ranks, so on one kind
    of device neither do the totals, to the last bit. `write_predictions` gets one JSON line a sample, in the stored
    order, on the main process; it is given on every rank or on none. `leaked` names the samples that the weights
    had been trained on: int64 [n], ascending, maybe none. `between_rounds` is called equally often on every rank, and
    may raise to leave. A bad sample is void, and has no prediction, with `voids_bad_samples`; else it is a StreamError.
    Raises CoverageError.
    """
    plan = StoredPlan(split.shard_sizes, micro_batch_size)
    slots = plan.slots_of(world.rank, world.world_size)
    with_metadata = write_predictions is not None
    micro_batches = MicroBatches(
        split, plan, transform, seed=0, with_metadata=with_metadata, voids_bad_samples=voids_bad_samples
    )
    bad: list[BadSample] = []
    totals, clean_totals = Totals(num_classes, world.device), Totals(num_classes, world.device)
    leaked_here = torch.from_numpy(leaked).to(world.device)
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    world.watchdog.note("reading a batch")
    with torch.no_grad():
        for read in stream(micro_batches, [Coordinates(0, 0, slot) for slot in slots], reading=reading):
            between_rounds()
            world.watchdog.note("working")
            batch = read.to(world.device)
            logits = model(normalize(batch.images)).float()
            losses = cross_entropy(logits, batch.labels)
            told = {"labels": batch.labels, "identities": batch.identities}
            totals.update(logits, losses, weights=batch.weights, **told)
            if len(leaked):
                clean_weights = torch.where(is_among(batch.identities, leaked_here), 0.0, batch.weights)
                clean_totals.update(logits, losses, weights=clean_weights, **told)
            if read.bad:
                bad += read.bad
                totals.add_void(batch.bad_identities)
                clean_totals.add_void(batch.bad_identities[~is_among(batch.bad_identities, leaked_here)])
            if write_predictions is not None:
                for lines in world.gather_across_ranks(list(prediction_lines(read, logits, losses))):
                    if world.is_main:
                        write_predictions("".join(lines))
            world.watchdog.note("reading a batch")
    for module in in_training:  # frozen ones are not
        module.training = True
    whole, clean = world.sum_across_ranks(torch.stack((totals.vector, clean_totals.vector)))
    evaluation = _divided(whole, clean, split=split, leaked=leaked)
    if not voids_bad_samples:
        return evaluation
    gathered = (sample for samples in world.gather_across_ranks(bad) for sample in samples)
    return replace(evaluation, bad=tuple(sorted(gathered, key=lambda sample: (sample.slot, sample.place))))


def is_among(identities: Tensor, sought: Tensor) -> Tensor:
    """Which of the identities (int64 [b]) are among those sought (int64 [n], ascending); bool [b], without waiting for the device."""
    if not len(sought):
        return torch.zeros_like(identities, dtype=torch.bool)
    places = torch.searchsorted(sought, identities).clamp_(max=len(sought) - 1)
    return sought[places] == identities


def _divided(whole_sums: Tensor, clean_sums: Tensor, *, split: Split, leaked: Identities) -> Evaluation:
    """Divide the sums over all ranks, and prove that the whole and the clean part are what the manifest and the leak say."""
    whole, clean, num_clean = compute(whole_sums), None, split.num_samples - len(leaked)
    require_coverage(
        whole, split=split.name, expected_samples=split.num_samples, expected_identities=split.identity_digest
    )
    if len(leaked) and num_clean:
        clean = compute(clean_sums)
        clean_identities = identity_digest(int(split.identity_digest, 16) - int(leaked.sum()))
        require_coverage(
            clean,
            split=f"{split.name} (clean)",
            expected_samples=num_clean,
            expected_identities=clean_identities,
        )
    return Evaluation(whole, len(leaked), clean)


def prediction_lines(batch: Batch, logits: Tensor, losses: Tensor) -> Iterator[str]:
    """One JSON line for each sample that is not padding: key, label, loss, the five likeliest classes, metadata.

    Equal logits rank by class index, lowest first, as in the totals.
    """
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :TOP]
    probabilities = logits.softmax(1).gather(1, order).tolist()
    for i, weight in enumerate(batch.weights.tolist()):
        if weight > 0:
            line = {
                "key": batch.sample_keys[i],
                "label": int(batch.labels[i]),
                "loss": float(losses[i]),
                "top5": order[i].tolist(),
                "top5_probabilities": probabilities[i],
                "metadata": batch.metadata[i],
            }
            yield json.dumps(line, ensure_ascii=False) + "\n"


def as_split_metrics(metrics: Metrics, *, expected_samples: int, train_counts: Sequence[int] | None) -> dict[str, Any]:
    """The metrics as a history row's block holds them, validated. Without train counts no class is many, medium or few."""
    block = _block(metrics, expected_samples=expected_samples, train_counts=train_counts)
    return SplitMetrics(**block).model_dump(mode="json")


def as_evaluation_metrics(
    evaluation: Evaluation,
    *,
    expected_samples: int,
    train_counts: Sequence[int] | None,
    logit_adjustment: float | None = None,
    other_classes: Literal["count", "leave-out"] | None = None,
) -> EvaluationMetrics:
    """An evaluation as a history row's block holds it, validated; leak and clean part are absent where there is none."""
    leaked, clean = evaluation.leaked_samples, None
    block = _block(evaluation.whole, expected_samples=expected_samples, train_counts=train_counts)
    if evaluation.clean is not None:
        part = _block(evaluation.clean, expected_samples=expected_samples - leaked, train_counts=train_counts)
        clean = SplitMetrics(**part)
    return EvaluationMetrics(
        **block,
        leaked_samples=leaked or None,
        clean=clean,
        logit_adjustment=logit_adjustment,
        other_classes=other_classes,
    )


def _block(metrics: Metrics, *, expected_samples: int, train_counts: Sequence[int] | None) -> dict[str, Any]:
    frequencies = {} if train_counts is None else top1_of_frequencies(metrics, train_counts)
    return {
        "loss": metrics.loss,
        "top1": metrics.top1,
        "top5": metrics.top5,
        "macro_top1": metrics.macro_top1,
        **{f"{frequency}_top1": value for frequency, value in frequencies.items()},
        "num_samples": metrics.num_samples,
        "expected_samples": expected_samples,
        "void_samples": metrics.void_samples,
        "identity_digest": metrics.identity_digest,
    }
