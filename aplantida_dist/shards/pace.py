"""The pace of long work over files: a line on stderr now and then, with the rate and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

LINE_EVERY_S = 5.0

Item = TypeVar("Item")


def with_pace(items: Iterable[Item], *, total: int, doing: str) -> Iterator[Item]:
    """Pass the items on and say on stderr how far they are, at most every five seconds; short work stays silent."""
    start_s = told_s = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now_s = time.monotonic()
        if now_s - told_s >= LINE_EVERY_S:
            told_s = now_s
            rate_per_s = count / (now_s - start_s)
            left_s = (total - count) / rate_per_s
            print(
                f"{doing}: {count:,} of {total:,}, {rate_per_s:,.0f}/s, {left_s:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )
