"""The pace of long work: a line on stderr now and then, with the rate and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

LINE_EVERY_S = 5.0

Item = TypeVar("Item")


class Pace:
    """The lines of one long work that says itself how far it is."""

    def __init__(self, *, total: int, doing: str) -> None:
        self._total = total
        self._doing = doing
        self._start_s = self._told_s = time.monotonic()

    def tell(self, count: int) -> None:
        """Say on stderr that `count` are done, unless something was said less than five seconds ago."""
        now_s = time.monotonic()
        if now_s - self._told_s < LINE_EVERY_S:
            return
        self._told_s = now_s
        rate_per_s = count / (now_s - self._start_s)
        left_s = (self._total - count) / rate_per_s
        print(
            f"{self._doing}: {count:,} of {self._total:,}, {rate_per_s:,.0f}/s, {left_s:,.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def with_pace(items: Iterable[Item], *, total: int, doing: str) -> Iterator[Item]:
    """Pass the items on and say on stderr how far they are, at most every five seconds; short work stays silent."""
    pace = Pace(total=total, doing=doing)
    for count, item in enumerate(items, start=1):
        yield item
        pace.tell(count)
