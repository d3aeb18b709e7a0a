"""The splits that a source's records state: each is one of three, and all records state one or none does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aplantida_dist.data.manifest import SPLITS
from aplantida_dist.errors import UserError
from aplantida_dist.shards.source import SPLIT_OF_WORD


class StatedSplitsError(UserError):
    """A split that is none, or records of which only some state one."""


@dataclass
class StatedSplits:
    """What is counted while the records stream by: the splits that were stated, and how many records state one or none."""

    stated: set[str] = field(default_factory=set)
    num_with: int = 0
    num_without: int = 0

    def split_of(self, word: Any, *, place: str) -> str | None:
        """The split that a record means by its `split`, None where it has none; `place` names the record in the error."""
        if word is None:
            self.num_without += 1
            return None
        if not isinstance(word, str) or word not in SPLIT_OF_WORD:
            raise StatedSplitsError(
                f"{place}: split {word!r}, expected one of {', '.join(SPLIT_OF_WORD)}; correct it or leave it out"
            )
        self.num_with += 1
        self.stated.add(SPLIT_OF_WORD[word])
        return SPLIT_OF_WORD[word]

    def decided(self, *, source: str) -> tuple[str, ...]:
        """The splits that the source decides, once all is read. Raises StatedSplitsError where only some records state one."""
        if self.num_with and self.num_without:
            raise StatedSplitsError(
                f"{source}: {self.num_with:,} records carry a split and {self.num_without:,} do not; "
                "give every record its 'split', or none, or give them as several sources"
            )
        return tuple(split for split in SPLITS if split in self.stated)
