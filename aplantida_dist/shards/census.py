"""The census: how many classes are frequent and how many rare, and the samples of each kind in every split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from aplantida_dist.data.frequency import MEANING_OF_FREQUENCY, Frequency, frequency_of
from aplantida_dist.data.manifest import Manifest


@dataclass(frozen=True)
class FrequencyCount:
    """The classes of one frequency. `num_samples` has one number a split, 0 included, in the order of the manifests."""

    frequency: Frequency
    num_classes: int
    num_samples: dict[str, int]


def count_frequencies(manifests: Sequence[Manifest], *, num_classes: int) -> tuple[FrequencyCount, ...]:
    """Count classes and samples of many, medium and few, also those that no class has. One of the manifests is that of train."""
    (train,) = (manifest for manifest in manifests if manifest.split == "train")
    frequencies = [frequency_of(count) for count in train.counts_of_classes(num_classes)]
    classes, samples = Counter(frequencies), Counter[tuple[Frequency, str]]()
    for manifest in manifests:
        for frequency, count in zip(frequencies, manifest.counts_of_classes(num_classes), strict=True):
            samples[frequency, manifest.split] += count
    return tuple(
        FrequencyCount(
            frequency,
            classes[frequency],
            {manifest.split: samples[frequency, manifest.split] for manifest in manifests},
        )
        for frequency in MEANING_OF_FREQUENCY
    )
