"""Labelling: what a teacher says of every sample of a split, on all ranks together, in parts that outlive the command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aplantida_dist.data.batch import Batch
from aplantida_dist.data.dataset import Split
from aplantida_dist.data.images import EvaluationTransform
from aplantida_dist.data.plan import Coordinates, StoredPlan
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from aplantida_dist.lineage import Identities
from aplantida_dist.pace import Pace
from aplantida_dist.soft_label_file import SoftLabelError, SoftLabelFacts
from aplantida_dist.soft_label_parts import SLOTS_PER_PART, SoftLabelParts
from aplantida_dist.world import World


@dataclass(frozen=True)
class Labelling:
    """What is to be done: the teacher, the samples, how they are read, and the facts that the file will state."""

    model: nn.Module
    split: Split
    transform: EvaluationTransform
    normalize: nn.Module
    reading: Reading
    facts: SoftLabelFacts
    seen: Identities


def write_parts_across_ranks(labelling: Labelling, parts: SoftLabelParts, *, world: World, first_part: int) -> None:
    """Collective. Make the parts from `first_part` on; what a slot holds, and so each part, is the same on any number of ranks."""
    plan = StoredPlan(labelling.split.shard_sizes, labelling.facts.micro_batch_size)
    slots_of_parts = [_slots(plan, part, world) for part in range(first_part, parts.num_parts)]
    coordinates = [Coordinates(0, 0, slot) for slots in slots_of_parts for slot in slots]
    batches = stream(
        MicroBatches(labelling.split, plan, labelling.transform, seed=0), coordinates, reading=labelling.reading
    )
    model = world.prepare_for_evaluation(labelling.model).eval()
    first_sample, num_samples = first_part * parts.part_samples, parts.facts.num_samples
    pace = Pace(total=num_samples - first_sample, doing="labelling samples")
    for part, slots in enumerate(slots_of_parts, start=first_part):
        records = [_label(batches, model, labelling, world) for _ in slots]
        by_rank = world.gather_across_ranks(records)
        # The ranks take slots in turn, so taking one of each in turn is the stored order.
        in_order = [rank[turn] for turn in range(len(by_rank[0])) for rank in by_rank if turn < len(rank)]
        world.learn_from_main_across_ranks(partial(parts.write, part, in_order))
        if world.is_main:
            pace.tell(min((part + 1) * parts.part_samples, num_samples) - first_sample)


def _slots(plan: StoredPlan, part: int, world: World) -> range:
    """The slots of a part that this rank labels; no rank waits for another before the part's end."""
    end = min((part + 1) * SLOTS_PER_PART, plan.num_slots)
    return range(part * SLOTS_PER_PART + world.rank, end, world.world_size)


def _label(batches: Iterator[Batch], model: nn.Module, labelling: Labelling, world: World) -> NDArray[Any]:
    """What the teacher says of the next micro-batch, its padding left out."""
    world.watchdog.note("reading a batch")
    read = next(batches)
    world.watchdog.note("working")
    batch = read.to(world.device)
    with torch.no_grad():
        logits = model(labelling.normalize(batch.images)).float()
    return records_of(logits, batch.identities, batch.weights, facts=labelling.facts)


def records_of(logits: Tensor, identities: Tensor, weights: Tensor, *, facts: SoftLabelFacts) -> NDArray[Any]:
    """The records of a micro-batch: logits float32 [b, classes], identities int64 [b], weights float32 [b] (0: padding).

    Equal logits rank by class index, lowest first. Raises SoftLabelError where a logit is not a number.
    """
    if not logits.isfinite().all():
        raise SoftLabelError(f"{facts.teacher_path}: gives logits that are NaN or Inf; choose another checkpoint")
    probabilities = (logits / facts.temperature).softmax(1)
    order = logits.sort(dim=1, descending=True, stable=True).indices
    ranked = probabilities.gather(1, order)
    is_real = (weights > 0).cpu().numpy()
    records = np.zeros(int(is_real.sum()), dtype=facts.record_dtype)
    records["identity"] = identities.cpu().numpy()[is_real]
    records["class_indices"] = order[:, : facts.num_kept].cpu().numpy()[is_real]
    records["probabilities"] = ranked[:, : facts.num_kept].cpu().numpy()[is_real]
    records["rest"] = ranked[:, facts.num_kept :].sum(1).cpu().numpy()[is_real]
    return records
