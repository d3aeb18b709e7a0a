"""Exact totals: law 3 on the numbers themselves."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from aplantida_dist.data.manifest import identity_digest
from aplantida_dist.metrics import (
    CoverageError,
    MetricsError,
    Totals,
    compute,
    rank_of_label,
    require_coverage,
)

CPU = torch.device("cpu")


def make_samples(num_samples: int, num_classes: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "logits": torch.randn(num_samples, num_classes, generator=generator),
        "losses": torch.rand(num_samples, generator=generator) * 9.14,
        "labels": torch.randint(num_classes, (num_samples,), generator=generator),
        "weights": torch.ones(num_samples),
        "identities": torch.randint(-(2**62), 2**62, (num_samples,), generator=generator),
    }


def total_of(samples: dict[str, Tensor], parts: list[list[int]], num_classes: int) -> Tensor:
    """The vector after the parts were summed on as many ranks."""
    vector = torch.zeros(9 + 2 * num_classes, dtype=torch.int64)
    for part in parts:
        totals = Totals(num_classes, CPU)
        for chunk in torch.tensor(part).split(7):
            totals.update(
                samples["logits"][chunk],
                samples["losses"][chunk],
                labels=samples["labels"][chunk],
                weights=samples["weights"][chunk],
                identities=samples["identities"][chunk],
            )
        vector += totals.vector
    return vector


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("shuffle_seed", [0, 1, 2])
def test_totals_do_not_depend_on_order_or_partition(num_ranks: int, shuffle_seed: int) -> None:
    """Any order over any number of ranks gives the same integers, to the last bit."""
    samples = make_samples(1003, 17)
    order = list(range(1003))
    reference = total_of(samples, [order], 17)
    random.Random(shuffle_seed).shuffle(order)
    assert torch.equal(total_of(samples, [order[rank::num_ranks] for rank in range(num_ranks)], 17), reference)


def test_the_mean_loss_is_that_of_fsum() -> None:
    """The epoch loss is the exact mean to 1e-10, not a mean of batch means."""
    samples = make_samples(5003, 11)
    metrics = compute(total_of(samples, [list(range(5003))], 11))
    exact = math.fsum(samples["losses"].tolist()) / 5003
    assert abs(metrics.loss - exact) < 1e-10
    batch_means = [float(chunk.mean()) for chunk in samples["losses"].split(64)]
    assert abs(sum(batch_means) / len(batch_means) - exact) > 1e-5, "a mean of means must be told apart"


def test_counts_are_those_of_a_plain_loop() -> None:
    """top-1, top-5, macro top-1, support and hits against sorting each row."""
    samples = make_samples(701, 23)
    metrics = compute(total_of(samples, [list(range(701))], 23))
    support, hits, top5 = [0] * 23, [0] * 23, 0
    for row, label in zip(samples["logits"].tolist(), samples["labels"].tolist(), strict=True):
        ranked = sorted(range(23), key=lambda index: (-row[index], index))
        support[label] += 1
        hits[label] += ranked[0] == label
        top5 += label in ranked[:5]
    assert metrics.class_support == tuple(support)
    assert metrics.class_hits == tuple(hits)
    assert metrics.top1 == sum(hits) / 701
    assert metrics.top5 == top5 / 701
    recalls = [hit / count for hit, count in zip(hits, support, strict=True) if count]
    assert metrics.macro_top1 == pytest.approx(sum(recalls) / len(recalls), abs=1e-15)


def test_classes_that_are_absent_do_not_enter_the_macro_mean() -> None:
    """macro top-1 is the mean recall of the classes present."""
    totals = Totals(100, CPU)
    logits = torch.zeros(3, 100)
    logits[0, 4] = logits[1, 4] = logits[2, 4] = 1.0
    totals.update(
        logits,
        torch.ones(3),
        labels=torch.tensor([4, 4, 9]),
        weights=torch.ones(3),
        identities=torch.zeros(3, dtype=torch.int64),
    )
    assert compute(totals.vector).macro_top1 == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_rank_by_class_index(dtype: torch.dtype) -> None:
    """Ties go to the lowest class index, whatever the precision."""
    logits = torch.zeros(6, 6, dtype=dtype)
    ranks = rank_of_label(logits, torch.arange(6), torch.arange(6))
    assert ranks.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_row_with_a_nan_is_never_correct() -> None:
    """Wherever the NaN stands."""
    logits = torch.tensor([[float("nan"), 5.0, 1.0], [9.0, float("nan"), 1.0], [1.0, 5.0, 2.0]])
    assert rank_of_label(logits, torch.tensor([1, 0, 1]), torch.arange(3)).tolist() == [3, 3, 0]


def test_padding_counts_for_nothing() -> None:
    """Weight 0 leaves every sum as it was, the digest of identities too."""
    samples = make_samples(10, 5)
    samples["weights"][6:] = 0.0
    padded = total_of(samples, [list(range(10))], 5)
    assert torch.equal(padded, total_of(samples, [list(range(6))], 5))
    assert compute(padded).num_samples == 6


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf"), 3e9, 2.0**30])
def test_what_does_not_fit_is_void_and_poisons_nothing(broken: float) -> None:
    """NaN, infinities and giants are counted beside the sum; the identities still prove what was read."""
    samples = make_samples(10, 5)
    samples["losses"][3] = broken
    vector = total_of(samples, [list(range(10))], 5)
    metrics = compute(vector)
    rest = [i for i in range(10) if i != 3]
    assert metrics.void_samples == 1
    assert metrics.num_samples == 9
    assert metrics.loss == compute(total_of(samples, [rest], 5)).loss
    assert metrics.identity_digest == identity_digest(int(samples["identities"].sum()))


def test_a_whole_epoch_of_the_largest_losses_fits() -> None:
    """33 million samples of a loss just below 2^30 neither wrap nor round away."""
    totals = Totals(2, CPU)
    largest = torch.full((1,), math.nextafter(2.0**30, 0.0)).clamp(max=2.0**30 - 64)
    totals.update(
        torch.zeros(1, 2),
        largest,
        labels=torch.zeros(1, dtype=torch.int64),
        weights=torch.ones(1),
        identities=torch.zeros(1, dtype=torch.int64),
    )
    million = totals.vector * (2**25 - 1)
    assert compute(million).loss == float(largest)


def test_weights_other_than_one_make_a_weighted_mean() -> None:
    """loss = Σ w·ℓ / Σ w."""
    totals = Totals(3, CPU)
    losses, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.25, 2.0])
    totals.update(
        torch.randn(3, 3),
        losses,
        labels=torch.tensor([0, 1, 2]),
        weights=weights,
        identities=torch.zeros(3, dtype=torch.int64),
    )
    assert compute(totals.vector).loss == (0.5 + 0.5 + 8.0) / 2.75


def test_no_samples_is_not_a_loss_of_zero() -> None:
    """Nothing is not zero."""
    with pytest.raises(MetricsError, match="no sample was counted"):
        compute(Totals(3, CPU).vector)


def test_coverage_is_refused_when_a_sample_is_missing_or_read_twice() -> None:
    """The count alone cannot see a sample that stood in for another; the identities can."""
    samples = make_samples(8, 4)
    whole = compute(total_of(samples, [list(range(8))], 4))
    twice = compute(total_of(samples, [[0, 1, 2, 3, 4, 5, 6, 6]], 4))
    fewer = compute(total_of(samples, [list(range(7))], 4))
    require_coverage(whole, split="val", expected_samples=8, expected_identities=whole.identity_digest)
    for metrics in (twice, fewer):
        with pytest.raises(CoverageError, match=r"verify\.py"):
            require_coverage(metrics, split="val", expected_samples=8, expected_identities=whole.identity_digest)
