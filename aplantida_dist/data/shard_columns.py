"""What a manifest says of its shards, in columns: a hundred thousand shards are a few arrays, and no object each."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHA256_BYTES = 32
_LOW = 2**32
_MOST = {"B": 2**8 - 1, "H": 2**16 - 1, "I": 2**32 - 1, "q": 2**63 - 1}
"""The types of `array` and the largest number that each holds."""

IntArray = NDArray[np.int64]


class ShardColumns:
    """The fields of shards, row by row in the order of the manifest, to which rows are added.

    Numbers of samples and bytes are int64. Class counts lie one behind the other, as classes and counts in the smallest type that
    holds them, and begin where `starts` says.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.num_samples = array("q")
        self.bytes = array("q")
        self._digests = bytearray()
        self._urls: dict[int, str] = {}
        self._starts = array("q", [0])
        self._classes = _Numbers()
        self._counts = _Numbers()

    def __len__(self) -> int:
        return len(self.names)

    def add(
        self,
        *,
        name: str,
        num_samples: int,
        bytes: int,
        sha256: str,
        index_sha256: str,
        class_counts: Mapping[str, int],
        url: str | None,
    ) -> int:
        """Add a shard; returns its row."""
        row = len(self.names)
        self.names.append(name)
        self.num_samples.append(num_samples)
        self.bytes.append(bytes)
        self._digests += bytearray.fromhex(sha256) + bytearray.fromhex(index_sha256)
        if url is not None:
            self._urls[row] = url
        self._classes.extend([int(class_index) for class_index in class_counts])
        self._counts.extend(list(class_counts.values()))
        self._starts.append(self._starts[-1] + len(class_counts))
        return row

    def row(self, row: int) -> dict[str, Any]:
        """The fields of a shard by name, as they were added."""
        at = 2 * SHA256_BYTES * row
        digests = self._digests[at : at + 2 * SHA256_BYTES].hex()
        part = slice(self._starts[row], self._starts[row + 1])
        classes, counts = self._classes.numbers[part], self._counts.numbers[part]
        return {
            "name": self.names[row],
            "num_samples": self.num_samples[row],
            "bytes": self.bytes[row],
            "sha256": digests[: 2 * SHA256_BYTES],
            "index_sha256": digests[2 * SHA256_BYTES :],
            "class_counts": {str(class_index): count for class_index, count in zip(classes, counts, strict=True)},
            "url": self._urls.get(row),
        }

    def total_samples(self) -> int:
        """The sum over all shards."""
        return sum(self.num_samples)

    def totals_of_shards(self) -> list[int]:
        """For each shard the sum of its class counts."""
        high, low = (np.concatenate(([0], np.cumsum(half))) for half in self._halves_of_counts())
        starts = np.array(self._starts)
        return _whole(np.diff(high[starts]), np.diff(low[starts]))

    def totals_of_classes(self) -> dict[str, int]:
        """For each class that any shard names, ascending, the sum of its counts."""
        classes, places = np.unique(np.array(self._classes.numbers), return_inverse=True)
        sums = []
        for half in self._halves_of_counts():
            sums.append(np.zeros(len(classes), dtype=np.int64))
            np.add.at(sums[-1], places, half)
        return dict(zip(map(str, classes.tolist()), _whole(*sums), strict=True))

    def _halves_of_counts(self) -> Iterator[IntArray]:
        """The upper and the lower half of each count, because no sum of those wraps, whatever a manifest states."""
        counts = np.array(self._counts.numbers).astype(np.int64)
        yield counts // _LOW
        yield counts % _LOW


class _Numbers:
    """Whole numbers from 0 to 2^63 − 1, in the smallest array that holds the largest of them."""

    def __init__(self) -> None:
        self.numbers = array("B")

    def extend(self, numbers: list[int]) -> None:
        while numbers and max(numbers) > _MOST[self.numbers.typecode]:
            wider = list(_MOST)[list(_MOST).index(self.numbers.typecode) + 1]
            self.numbers = array(wider, self.numbers)
        self.numbers.extend(numbers)


def _whole(high: IntArray, low: IntArray) -> list[int]:
    return [_LOW * upper + lower for upper, lower in zip(high.tolist(), low.tolist(), strict=True)]
