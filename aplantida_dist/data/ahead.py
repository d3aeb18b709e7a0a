"""Ahead: which shards a cache should hold next, told from the plan before they are read, and the threads that bring them."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from aplantida_dist.data.cache import Cache, CacheError, Item
from aplantida_dist.data.dataset import Split
from aplantida_dist.data.plan import Coordinates, PlanError, StoredPlan, TrainPlan

BRINGERS = 4
"""Threads of each rank that bring shards: one connection seldom fills a link."""
MOST_AHEAD = 8192
"""Micro-batches that are looked at before they are read: at 32 samples each, a block."""
_LOOKED_AT_ONCE = 64
"""The most of them at a time, of 60 µs each, so that no step waits for it."""


class Ahead:
    """The walk ahead of one stream: it names shards in the order of their first use, as long as all that are live fit the cache.

    A shard is live from when it is named until the last micro-batch that was seen to need it has been received. Then it is let
    go, and room is made of it first. What a thread fails to bring is left to the reader, who tries by itself, and tells.
    """

    def __init__(
        self, split: Split, plan: TrainPlan | StoredPlan, coordinates: Iterator[Coordinates], *, cache: Cache
    ) -> None:
        self._split, self._plan, self._cache = split, plan, cache
        self._coordinates = coordinates
        self._num_seen = self._num_received = 0
        self._waiting: tuple[int, ...] | None = None
        """The shards of the first micro-batch that did not fit."""
        self._last_use: dict[int, int] = {}
        self._uses: deque[tuple[int, tuple[int, ...]]] = deque()
        self._live_bytes = 0
        self._named: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._is_over = threading.Event()
        for number in range(BRINGERS):
            threading.Thread(target=self._bring, name=f"bring {split.name} {number}", daemon=True).start()

    def look(self, num_received: int) -> None:
        """Go on ahead, now that so many micro-batches of the stream have been received."""
        self._num_received = num_received
        while self._uses and self._uses[0][0] < num_received:
            number, shards = self._uses.popleft()
            self._let_go(shard for shard in shards if self._last_use[shard] == number)
        for _ in range(_LOOKED_AT_ONCE):
            if self._num_seen - num_received >= MOST_AHEAD or not self._look_at_next():
                return

    def close(self) -> None:
        """Bring no more; a transfer that is in the middle goes on to its end, unseen."""
        self._is_over.set()
        for _ in range(BRINGERS):
            self._named.put(None)

    def _look_at_next(self) -> bool:
        """Name the shards of one more micro-batch; False at the end of the plan, and where they do not fit."""
        if self._waiting is None:
            at = next(self._coordinates, None)
            if at is None:
                return False
            self._waiting = tuple(np.unique(self._plan.micro_batch(at).shard_indices).tolist())
        shards = self._waiting
        new = [shard for shard in shards if shard not in self._last_use]
        more_bytes = sum(bytes_of_shard(self._split, shard) for shard in new)
        is_needed_now = self._num_seen <= self._num_received
        if new and self._live_bytes + more_bytes > self._cache.max_bytes and not is_needed_now:
            return False
        for shard in new:
            self._named.put(shard)
        self._live_bytes += more_bytes
        self._last_use.update(dict.fromkeys(shards, self._num_seen))
        self._uses.append((self._num_seen, shards))
        self._num_seen, self._waiting = self._num_seen + 1, None
        return True

    def _let_go(self, shards: Iterator[int]) -> None:
        for shard in shards:
            del self._last_use[shard]
            self._live_bytes -= bytes_of_shard(self._split, shard)
            for item in _items_of(self._split, shard):
                self._cache.let_go(item)

    def _bring(self) -> None:
        while (shard := self._named.get()) is not None and not self._is_over.is_set():
            with suppress(CacheError):
                for item in _items_of(self._split, shard):
                    self._cache.ask_for(item)


def _items_of(split: Split, shard_index: int) -> tuple[Item, Item]:
    return split.index_item(shard_index), split.tar_item(shard_index)


def bytes_of_shard(split: Split, shard_index: int) -> int:
    """What a shard takes in a cache: its tar and its index."""
    return sum(item.num_bytes for item in _items_of(split, shard_index))


def require_room_for_blocks(split: Split, plan: TrainPlan, *, num_epochs: int) -> None:
    """Raise PlanError where the cache of a split, if it has one, cannot hold the shards of every block of a run together.

    Each sample of a block may lie in any of its shards, so a smaller cache would bring shards again and again.
    """
    if split.cache is None:
        return
    shard_bytes = np.array([bytes_of_shard(split, shard) for shard in range(len(plan.shard_sizes))], dtype=np.int64)
    needed = max(
        int(shard_bytes[plan.shards_of_block(epoch, block)].sum())
        for epoch in range(num_epochs)
        for block in range(plan.blocks_per_epoch)
    )
    if needed > split.cache.max_bytes:
        raise PlanError(
            f"data.cache_bytes {split.cache.max_bytes} is too little: a block of {plan.block_samples} samples lies in shards of up to "
            f"{needed} bytes; set data.cache_bytes to {needed} or more, or lower data.block_samples in a new run"
        )
