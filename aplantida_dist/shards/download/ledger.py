"""The ledger of a folder of pictures: which URLs failed for good, so that no later run asks their servers again."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from aplantida_dist.errors import UserError
from aplantida_dist.files import append_line, canonical_json
from aplantida_dist.shards.download.failure import Failure
from aplantida_dist.shards.lines import MAX_LINE_BYTES, Line, LineError, read_lines

LEDGER_FILE = "download.jsonl"


class LedgerError(UserError):
    """A ledger that cannot be kept."""


class Ledger:
    """The lasting failures by URL, and the file that remembers them. A line that is deleted from it is asked for again."""

    def __init__(self, path: Path, failures: dict[str, Failure]) -> None:
        self.path = path
        self.failures = failures

    def remember(self, url: str, failure: Failure) -> None:
        """Write a lasting failure, synced to disk. UserError where that cannot be done."""
        entry = {
            "url": url,
            "status": failure.status,
            "reason": failure.reason,
            "detail": failure.detail,
            "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        append_line(self.path, canonical_json(entry))


@contextmanager
def open_ledger(image_dir: Path) -> Iterator[Ledger]:
    """Read the ledger of a folder, and hold the folder against a second download; the lock ends with the process.

    A last line that a crash cut is dropped. Raises LineError for any other line that is none, LedgerError where another
    download holds the folder or no file can be kept there.
    """
    path = image_dir / LEDGER_FILE
    try:
        file = path.open("ab+")
    except OSError as error:
        raise LedgerError(
            f"{path}: cannot be written: {error.strerror}; choose another folder as --image-dir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LedgerError(
                f"{path}: is in use by another download ({error.strerror}); wait for it or stop it"
            ) from error
        _drop_cut_line(path)
        yield Ledger(path, dict(map(_entry_of, read_lines(path))))


def _drop_cut_line(path: Path) -> None:
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - MAX_LINE_BYTES))
        tail = file.read()
        if not tail.endswith(b"\n"):
            file.truncate(start + tail.rfind(b"\n") + 1)


def _entry_of(line: Line) -> tuple[str, Failure]:
    url, reason, detail, status = (line.content.get(field) for field in ("url", "reason", "detail", "status"))
    if not (isinstance(url, str) and isinstance(reason, str) and isinstance(detail, str)):
        raise LineError(f"{line.place}: no 'url' with a 'reason' and a 'detail'; delete the line to ask for it again")
    return url, Failure("lasting", reason, detail, status if isinstance(status, int) else None)
