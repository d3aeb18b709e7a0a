"""The split: which photographs of a class train, which validate and which test."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from aplantida_dist.data.manifest import SPLITS
from aplantida_dist.seeds import derive

TENTHS_TO_TRAIN = 8
TENTHS_TO_VAL = 1
"""Of the ten parts into which digests fall; what is left goes to test."""


def split_by_class(
    class_of_key: Iterable[tuple[str, str]], *, seed: int, kept: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Decide the split of every photograph from (sample key, class name) pairs, stratified by class.

    A photograph goes where its own digest of (seed, key) falls: 80 % of the digests to train, 10 % to val, 10 % to test. So
    neither file names nor the order of arrival matter, nor what else the class holds, but for one rule: no split that the
    class can fill stays empty (1 photograph → train; 2 → train, val; 3 and more → all three). Where the digests leave one
    empty, the nearest digest goes there, and returns to its own split when a photograph arrives that belongs there.

    `kept` (sample key → split) are decided already and never move; only the others fill what is empty. Without it no rule of
    this kind can keep every photograph: any three of a class in val and test were once a class of three, one of them in train.
    """
    keys_of_class: defaultdict[str, list[str]] = defaultdict(list)
    for sample_key, class_name in class_of_key:
        keys_of_class[class_name].append(sample_key)
    already = kept or {}
    split_of_key: dict[str, str] = {}
    for keys in keys_of_class.values():
        split_of_key.update(_split_one_class(keys, kept=already, seed=seed))
    return split_of_key


def _split_one_class(keys: Sequence[str], *, kept: Mapping[str, str], seed: int) -> dict[str, str]:
    split_of_key = {key: kept[key] for key in keys if key in kept}
    ranked = sorted((derive(seed, "split", key), key) for key in keys if key not in kept)
    filled = set(split_of_key.values())
    least: Counter[str] = Counter()
    for split in SPLITS[: len(keys)]:
        least[split] = int(split not in filled and least.total() < len(ranked))
    belonging = Counter(split_of_digest(digest) for digest, _ in ranked)
    num_train = _clamp(belonging["train"], least["train"], len(ranked) - least["val"] - least["test"])
    num_test = _clamp(belonging["test"], least["test"], len(ranked) - num_train - least["val"])
    splits = ["train"] * num_train + ["val"] * (len(ranked) - num_train - num_test) + ["test"] * num_test
    split_of_key.update((key, split) for (_, key), split in zip(ranked, splits, strict=True))
    return split_of_key


def split_of_digest(digest: int) -> str:
    """Where a digest of 63 bits falls: the first eight tenths of all digests train, the ninth validates, the last tests."""
    tenth = digest * 10 >> 63
    if tenth < TENTHS_TO_TRAIN:
        return "train"
    return "val" if tenth < TENTHS_TO_TRAIN + TENTHS_TO_VAL else "test"


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))
