"""Files written whole or not at all, and digests of what they hold."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from aplantida_dist.errors import UserError


def canonical_json(content: Any) -> bytes:
    """Encode content so that equal content gives equal bytes. NaN and infinities are refused with ValueError."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(content: Any) -> str:
    """Return the sha256 (hex) of the canonical JSON of content."""
    return hashlib.sha256(canonical_json(content)).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside a file, to write and sync to: when the block ends it takes the file's name, when the block raises it goes.

    So after a crash at any point the file holds the old bytes or the new ones. Raises OSError.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file, whole or not at all (see `replacing`); the new bytes survive power loss."""
    try:
        with replacing(path) as beside, beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{path}: could not be written: {reason_of(error, path, num_bytes=len(content))}; make room or choose another folder"
        ) from error


def reason_of(error: OSError, path: Path, *, num_bytes: int) -> str:
    """Why `num_bytes` could not be written at a path; on a full disk, or beyond a quota, also how many those are, and how many are free.

    0 stands for a name alone: a disk can be full of names while bytes are free.
    """
    reason = error.strerror or type(error).__name__
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return reason
    needed = f"{num_bytes:,} bytes more" if num_bytes else "one more name"
    return f"{reason} ({needed} needed, {free_bytes(path):,} bytes free)"


def free_bytes(path: Path) -> int:
    """The room on the file system of a path, or of what is there of it."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def require_room(path: Path, num_bytes: int) -> None:
    """Raise the OSError of a full disk where fewer bytes are free than are to be written. A quota is not seen here."""
    if free_bytes(path) < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_json(path: Path, content: Any) -> None:
    """Write content as readable JSON, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, (text + "\n").encode())


class Readable(Protocol):
    """A path, or an address that is read like one."""

    def read_bytes(self) -> bytes: ...


def read_json(
    path: Readable, *, what: str, remedy: str, object_hook: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """Read a JSON file; `what` names it and `remedy` says what to do, should it be absent or broken. `object_hook` is that of `json`."""
    try:
        raw = path.read_bytes()
        content = json.loads(raw, object_hook=object_hook)
        # Half a surrogate pair can be stated, and is no text that could be written again. What a hook made has none.
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(content, ensure_ascii=False, default=repr).encode()
        return content
    except FileNotFoundError:
        raise UserError(f"{path}: no {what} here; {remedy}") from None
    except RecursionError:
        raise UserError(f"{path}: not readable as a {what}: it is nested too deep; {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as a {what}: {error}; {remedy}") from error


def append_line(path: Path, line: bytes) -> None:
    """Append one line and sync it to disk before returning. A disk that is full may keep a part of it: UserError."""
    try:
        with path.open("ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = reason_of(error, path, num_bytes=len(line) + 1)
        raise UserError(f"{path}: no line could be added: {reason}; make room") from error


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside a folder survive power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
