"""The fields of a dataset's metadata: what its KEY.json hold, so that a condition on what none of them has is never met in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from aplantida_dist.shards.where import Condition, WhereError, text_of

NUM_EXAMPLES = 3
NUM_CANDIDATES = 10_000
"""Values of a field that are remembered: to show what it holds, or for a field of a condition to find close ones among."""
SHOWN_CHARACTERS = 40


@dataclass
class _Field:
    """One field: how many samples have it, its first distinct values, and which named values were not met so far."""

    num_remembered: int
    unmet: set[str]
    num_samples: int = 0
    values: dict[str, None] = field(default_factory=dict)


class Fields:
    """A tally of metadata, fed sample by sample; its size is bounded, whatever the fields hold."""

    def __init__(self, conditions: Sequence[Condition]) -> None:
        self._conditions = conditions
        self._fields: dict[str, _Field] = {}
        self._num_samples = 0
        for condition in conditions:
            self._fields.setdefault(condition.field, _Field(NUM_CANDIDATES, set())).unmet.update(condition.values)

    def add(self, metadata: dict[str, Any]) -> None:
        self._num_samples += 1
        for name, value in metadata.items():
            text = text_of(value)
            if text is None:
                continue
            found = self._fields.setdefault(name, _Field(NUM_EXAMPLES, set()))
            found.num_samples += 1
            found.unmet.discard(text)
            if len(found.values) < found.num_remembered:
                found.values[text] = None

    def num_without(self, name: str) -> int:
        """How many samples do not have this field."""
        return self._num_samples - self._fields[name].num_samples

    def require(self) -> None:
        """Raise WhereError where a condition names a field that no sample has, or a value that no sample has in it."""
        for condition in self._conditions:
            found = self._fields[condition.field]
            if not found.num_samples:
                raise WhereError(
                    f"--where {condition.text}: no sample has a field {condition.field!r}; "
                    f"there are {self._shown() or 'no fields at all'}; correct its name"
                )
            for value in condition.values:
                if value in found.unmet:
                    raise WhereError(
                        f"--where {condition.text}: no sample has {condition.field} {value!r}; "
                        f"{_near(value, list(found.values))}; correct the value or leave it out"
                    )

    def _shown(self) -> str:
        """Every field that samples have, with some of its values."""
        return ", ".join(
            f"{name} ({', '.join(map(_cut, list(found.values)[:NUM_EXAMPLES]))}{', …' if len(found.values) >= NUM_EXAMPLES else ''})"
            for name, found in sorted(self._fields.items())
            if found.num_samples
        )


def _near(value: str, values: list[str]) -> str:
    """The values close to one that is not there, whatever their case; where none is close, the first."""
    of_folded = {known.casefold(): known for known in values}
    close = [of_folded[folded] for folded in get_close_matches(value.casefold(), of_folded, n=NUM_EXAMPLES)]
    if close:
        return f"close to it: {', '.join(map(_cut, close))}"
    return f"there are {', '.join(map(_cut, values[:10]))}{', …' if len(values) > 10 else ''}"


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 1] + "…"
