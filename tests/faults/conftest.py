"""The matrix of faults: each test says what breaks, how, and what must hold; a fault that did not fire is no test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PAGE_VARIABLE = "FAULTS_PAGE"
"""Names the page that the run writes: `make faults` sets it to docs/faults.md."""
HEAD = """\
# Faults

What was broken on purpose, what held, and the figure of it. Written by `make faults` from the tests in `tests/faults/`; each row is a test that has
seen its fault fire.

| fault | how it is made | what holds | figure | test |
|---|---|---|---|---|
"""

Fired = Callable[[str], None]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(what, how, holds): a row of docs/faults.md")


@pytest.fixture
def fired(request: pytest.FixtureRequest) -> Iterator[Fired]:
    """To be called once the fault's own marker has been seen, with the figure of the row; a test that never does fails."""
    properties: list[tuple[str, object]] = request.node.user_properties
    yield lambda figure: properties.append(("figure", figure))
    assert "figure" in dict(properties), "the fault never fired, so nothing was tested"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every row needs its marker seen."""
    for item in items:
        mark = item.get_closest_marker("fault")
        if mark is None:
            continue
        assert sorted(mark.kwargs) == ["holds", "how", "what"], f"{item.nodeid}: fault(what=, how=, holds=)"
        assert "fired" in getattr(item, "fixturenames", ()), f"{item.nodeid}: has a fault and never sees it fire"
        item.user_properties.append(("fault", [mark.kwargs[name] for name in ("what", "how", "holds")]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write the page, if one is asked for: the rows in the order of their files, whatever process ran them."""
    page = os.environ.get(PAGE_VARIABLE)
    if page is None:
        return
    rows: dict[str, str] = {}
    # A test that passes and then fails in its teardown is told twice, so the failures come last.
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            told = dict(report.user_properties)
            if "fault" in told:
                figure = told.get("figure", "") if outcome == "passed" else "**FAILED**"
                name = report.nodeid.removeprefix("tests/faults/")
                rows[name] = f"| {' | '.join([*told['fault'], figure, f'`{name}`'])} |\n"
    Path(page).write_text(HEAD + "".join(rows[name] for name in sorted(rows)), encoding="utf-8")
