"""The condition of a subset: which values a field of a photograph's KEY.json must have, or must not."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from typing import Any

from aplantida_dist.errors import UserError

_CONDITION = re.compile(r"(?P<field>[^=!]+)(?P<sign>!?=)(?P<values>.*)", re.DOTALL)


class WhereError(UserError):
    """A condition that cannot be read, or that names what no photograph has."""


@dataclass(frozen=True)
class Condition:
    """A photograph meets it when its `field` is one of `values`, or with `is_negated` when it is none of them.

    So FIELD=VALUE and FIELD!=VALUE part every dataset in two: a photograph without the field meets the second. `text` is how
    the condition was written.
    """

    text: str
    field: str
    values: tuple[str, ...]
    is_negated: bool

    def is_met_by(self, metadata: dict[str, Any]) -> bool:
        return (text_of(metadata.get(self.field)) in self.values) != self.is_negated


def parse_condition(text: str) -> Condition:
    """Read FIELD=VALUE[,VALUE…] or FIELD!=VALUE[,VALUE…]. A value that holds a comma stands in double quotes. Raises WhereError."""
    parts = _CONDITION.fullmatch(text)
    if parts is None:
        raise WhereError(
            f"--where {text!r}: expected FIELD=VALUE[,VALUE…] or FIELD!=VALUE[,VALUE…], as in region=EU_SW"
        )
    try:
        rows = list(csv.reader([parts["values"]], strict=True))
    except csv.Error as error:
        raise WhereError(
            f"--where {text}: the values cannot be read: {error}; put one that holds a comma in double quotes"
        ) from None
    values = tuple(dict.fromkeys(value for row in rows for value in row))
    if not values or "" in values:
        raise WhereError(
            f"--where {text}: a value is empty; give FIELD=VALUE[,VALUE…] without blanks around the commas"
        )
    return Condition(text, parts["field"], values, parts["sign"] == "!=")


def text_of(value: Any) -> str | None:
    """The value of a field as conditions compare it: text as it is, all else as its JSON; None for null and for empty text."""
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
