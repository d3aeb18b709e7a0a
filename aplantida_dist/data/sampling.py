"""How often each sample stands in an epoch, where classes are to be seen more evenly than they were photographed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.seeds import derive

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ClassSampling:
    """The draw of every epoch: as many samples as the split holds, a class of n of them with a share that goes as n^exponent.

    Nothing is left to chance but which samples: the numbers of draws of the classes are whole and add up, the same in every
    epoch (Kang et al. 2020 draw them at random). A class is dealt like a deck of cards: its samples in a shuffled order, then
    again in another, going on from epoch to epoch; so over a run its samples differ by one draw at most.

    labels: int64 [num_samples], in the manifest's order. exponent: 1 draws every sample once, 0 every class alike.
    """

    labels: IntArray
    exponent: float
    seed: int

    @cached_property
    def draws_of_classes(self) -> IntArray:
        """int64 [classes up to the largest label], the draws of each class in an epoch, by largest remainders.

        A class of one sample has one draw at least, one of none has none.
        """
        counts = np.bincount(self.labels)
        powers = np.where(counts > 0, counts.astype(np.float64) ** self.exponent, 0.0)
        shares = len(self.labels) * (powers / powers.sum())
        draws: IntArray = np.floor(shares).astype(np.int64)
        largest_first = np.argsort(-(shares - draws), kind="stable")
        draws[largest_first[: len(self.labels) - int(draws.sum())]] += 1
        return draws

    def draw(self, epoch: int) -> IntArray:
        """int64 [num_samples], ascending: the places in the manifest's order of the samples of an epoch, some of them repeated."""
        return _draw(self, epoch)

    @cached_property
    def decks(self) -> list[IntArray]:
        """The samples of each class index up to the largest label, in the manifest's order."""
        by_class = np.argsort(self.labels, kind="stable").astype(np.int64, copy=False)
        return np.split(by_class, np.cumsum(np.bincount(self.labels))[:-1])


# A memo of a pure function: every slot of an epoch asks for it, and a million samples of 7,000 classes take a second.
@lru_cache(maxsize=2)
def _draw(sampling: ClassSampling, epoch: int) -> IntArray:
    dealt = [_deal(sampling, class_index, epoch) for class_index, deck in enumerate(sampling.decks) if len(deck)]
    return np.sort(np.concatenate(dealt))


def _deal(sampling: ClassSampling, class_index: int, epoch: int) -> IntArray:
    """The draws of a class in an epoch: a stretch of its shuffled decks laid end to end, in no order."""
    deck, num_draws = sampling.decks[class_index], int(sampling.draws_of_classes[class_index])

    def shuffled(deal: int) -> IntArray:
        key = derive(sampling.seed, "deck", class_index, deal)
        return deck[np.argsort(np.random.Philox(key=key).random_raw(len(deck)), kind="stable")]

    (first, begin), (last, end) = (divmod(bound * num_draws, len(deck)) for bound in (epoch, epoch + 1))
    if first == last:
        return shuffled(first)[begin:end]
    return np.concatenate([shuffled(first)[begin:], *[deck] * (last - first - 1), shuffled(last)[:end]])
