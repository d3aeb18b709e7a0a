"""What a plain word of YAML means, or why it is refused: only words that YAML 1.1, YAML 1.2 and people read alike pass."""

from __future__ import annotations

import math
import re
from typing import Any

_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("null", "Null", "NULL", "~")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]*)\.[0-9]+([eE][-+][0-9]+)?")
_LIKE_A_NUMBER = re.compile(r"([-+]?)(?=\.?[0-9])([0-9_]*)\.?([0-9_]*)(?:[eE]([-+]?)([0-9]+))?")
_OBJECTIONS = tuple(
    (re.compile(pattern, re.IGNORECASE), reason)
    for pattern, reason in (
        ("", "which means null to some and nothing to others; write null, or a value"),
        ("y|yes|on", 'which some readers take for true and others for text; write true, or "{text}" in quotes'),
        ("n|no|off", 'which some readers take for false and others for text; write false, or "{text}" in quotes'),
        ("none|nil", 'which YAML reads as text; write null, or "{text}" in quotes'),
        (r"[-+]?\.?(inf|infinity|nan)", 'but numbers are finite here; write a number, or "{text}" in quotes'),
        (r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([t ].*)?", 'which some readers take for a date; write "{text}" in quotes'),
        (r"[-+]?[0-9]+(:[0-9]+)+(\.[0-9]*)?", 'which some readers take for base 60; write "{text}" in quotes'),
        (r"[-+]?0[xob][0-9a-f_]+", 'whose base readers disagree on; write a decimal number, or "{text}" in quotes'),
        (r"[-+]?0[0-9_]+", 'which some readers take for octal; write it without the leading 0, or "{text}" in quotes'),
        (r"[-+]?[0-9]+(,[0-9]+)+(\.[0-9]+)?", 'which YAML reads as text; write a decimal point, or "{text}" in quotes'),
        (r"[-+]?[1-9][0-9]{19,}", 'which is too large for a whole number; write a smaller one, or "{text}" in quotes'),
        ("=|<<", 'which is a command of YAML 1.1; write the keys out, or "{text}" in quotes'),
    )
)


def meaning(text: str) -> Any:
    """The value of a plain word that nobody objects to."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def objection(text: str) -> str | None:
    """Why a plain word is not read in one way only, and what to write; None where it is."""
    for pattern, reason in _OBJECTIONS:
        if pattern.fullmatch(text):
            return reason.format(text=text)
    if _FLOAT.fullmatch(text):
        return None if math.isfinite(float(text)) else "which is too large for a number; write a smaller one"
    parts = _LIKE_A_NUMBER.fullmatch(text)
    if not parts or _INTEGER.fullmatch(text):
        return None
    sign, whole, fraction, exponent_sign, exponent = (part or "" for part in parts.groups())
    whole, fraction = whole.replace("_", "").lstrip("0") or "0", fraction.replace("_", "")
    point = f".{fraction or '0'}" if "." in text or exponent else ""
    power = f"e{exponent_sign or '+'}{exponent}" if exponent else ""
    return f'which not every reader takes for a number; write {sign}{whole}{point}{power}, or "{text}" in quotes'
