"""A verdict: what a history shows to be wrong or right, with the numbers that show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note", "good"]


@dataclass(frozen=True)
class Verdict:
    """One finding about a run.

    `evidence` is a sentence with the numbers, `meaning` what they imply, `remedy` what to do; a remedy may be empty.
    error: the numbers do not mean what they say. warning: the training goes wrong. note: worth knowing.
    """

    severity: Severity
    name: str
    evidence: str
    meaning: str
    remedy: str = ""
