"""How a number is written, the same in the table, the verdicts, the plots and the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

ABSENT = "–"


def loss_text(value: float | None) -> str:
    """A loss with four decimals, in scientific notation once it is too large for them."""
    if value is None or not math.isfinite(value):
        return _odd(value)
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def percent_text(value: float | None) -> str:
    """A fraction in percent, with two decimals."""
    return _odd(value) if value is None or not math.isfinite(value) else f"{100.0 * value:.2f} %"


def rate_text(value: float | None) -> str:
    """A learning rate with three significant digits."""
    return _odd(value) if value is None or not math.isfinite(value) else f"{value:.3g}"


def speed_text(value: float | None) -> str:
    """Images a second: whole numbers from 100 on, one decimal below."""
    if value is None or not math.isfinite(value):
        return _odd(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def count_text(number: int, noun: str, plural: str = "") -> str:
    """A count and its noun: `1 epoch`, `15 epochs`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def name_text(name: str) -> str:
    """A name on one line as it is read: line breaks, turns of the writing's direction and bytes that are no text are escaped."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)


def list_text(words: Sequence[object], *, most: int = 6) -> str:
    """A list in a sentence, cut after `most` entries with the number of those left out."""
    shown = ", ".join(str(word) for word in words[:most])
    return shown if len(words) <= most else f"{shown} and {len(words) - most:,} more"


def _odd(value: float | None) -> str:
    if value is None:
        return ABSENT
    return "NaN" if math.isnan(value) else ("inf" if value > 0 else "-inf")
