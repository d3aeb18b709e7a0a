"""Evaluation: a model over a split, each sample once, on all ranks together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from aplantida_dist.data.dataset import Split
from aplantida_dist.data.images import EvaluationTransform
from aplantida_dist.data.plan import Coordinates, StoredPlan
from aplantida_dist.data.stream import Batch, MicroBatches, Reading, stream
from aplantida_dist.history import SplitMetrics
from aplantida_dist.loss import cross_entropy
from aplantida_dist.metrics import Metrics, Totals, compute, require_coverage
from aplantida_dist.world import World

TOP = 5


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
    write_predictions: Callable[[str], Any] | None = None,
) -> Metrics:
    """Collective. Evaluate a bare model (not wrapped in DDP) on every sample of a split; each rank returns the same metrics.

    The loss is the plain cross-entropy. What a micro-batch holds does not depend on the number of ranks, so on one kind
    of device neither do the totals, to the last bit. `write_predictions` gets one JSON line a sample, in the stored
    order, on the main process; it is given on every rank or on none. Raises CoverageError, StreamError.
    """
    plan = StoredPlan(split.shard_sizes, micro_batch_size)
    slots = plan.slots_of(world.rank, world.world_size)
    micro_batches = MicroBatches(split, plan, transform, seed=0, with_metadata=write_predictions is not None)
    totals = Totals(num_classes, world.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for read in stream(micro_batches, [Coordinates(0, 0, slot) for slot in slots], reading=reading):
            batch = read.to(world.device)
            logits = model(normalize(batch.images)).float()
            losses = cross_entropy(logits, batch.labels)
            totals.update(logits, losses, labels=batch.labels, weights=batch.weights, identities=batch.identities)
            if write_predictions is not None:
                for lines in world.gather_across_ranks(list(prediction_lines(read, logits, losses))):
                    if world.is_main:
                        write_predictions("".join(lines))
    model.train(was_training)
    metrics = compute(world.sum_across_ranks(totals.vector))
    require_coverage(
        metrics, split=split.name, expected_samples=split.num_samples, expected_identities=split.identity_digest
    )
    return metrics


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


def as_split_metrics(metrics: Metrics, *, expected_samples: int) -> dict[str, Any]:
    """The metrics as a history row's block holds them, validated."""
    block = SplitMetrics(
        loss=metrics.loss,
        top1=metrics.top1,
        top5=metrics.top5,
        macro_top1=metrics.macro_top1,
        num_samples=metrics.num_samples,
        expected_samples=expected_samples,
        void_samples=metrics.void_samples,
        identity_digest=metrics.identity_digest,
    )
    return block.model_dump(mode="json")
