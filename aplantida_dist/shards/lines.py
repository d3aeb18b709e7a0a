"""Files of JSON objects, one a line, read line by line: none is skipped because it could not be understood."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aplantida_dist.errors import UserError
from aplantida_dist.files import canonical_json

MAX_LINE_BYTES = 2**20


class LineError(UserError):
    """A line that is not what its file should hold."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its number from 1, its bytes, and the object that it holds. `place` names it in errors."""

    place: str
    number: int
    raw: bytes
    content: dict[str, Any]


def read_lines(path: Path) -> Iterator[Line]:
    """Read the objects of a file one at a time, past empty lines.

    Raises LineError for a line that is longer than 1 MiB, no JSON object, or holds what UTF-8 JSON cannot (NaN, half a surrogate pair).
    """
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if raw.strip():
                    place = f"{path}: line {number}"
                    yield Line(place, number, raw, _parsed(raw, place=place))
    except OSError as error:
        raise LineError(f"{path}: cannot be read: {error.strerror}; give a file of one JSON object a line") from error


def _parsed(raw: bytes, *, place: str) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise LineError(f"{place}: longer than {MAX_LINE_BYTES} bytes; give one JSON object a line")
    try:
        content = json.loads(raw)
        canonical_json(content)
    except (ValueError, RecursionError) as error:
        raise LineError(f"{place}: is not JSON: {error}; correct the line or remove it") from None
    if not isinstance(content, dict):
        raise LineError(
            f"{place}: found {type(content).__name__}, expected a JSON object; correct the line or remove it"
        )
    return content
