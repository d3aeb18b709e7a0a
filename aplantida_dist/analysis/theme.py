"""The colours of a plot, for light and for dark surroundings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """Hue 0 is a lone run's train curve, the others are runs; they differ in lightness too, for eyes that mix colours up."""

    paper: str
    ink: str
    soft: str
    grid: str
    alarm: str
    hues: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1d2a24",
    soft="#66736c",
    grid="#e6eae7",
    alarm="#c0392b",
    hues=("#8aa39a", "#1f7a4d", "#d9822b", "#3b5fa8", "#a1397f", "#8c7a0e"),
)
DARK = Theme(
    paper="#151b18",
    ink="#e8eeea",
    soft="#93a29a",
    grid="#2a332e",
    alarm="#ff7b6b",
    hues=("#7f978d", "#54c98b", "#f0a25c", "#8fb0f2", "#dd92c8", "#d8c558"),
)
