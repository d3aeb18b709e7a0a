"""The ledger of bad samples: what was void because it could not be delivered, one line each, and the budget that bounds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from aplantida_dist.data.bad_sample import BadSample
from aplantida_dist.errors import UserError
from aplantida_dist.files import append_line, write_whole

LEDGER_FILE = "bad_samples.jsonl"
MOST_NAMED = 5
"""Shards, and classes, that a message counts by name; the others it counts together."""


class BadSampleError(UserError):
    """More samples are bad than the config lets be void, or the ledger of them cannot be read."""


class Entry(BadSample):
    """One line of the ledger: a bad sample, in which epoch (from 1) and at which step (completed ones, this one included) it was void."""

    epoch: int
    step: int


def entries_of(bad: Iterable[BadSample], *, step: int, epoch: int) -> list[Entry]:
    """Bad samples as the ledger holds them: those of the last of `step` completed steps, or of an evaluation after it."""
    return [Entry(**sample.model_dump(), epoch=epoch, step=step) for sample in bad]


class BadSampleLedger:
    """The bad samples of a run, in the order of the steps, and their file. For the main process.

    `budget` bounds the different samples of all splits in the whole run: one that is met again in every epoch counts once.
    """

    def __init__(self, run_dir: Path, *, budget: int, class_names: Sequence[str]) -> None:
        self.path = run_dir / LEDGER_FILE
        self.budget = budget
        self.class_names = class_names
        self.entries = _read(self.path)

    def add(self, found: Iterable[Entry]) -> str:
        """Write what is new to disk, synced; returns what to say of it. Raises BadSampleError beyond the budget."""
        known = set(self.entries)
        new = [entry for entry in dict.fromkeys(found) if entry not in known]
        for entry in new:
            append_line(self.path, entry.model_dump_json().encode())
        self.entries += new
        different = {(entry.split, entry.sample_key): entry for entry in self.entries}
        if len(different) > self.budget:
            raise budget_error(
                different.values(), budget=self.budget, class_names=self.class_names, told_in=LEDGER_FILE
            )
        return self._told(new) if new else ""

    def lines_of(self, epoch: int) -> list[str]:
        """What an epoch's row calls void for this reason, a line a split."""
        here = [entry for entry in self.entries if entry.epoch == epoch]
        return [
            f"epoch {epoch}: {split}: {self._told(part)}"
            for split in dict.fromkeys(entry.split for entry in here)
            if (part := [entry for entry in here if entry.split == split])
        ]

    def cut_after(self, step: int) -> None:
        """Keep what was void up to a checkpoint's step; its resumed run meets the rest again."""
        self.entries = [entry for entry in self.entries if entry.step <= step]
        if self.path.exists():
            write_whole(self.path, "".join(f"{entry.model_dump_json()}\n" for entry in self.entries).encode())

    def _told(self, entries: Sequence[BadSample]) -> str:
        return f"{len(entries)} bad samples are void: {counts_text(entries, class_names=self.class_names)}; see {LEDGER_FILE}"


def counts_text(samples: Iterable[BadSample], *, class_names: Sequence[str]) -> str:
    """The samples counted per shard and per class, the most frequent first."""
    samples = list(samples)
    shards = Counter(f"{sample.split}/{sample.shard}" for sample in samples)
    classes = Counter(class_names[sample.label] for sample in samples)
    return f"{_counted(shards)}; of {_counted(classes)}"


def budget_error(
    samples: Iterable[BadSample], *, budget: int, class_names: Sequence[str], told_in: str = ""
) -> BadSampleError:
    """What ends a run, or an evaluation, of which more different samples are bad than the budget."""
    samples = list(samples)
    see = f"; {told_in} in the run folder names each" if told_in else ""
    return BadSampleError(
        f"{len(samples)} samples cannot be delivered, data.bad_sample_budget is {budget}: "
        f"{counts_text(samples, class_names=class_names)}; first {samples[0].sample_key} in {samples[0].split}/{samples[0].shard} at "
        f"offset {samples[0].offset}, which {samples[0].reason}{see}; run `python shards/verify.py` on the dataset and rebuild it "
        "without them, or raise the budget"
    )


def _counted(counts: Counter[str]) -> str:
    named = [f"{name} {count}" for name, count in counts.most_common(MOST_NAMED)]
    others = counts.total() - sum(count for _, count in counts.most_common(MOST_NAMED))
    return ", ".join(named) + (f" and {others} in {len(counts) - MOST_NAMED} others" if others else "")


def _read(path: Path) -> list[Entry]:
    """The entries of a ledger; a last line without its end was cut by a crash, and the resumed run writes it again."""
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            entries.append(Entry.model_validate_json(line))
        except ValidationError as error:
            raise BadSampleError(
                f"{path}: line {number} is no entry of the ledger: {error.errors()[0]['msg']}; restore the file, or delete it "
                "to count the bad samples anew"
            ) from None
    return entries
