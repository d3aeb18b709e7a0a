"""Ahead: the shards of the block that is read and of the next one, brought into a cache before they are read."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from aplantida_dist.data.cache import Cache, CacheError, CacheFullError, Item, Keeper
from aplantida_dist.data.dataset import Split
from aplantida_dist.data.plan import Coordinates, PlanError, StoredPlan, TrainPlan
from aplantida_dist.data.sampling import IntArray

BRINGERS = 4
"""Threads of each rank that bring shards: one connection seldom fills a link."""
_ROOM_POLL_S = 0.2


class Ahead:
    """What brings and keeps the shards of one stream: those of the block that it reads and of the next, in the order of the plan.

    A shard is kept until its block has been received. What a thread fails to bring is left to the reader, who tries by
    itself, and tells. The threads belong to the process that receives the stream, and end with it; of several ranks on a
    machine each asks, and what one is bringing the others leave to it. With `slots`, those of this rank, only their lanes' shards are.
    """

    def __init__(
        self, split: Split, plan: TrainPlan | StoredPlan, *, cache: Cache, num_epochs: int, slots: range | None
    ) -> None:
        self._split, self._plan, self._slots, self._cache = split, plan, slots, cache
        self._num_blocks = num_epochs * plan.blocks_per_epoch
        self._shards_of_live: dict[int, IntArray] = {}
        self._keeper = Keeper(cache)
        self._named: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._is_over = threading.Event()
        for number in range(BRINGERS):
            threading.Thread(target=self._bring, name=f"bring {split.name} {number}", daemon=True).start()

    def look(self, at: Coordinates) -> None:
        """Let go of the blocks before these coordinates, and ask for theirs and the one after."""
        first, last = self._plan.blocks_of(at)
        live = range(first, min(last + 2, self._num_blocks))
        if list(live) == list(self._shards_of_live):
            return
        before = self._shards_of_live
        self._shards_of_live = {block: before[block] if block in before else self._shards_of(block) for block in live}
        shards = dict.fromkeys(shard for block in live for shard in self._shards_of_live[block].tolist())
        self._keeper.keep(item for shard in shards for item in _items_of(self._split, shard))
        for shard in dict.fromkeys(self._new_shards(before)):
            self._named.put(shard)

    def close(self) -> None:
        """Keep and bring no more; a transfer that is in the middle goes on to its end, unseen."""
        self._is_over.set()
        for _ in range(BRINGERS):
            self._named.put(None)
        self._keeper.close()

    def _shards_of(self, block: int) -> IntArray:
        if isinstance(self._plan, StoredPlan):
            return self._plan.shards_of_block(block)
        return self._plan.shards_of_block(block, slots=self._slots)

    def _new_shards(self, before: dict[int, IntArray]) -> Iterable[int]:
        return (
            shard for block, shards in self._shards_of_live.items() if block not in before for shard in shards.tolist()
        )

    def _bring(self) -> None:
        while (shard := self._named.get()) is not None:
            for item in _items_of(self._split, shard):
                with suppress(CacheError):
                    self._bring_item(item)

    def _bring_item(self, item: Item) -> None:
        """Bring an item as soon as there is room for it beside what is kept."""
        while not self._is_over.is_set():
            try:
                self._cache.ask_for(item)
                return
            except CacheFullError:
                self._is_over.wait(_ROOM_POLL_S)


def _items_of(split: Split, shard_index: int) -> tuple[Item, Item]:
    return split.index_item(shard_index), split.tar_item(shard_index)


def bytes_of_shard(split: Split, shard_index: int) -> int:
    """What a shard takes in a cache: its tar and its index."""
    return sum(item.num_bytes for item in _items_of(split, shard_index))


def require_room_for_blocks(split: Split, plan: TrainPlan, *, num_epochs: int, slots: range | None = None) -> None:
    """Raise PlanError where the cache of a split, if it has one, cannot hold the shards of any block of a run and of the next.

    Each sample of a block may lie in any of its shards, so a smaller cache would bring shards again and again, and one without
    room for the next would have training wait at its beginning. `slots` are those of all ranks that share the cache; the shard
    that lies across the edge of two of their lanes may be counted for both.
    """
    if split.cache is None:
        return
    shard_bytes = np.array([bytes_of_shard(split, shard) for shard in range(len(plan.shard_sizes))], dtype=np.int64)
    needed, last = 0, np.zeros(0, dtype=np.int64)
    for epoch in range(num_epochs):
        if needed == shard_bytes.sum():
            break
        permutation, lanes = plan.shard_bounds_of_blocks(epoch, slots=slots)
        before = np.concatenate(([0], np.cumsum(shard_bytes[permutation])))
        # A lane's block and the next are one stretch of the epoch's shards; the last one's next is the first of another order.
        stretches = [before[np.append(ends[1:], ends[-1])] - before[firsts] for firsts, ends in lanes]
        first_block = np.concatenate([permutation[firsts[0] : ends[0]] for firsts, ends in lanes])
        across = int(shard_bytes[np.union1d(last, first_block)].sum())
        needed = max(needed, int(np.sum(stretches, axis=0).max()), across)
        last = np.concatenate([permutation[firsts[-1] : ends[-1]] for firsts, ends in lanes])
    if needed > split.cache.max_bytes:
        raise PlanError(
            f"data.cache_bytes {split.cache.max_bytes} is too little: a block of {plan.block_samples} samples and the next lie in shards "
            f"of up to {needed} bytes; set data.cache_bytes to {needed} or more, or lower data.block_samples in a new run"
        )
