"""Credentials in URLs, `https://user:password@host/` and `https://host/?token=…`: known wherever they stand, so that no log, report or record shows them."""

from __future__ import annotations

import re

_USER_INFO = re.compile(r"(?<=://)[^/?#\s]*@")
_TOLD_USER_INFO = re.compile(r"(?<=:/)(/?)[^/?#\s]*@")
"""Of a URL that was taken for a path on the way, which has lost a slash, too."""
_WORD = re.compile(r"\S+")
_PARAMETER = re.compile(r"(?:[?#&;]|%26)([^=&;#?\s]+)=[^&;#\s]", re.IGNORECASE)
_SECRET_PARAMETER = re.compile(
    r"(?:^|[-_.])(?:(?:access|api|auth|account|private|secret|shared)?key|key-?pair-?id|awsaccesskeyid|googleaccessid|"
    r"\w*token|\w*signature|sig|sign|\w*secret|\w*passw(?:or)?d|pwd|auth|authorization|credentials?|jwt|sas|policy|hmac)(?:$|[-_.])",
    re.IGNORECASE,
)
"""The names under which object stores and web services take what lets a caller in: X-Amz-Signature, access_token, sig, key, …"""
_CLOSING = "'\"`)]}>,;:."


def has_credentials(text: str) -> bool:
    """Whether a URL in the text names a user, with a password or without, or has a parameter named as one that lets its bearer in.

    Other parameters are part of an address: `?id=7&size=large`.
    """
    if "://" not in text:
        return False
    queries = [found[0][_end_of_address(found[0]) - 1 :] for found in _WORD.finditer(text)]
    names = [name for query in queries for name in _PARAMETER.findall(query)]
    return _USER_INFO.search(text) is not None or any(map(_SECRET_PARAMETER.search, names))


def without_credentials(text: str) -> str:
    """The text with `***@` in the place of each URL's user and password, and `***` in that of all that follows its `?` or `#`.

    Of a query nothing is told, since no list of names has all those of secrets.
    """
    return _WORD.sub(_without_query, _TOLD_USER_INFO.sub(r"\1***@", text))


def _without_query(found: re.Match[str]) -> str:
    word = found[0]
    end = _end_of_address(word)
    query = word[end:]
    return f"{word[:end]}***{query[len(query.rstrip(_CLOSING)) :]}" if query.rstrip(_CLOSING) else word


def _end_of_address(word: str) -> int:
    """Where the query or fragment of a URL in a word begins, behind its mark; the word's length where there is none.

    Searched once from the front, and not by one expression, whose time would grow with the square of the text.
    """
    url = word.find(":/")
    marks = [place for mark in "?#" if url >= 0 and (place := word.find(mark, url)) >= 0]
    return min(marks) + 1 if marks else len(word)
