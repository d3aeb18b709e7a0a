"""The tars that a text of the command line names: brace lists and patterns become paths, what is not here is refused."""

from __future__ import annotations

import glob
import math
import os
import re
from itertools import islice
from pathlib import Path
from urllib.parse import unquote_to_bytes

from braceexpand import braceexpand

from aplantida_dist.errors import UserError

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
MAX_TARS = 1_000_000
_STRETCH = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?\}")
_SCHEME = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9+.-]*)://|(?P<command>pipe):")


class TarUrlError(UserError):
    """A text that does not name tars that lie here."""


def expand_tar_urls(urls: str) -> tuple[Path, ...]:
    """The absolute paths of the tars that a text names, in its order: `{000..005}` and `{a,b}` expand, then `*`, `?` and `[a-z]`.

    Each is a path or a file:// URL. Raises TarUrlError for what lies elsewhere, is absent, compressed, or stands twice.
    """
    # braceexpand makes a list of each stretch before it yields the first name.
    stretches = [(int(first), int(last), int(step or 1)) for first, last, step in _STRETCH.findall(urls)]
    if math.prod(abs(last - first) // max(abs(step), 1) + 1 for first, last, step in stretches) > MAX_TARS:
        raise TarUrlError(f"{urls}: names more than {MAX_TARS:,} tars; give them as several --from-tars")
    try:
        expanded = list(islice(braceexpand(urls), MAX_TARS + 1))
    except ValueError:
        raise TarUrlError(f"{urls}: a brace without its partner; write a list as train-{{000..005}}.tar") from None
    if len(expanded) > MAX_TARS:
        raise TarUrlError(f"{urls}: names more than {MAX_TARS:,} tars; give them as several --from-tars")
    paths = [path for url in expanded for path in _matching(_local_path(url))]
    for path in paths:
        _require_tar(path)
    if len({os.path.realpath(path) for path in paths}) != len(paths):
        raise TarUrlError(f"{urls}: names a tar twice; name each once")
    return tuple(Path(path).absolute() for path in paths)


def _local_path(url: str) -> str:
    scheme = _SCHEME.match(url)
    if scheme is None:
        return url
    if scheme["command"]:
        raise TarUrlError(f"{url}: would run a command, which no build does; give the tar that it reads as a file")
    if scheme["name"].lower() != "file":
        raise TarUrlError(f"{url}: lies elsewhere, and only tars in this file system are read; fetch it first")
    path = os.fsdecode(unquote_to_bytes(url[len("file://") :]))
    if not path.startswith("/"):
        raise TarUrlError(f"{url}: names another machine; write file:///path/to.tar")
    return path


def _matching(path: str) -> list[str]:
    """The path itself, or where nothing has that very name, the sorted paths that it is a pattern of."""
    if os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    if found := sorted(glob.glob(path)):
        return found
    raise TarUrlError(f"{path}: matches no file; check the pattern")


def _require_tar(path: str) -> None:
    if os.path.isdir(path):
        raise TarUrlError(f"{path}: is a folder, not a tar; name its tars, as {path.rstrip('/')}/*.tar")
    if not os.path.isfile(path):
        raise TarUrlError(f"{path}: no such tar; check the name")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise TarUrlError(f"{path}: cannot be read: {error.strerror}; make it readable or leave it out") from error
    for magic, kind in COMPRESSED.items():
        if start.startswith(magic):
            raise TarUrlError(
                f"{path}: is compressed with {kind}, so no picture inside can be read by its place; decompress it first"
            )
