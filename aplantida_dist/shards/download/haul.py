"""The haul: what a download brought, what it did not and why, as a value and as the console shows it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from aplantida_dist.shards.download.failure import Failure


@dataclass(frozen=True)
class Haul:
    """How a download ended: num_urls = num_fetched + len(failures), each URL once.

    `num_known` of the failures were known from the ledger and not asked for. `given_up` has one failure a host that was.
    """

    num_urls: int
    num_fetched: int
    num_bytes: int
    num_known: int
    failures: dict[str, Failure]
    given_up: tuple[Failure, ...]


def to_text(haul: Haul) -> str:
    """The haul as lines: the sum, the failures by reason, the hosts given up, and what the next run will do."""
    lines = [
        f"download: {haul.num_urls:,} URLs = {haul.num_fetched:,} fetched ({haul.num_bytes / 1e6:,.1f} MB) + {len(haul.failures):,} failed"
    ]
    counts = Counter(failure.reason for failure in haul.failures.values())
    lines += [
        f"{count:>9,}  {reason}" for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    lines += [f"host given up for this run: {failure.detail}" for failure in haul.given_up]
    num_lasting = sum(failure.kind == "lasting" for failure in haul.failures.values())
    if haul.num_known:
        lines.append(f"{haul.num_known:,} of them failed for good in an earlier run and were not asked for again")
    if num_passing := len(haul.failures) - num_lasting:
        lines.append(f"{num_passing:,} of them may pass: the same command asks for them again")
    return "\n".join(lines)
