"""The frequency of a class: many, medium or few, by the samples of it that train holds."""

from __future__ import annotations

from typing import Literal

Frequency = Literal["many", "medium", "few"]

MANY_ABOVE = 100
FEW_BELOW = 20
MEANING_OF_FREQUENCY: dict[Frequency, str] = {
    "many": f"more than {MANY_ABOVE} train samples",
    "medium": f"{FEW_BELOW} to {MANY_ABOVE} train samples",
    "few": f"fewer than {FEW_BELOW} train samples",
}


def frequency_of(num_train_samples: int) -> Frequency:
    """The frequency of a class, as long-tailed recognition splits its scores (many-, medium- and few-shot: Liu et al. 2019)."""
    if num_train_samples > MANY_ABOVE:
        return "many"
    return "few" if num_train_samples < FEW_BELOW else "medium"
