"""Views: the samples of one split in a tar that others wrote, as the rows of the index that leads to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.data.index import KEY_BYTES
from aplantida_dist.shards.audit import Candidate
from aplantida_dist.shards.source import IndexedTar


@dataclass(frozen=True)
class View:
    """A tar and the index of some of its samples (FOREIGN_INDEX_DTYPE), in the tar's order. It is never empty."""

    tar: IndexedTar
    index: NDArray[Any]


def separate_views(
    candidates: Sequence[Candidate], tars: Sequence[IndexedTar], *, index_of: Mapping[str, int]
) -> tuple[list[Candidate], list[View]]:
    """The candidates whose pictures are to be written, in their order, and a view of each tar in which others lie, in the tars' order.

    `index_of` is class_name → class_index.
    """
    in_tar: dict[str, list[Candidate]] = {tar.path: [] for tar in tars}
    written: list[Candidate] = []
    for candidate in candidates:
        in_tar.get(candidate.record.place.path, written).append(candidate)
    return written, [_view_of(tar, in_tar[tar.path], index_of=index_of) for tar in tars if in_tar[tar.path]]


def _view_of(tar: IndexedTar, candidates: Sequence[Candidate], *, index_of: Mapping[str, int]) -> View:
    ordered = sorted(candidates, key=lambda candidate: candidate.record.place.offset)
    offsets = [candidate.record.place.offset for candidate in ordered]
    index = tar.rows[np.searchsorted(tar.rows["offset"], offsets)]
    index["label"] = [index_of[candidate.record.class_name] for candidate in ordered]
    keys = b"".join(bytes.fromhex(candidate.picture.sample_key) for candidate in ordered)
    index["key"] = np.frombuffer(keys, dtype=f"V{KEY_BYTES}")
    return View(tar, index)
