"""The full audit of a build beside decoding alone, on the same pictures in the same worker processes."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from aplantida_dist.data.decode import decode
from aplantida_dist.shards.audit import audit_places
from aplantida_dist.shards.place import Place
from aplantida_dist.shards.workers import ITEMS_PER_TASK, map_in_order
from bench.finding import Finding, Goal, compare, interleave

NUM_WORKERS = 2
CPU_GOAL, SPEED_GOAL = Goal("at most", 1.25), Goal("at least", 0.8)

Audit = Callable[[Sequence[Place], int], Iterator[Any]]
"""Places and the number of worker processes in, a result for each place out."""


def full_audit(places: Sequence[Place], num_workers: int) -> Iterator[Any]:
    """As a build audits: read, decode, key, look, and every test."""
    return audit_places(places, num_workers=num_workers, with_looks=True)


def decode_only(places: Sequence[Place], num_workers: int) -> Iterator[Any]:
    """Read and decode, as training does before it crops."""
    return map_in_order(_decode_together, places, num_workers=num_workers)


def pictures_per_s(repeat: int, *, audit: Audit, places: Sequence[Place]) -> float:
    """Pictures a second. The clock starts when each worker has done a task, so that no start of a process is counted."""
    results = audit(places, NUM_WORKERS)
    deque(islice(results, NUM_WORKERS * ITEMS_PER_TASK), maxlen=0)
    started_s = time.perf_counter()
    num_timed = sum(1 for _ in results)
    return num_timed / (time.perf_counter() - started_s)


def cpu_ms_a_picture(repeat: int, *, audit: Audit, places: Sequence[Place]) -> float:
    """CPU time, user + system, in one process: what other processes' load moves least."""
    started_s = time.process_time()
    deque(audit(places, 0), maxlen=0)
    return 1000.0 * (time.process_time() - started_s) / len(places)


def bench_audit(folder: Path, *, repeats: int) -> list[Finding]:
    """Compare the two over the JPEG files below a folder; the first pass of each, which fills the page cache, is not counted."""
    places = [Place(str(path)) for path in sorted(folder.rglob("*.jpg"))]
    measures = [
        functools.partial(measure, audit=audit, places=places)
        for measure in (cpu_ms_a_picture, pictures_per_s)
        for audit in (full_audit, decode_only)
    ]
    our_ms, peer_ms, our_per_s, peer_per_s = (passes[1:] for passes in interleave(measures, repeats=repeats + 1))
    return [
        compare("audit: CPU time a picture", "ms", our_ms, peer_ms, peer_name="decode only", goal=CPU_GOAL),
        compare("audit: speed", "images/s", our_per_s, peer_per_s, peer_name="decode only", goal=SPEED_GOAL),
    ]


def _decode_together(places: Sequence[Place]) -> list[int]:
    return [decode(place.read()).width for place in places]
