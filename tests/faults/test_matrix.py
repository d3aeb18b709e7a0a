"""The matrix itself: a fault that was not seen to fire fails, and the page says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROWS = """\
import pytest

@pytest.mark.fault(what="a kill", how="by hand", holds="everything")
def test_seen(fired):
    fired("3 of 3")

@pytest.mark.fault(what="a silence", how="not at all", holds="nothing")
def test_unseen(fired):
    pass

@pytest.mark.fault(what="a break", how="by hand", holds="nothing")
def test_broken(fired):
    fired("1 of 1")
    raise AssertionError
"""


def test_a_fault_that_never_fires_fails_and_the_page_says_so(tmp_path: Path) -> None:
    """A real run of pytest over three rows: one held, one never seen, one broken."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_rows.py").write_text(ROWS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path]
    finished = subprocess.run(
        command,
        env={**os.environ, "FAULTS_PAGE": str(tmp_path / "page.md")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 failed, 2 passed, 1 error" in finished.stdout
    assert "the fault never fired, so nothing was tested" in finished.stdout
    rows = [line for line in (tmp_path / "page.md").read_text().splitlines() if "test_rows.py" in line]
    assert rows == [
        "| a break | by hand | nothing | **FAILED** | `test_rows.py::test_broken` |",
        "| a kill | by hand | everything | 3 of 3 | `test_rows.py::test_seen` |",
        "| a silence | not at all | nothing | **FAILED** | `test_rows.py::test_unseen` |",
    ]
