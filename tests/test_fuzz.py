"""Fuzz: whatever bytes stand where a file of ours is expected, the reader reads them or raises the typed error, within a bound of memory.

Here 200 inputs a reader, the same ones every time; `tests/faults/test_fuzz_rows.py` tries thousands, and has atheris guide others.
What was ever found stands in tests/corpus/, a folder a reader, and is read in every run.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from tests import fuzz
from tests.fuzz_targets import CORPUS, MAX_INPUT_MEMORY_BYTES, NAMES, careless, fuzzed, inputs_of, outcome, reader_of

QUICK = 200
MAX_MEMORY_BYTES = 192 * 2**20
"""Of Python's own allocations for one input; the largest input is 0.5 MB. Headers of soft labels may take 64 MiB."""


@pytest.mark.parametrize("name", NAMES)
def test_every_reader_reads_or_refuses(whole_files: Path, tmp_path: Path, name: str) -> None:
    """200 inputs each, the same every time, and never more memory than a bound."""
    tracemalloc.start()
    try:
        told = fuzzed(reader_of(name, whole_files), inputs_of(name, whole_files), tmp_path, max_examples=QUICK)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert told["refused"] > QUICK // 10, "nothing that is damaged came through"
    assert peak_bytes < MAX_MEMORY_BYTES
    assert told["most_memory_bytes"] < MAX_INPUT_MEMORY_BYTES


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_stays_found(whole_files: Path, tmp_path: Path, path: Path) -> None:
    """Every input that ever broke a reader is read, or refused by the typed error."""
    outcome(reader_of(path.parent.name, whole_files), path.read_bytes(), tmp_path)


def test_the_fuzz_can_fail(tmp_path: Path) -> None:
    """A reader that lets one kind of accident through is found within the quick number of inputs."""
    with pytest.raises(RecursionError):
        fuzzed(careless, fuzz.damaged_bytes(b'{"a": 1}'), tmp_path, max_examples=QUICK)
