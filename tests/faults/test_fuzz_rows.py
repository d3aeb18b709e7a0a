"""Fuzz at length: thousands of damaged files a reader by hypothesis, and by atheris, which goes by the lines that an input reaches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz_targets import MAX_INPUT_MEMORY_BYTES, NAMES, fuzzed, inputs_of, reader_of

Fired = Callable[[str], None]
ROOT = Path(__file__).parents[2]
NUM_INPUTS = int(os.environ.get("FUZZ_INPUTS", "5000"))
"""A reader's; 5 ms each."""
GUIDED = ("config", "manifest", "index", "history", "jpeg")
NUM_GUIDED_INPUTS = int(os.environ.get("GUIDED_FUZZ_INPUTS", "10000"))
MAX_PROCESS_MIB = 1536
"""Of the whole guided process, half of which are torch and the other libraries."""
MAX_INPUT_S = 30
"""A thousand times what an input takes."""


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.fault(
    what="any bytes where a file of ours is expected",
    how="hypothesis: raw bytes, accidents to whole files, other values in JSON",
    holds="read, or refused by the typed error; the memory of one input is bounded",
)
def test_every_reader_reads_or_refuses_for_long(whole_files: Path, tmp_path: Path, name: str, fired: Fired) -> None:
    """FUZZ_INPUTS says how many inputs; what a process keeps of them is hypothesis's own, so each one's memory is counted."""
    told = fuzzed(reader_of(name, whole_files), inputs_of(name, whole_files), tmp_path, max_examples=NUM_INPUTS)
    assert told["read"] + told["refused"] >= NUM_INPUTS
    assert told["refused"] > NUM_INPUTS // 10
    assert told["most_memory_bytes"] < MAX_INPUT_MEMORY_BYTES
    fired(
        f"{name}: {told['read'] + told['refused']:,} inputs, {told['refused']:,} refused, "
        f"at most {told['most_memory_bytes'] / 2**20:.1f} MiB for one"
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.fault(
    what="any bytes where a file of ours is expected, made to reach every line of its reader",
    how="atheris in a process of its own, from the corpus and whole files",
    holds="read, or refused by the typed error; memory and time are bounded",
)
def test_no_guided_input_breaks_a_reader(whole_files: Path, tmp_path: Path, name: str, fired: Fired) -> None:
    """GUIDED_FUZZ_INPUTS says how many. What breaks a reader is told whole, to be put into the corpus."""
    finished = guided(name, whole_files, tmp_path, num_inputs=NUM_GUIDED_INPUTS)
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert (finished.returncode, found) == (0, {}), finished.stderr[-3000:]
    (done,) = re.findall(r"Done (\d+)", finished.stderr)
    peak_mib = max(map(int, re.findall(r"rss: (\d+)Mb", finished.stderr)))
    assert int(done) == NUM_GUIDED_INPUTS
    fired(f"{name}: {int(done):,} inputs, {peak_mib} MiB at most")


@pytest.mark.slow
def test_the_guided_fuzz_can_fail(whole_files: Path, tmp_path: Path) -> None:
    """A bug behind two words of four bytes, which no accident writes, is found and kept."""
    finished = guided("planted", whole_files, tmp_path, num_inputs=2_000_000, options=("-max_len=16",))
    assert finished.returncode != 0
    assert "IndexError: planted" in finished.stderr + finished.stdout
    assert [path.read_bytes()[:8] for path in tmp_path.glob("crash-*")] == [b"RIFFCRYX"]


def guided(
    name: str, whole_files: Path, found_dir: Path, *, num_inputs: int, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Let atheris feed a reader, from the same seed every time."""
    pytest.importorskip("atheris", reason="atheris has no wheel for this machine")
    command = [sys.executable, "-m", "tests.guided_fuzz", name, whole_files, found_dir]
    limits = [f"-rss_limit_mb={MAX_PROCESS_MIB}", f"-timeout={MAX_INPUT_S}"]
    return subprocess.run(
        [*command, f"-runs={num_inputs}", "-seed=1", *limits, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
