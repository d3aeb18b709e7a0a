"""The split: which photographs of a class train, which validate and which test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from aplantida_dist.seeds import derive


@dataclass(frozen=True)
class SplitSizes:
    """How many photographs of one class go where."""

    train: int
    val: int
    test: int


def split_sizes(num_photographs: int) -> SplitSizes:
    """Divide the photographs of a class: 1 → train; 2 → train, val; 3 and more → 80/10/10, val and test at least 1 each.

    A tenth is rounded to the nearest whole, a half upwards.
    """
    if num_photographs < 3:
        return SplitSizes(train=min(num_photographs, 1), val=max(num_photographs - 1, 0), test=0)
    tenth = max(1, (num_photographs + 5) // 10)
    return SplitSizes(train=num_photographs - 2 * tenth, val=tenth, test=tenth)


def split_by_class(class_of_key: Iterable[tuple[str, str]], *, seed: int) -> dict[str, str]:
    """Decide the split of every photograph from (sample key, class name) pairs, stratified by class.

    Photographs rank within their class by a digest of (seed, key): neither file names nor the order of arrival matter.
    """
    keys_of_class: defaultdict[str, list[str]] = defaultdict(list)
    for sample_key, class_name in class_of_key:
        keys_of_class[class_name].append(sample_key)
    split_of_key: dict[str, str] = {}
    for keys in keys_of_class.values():
        ranked = sorted(keys, key=lambda key: (derive(seed, "split", key), key))
        sizes = split_sizes(len(ranked))
        splits = ["train"] * sizes.train + ["val"] * sizes.val + ["test"] * sizes.test
        split_of_key.update(zip(ranked, splits, strict=True))
    return split_of_key
