"""The names that the numbers of others stand for: a classes.json, or a file of one name a line."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from aplantida_dist.data.classmap import load_class_map
from aplantida_dist.errors import UserError


class ClassNamesError(UserError):
    """A file that does not give each number one name of its own."""


def class_name_of(text: str) -> str:
    """A class as sources may write it: runs of white space are one blank, Unicode NFC."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def read_class_names(path: Path) -> tuple[str, ...]:
    """The class names by their numbers from 0: of a classes.json (by its suffix .json), else the lines of a text file.

    Raises ClassNamesError for an empty line, which would be a number without a name, and for a name that stands twice.
    """
    if path.suffix.lower() == ".json":
        return tuple(map(class_name_of, load_class_map(path).class_names))
    try:
        names = [class_name_of(line) for line in path.read_text(encoding="utf-8").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ClassNamesError(
            f"{path}: cannot be read: {error}; give a classes.json or one name a line, in UTF-8"
        ) from error
    line_of_name: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            raise ClassNamesError(f"{path}: line {number} is empty; give one name a line, that of number 0 first")
        if line_of_name.setdefault(name, number) != number:
            raise ClassNamesError(
                f"{path}: {name!r} stands on lines {line_of_name[name]} and {number}, and would make one class of two; "
                "tell them apart"
            )
    return tuple(names)
