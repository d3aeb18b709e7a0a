"""Manners: how often a server is asked, how long it is waited for, and when it is left alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from aplantida_dist.seeds import derive


@dataclass(frozen=True)
class Manners:
    """The bounds of a download. Every wait ends, and so does every picture: in attempts, redirects, seconds and bytes.

    At most `in_all` requests are open at once, and `per_host` of them at one host. A request may take `connect_s` to connect,
    `silence_s` without a byte and `request_s` in all. A passing failure is tried `attempts` times in all, after waits that
    begin near `first_wait_s` and double. A host that asks for more than `longest_quiet_s` of quiet, or fails
    `failures_in_a_row` pictures without one answer between, is given up for the run.
    """

    per_host: int = 2
    in_all: int = 16
    attempts: int = 4
    redirects: int = 5
    picture_bytes: int = 64 * 2**20
    connect_s: float = 10.0
    silence_s: float = 30.0
    request_s: float = 120.0
    first_wait_s: float = 2.0
    longest_quiet_s: float = 600.0
    failures_in_a_row: int = 10

    def wait_s(self, url: str, *, attempt: int) -> float:
        """The seconds to wait after the failed attempt, counted from 0: doubling, and 0.5 to 1.5 of that, decided by the URL."""
        share = derive(0, "download wait", url, attempt) / 2**63
        return self.first_wait_s * 2.0**attempt * (0.5 + share)


def parse_retry_after(text: str, *, now: datetime) -> float | None:
    """The seconds that a Retry-After header asks for, from its count of seconds or its HTTP date; a past date is 0.

    None for a text that is neither (RFC 9110, 10.2.3).
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - now).total_seconds())
