"""The table of findings as plain text, and the facts of the machine that they were made on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from bench.finding import Finding

HEADINGS = ("what", "unit", "ours", "peer", "peer's name", "ratio", "goal", "reached")
NUMERIC = frozenset({"ours", "peer", "ratio"})
PACKAGES = ("torch", "torchvision", "timm", "webdataset", "torchmetrics", "accelerate", "pillow", "numpy")


def to_text(findings: Sequence[Finding]) -> str:
    """One line a finding, columns aligned."""
    lines = [HEADINGS, *(_cells(finding) for finding in findings)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if heading in NUMERIC else cell.ljust(width)
            for cell, width, heading in zip(line, widths, HEADINGS, strict=True)
        ).rstrip()
        for line in lines
    )


def machine_facts() -> str:
    """When and on what: two lines. Other processes' load is told, because it moves every wall time."""
    now = datetime.now(UTC).isoformat(timespec="minutes")
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    load = os.getloadavg()[0]
    return (
        f"{now}, {platform.machine()}, {os.cpu_count()} CPUs, load {load:.1f}, Python {platform.python_version()}\n"
        f"{packages}"
    )


def _cells(finding: Finding) -> tuple[str, ...]:
    return (
        finding.what,
        finding.unit,
        _number(finding.ours),
        "–" if finding.peer is None else _number(finding.peer),
        finding.peer_name or "–",
        "–" if finding.ratio is None else f"{finding.ratio:.3f}",
        f"{finding.goal.kind} {finding.goal.limit:g}",
        "yes" if finding.is_reached else "NO",
    )


def _number(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"
