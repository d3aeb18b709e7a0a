"""Credentials in URLs: `https://user:password@host/` is known wherever it stands, so that no log, report or record shows it."""

from __future__ import annotations

import re

_USER_INFO = re.compile(r"(?<=://)[^/?#\s]*@")
_TOLD_USER_INFO = re.compile(r"(?<=:/)(/?)[^/?#\s]*@")
"""Of a URL that was taken for a path on the way, which has lost a slash, too."""


def has_credentials(text: str) -> bool:
    """Whether a URL in the text names a user, with a password or without."""
    return "@" in text and _USER_INFO.search(text) is not None


def without_credentials(text: str) -> str:
    """The text with `***@` in the place of each URL's user and password."""
    return _TOLD_USER_INFO.sub(r"\1***@", text)
