"""The seal: a JSON object that holds the sha256 of all else in it, so that no byte of it changes unseen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aplantida_dist.files import digest

_KEY = "digest"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content, which must not hold a `digest` of its own, and its seal."""
    return {**content, _KEY: digest(dict(content))}


def has_seal(content: Mapping[str, Any]) -> bool:
    """Whether there is a seal at all; whether it holds only `unsealed` can tell."""
    return _KEY in content


def unsealed(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was sealed; None where the seal is not that of the content."""
    rest = {name: value for name, value in content.items() if name != _KEY}
    try:
        return rest if digest(rest) == content.get(_KEY) else None
    except (ValueError, RecursionError):  # NaN, half a surrogate pair, or too deep: no such thing was ever sealed
        return None
