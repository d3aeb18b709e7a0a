"""The members of a tar, listed down to its end mark; a tar that is not whole is never taken for a short one."""

from __future__ import annotations

import io
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from tarfile import TarInfo
from typing import Self

WINDOW_BYTES = 4096
MAX_EXTENDED_BYTES = 2**20
EXTENDED_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
"""Headers whose content tarfile reads at once: names and fields of the next member."""
_PLAIN_HEADER = re.compile(
    rb"(?P<name>.{100}).{24}(?P<size>[0-7]{11})[\0 ].{12}(?P<checksum>[0-7]{6})[\0 ]."
    rb"0.{100}ustar.{83}\0.{166}",
    re.DOTALL,
)
"""A header of 512 bytes: a regular file whose numbers are octal and whose name needs no prefix."""


@dataclass(frozen=True)
class TarMembers:
    """The members of a tar in its order, and where it stops being one; `fault` is None for a tar that is whole."""

    members: tuple[TarInfo, ...]
    fault: str | None


def read_tar_members(path: Path) -> TarMembers:
    """List the members of a shard, down to its end mark.

    tarfile and webdataset take a damaged header, or a cut between two members, for the end and say nothing; so what follows
    the last member must be two empty blocks at least and nothing else.
    """
    members: list[TarInfo] = []
    end, fault = 0, None
    num_bytes = path.stat().st_size
    try:
        with (
            path.open("rb", buffering=0) as file,
            tarfile.open(fileobj=_ByPosition(file), mode="r:", tarinfo=_QuickTarInfo, encoding="utf-8") as tar,
        ):
            for member in tar:
                if member.isreg() and not member.issparse() and member.offset_data + member.size > num_bytes:
                    fault = f"is cut at byte {num_bytes}: the member at byte {end} should have {member.size} bytes"
                    break
                members.append(member)
                end = tar.offset
    except (tarfile.TarError, OSError, ValueError, LookupError, ArithmeticError) as error:
        # tarfile reads the fields of a pax header without a guard.
        fault = f"is no tar from byte {end} on: {error}"
    return TarMembers(tuple(members), fault or _fault_of_end(path, end))


def _fault_of_end(path: Path, end: int) -> str | None:
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(tarfile.BLOCKSIZE)
        while not rest.strip(b"\0") and (more := file.read(1 << 20)):
            rest = rest[-tarfile.BLOCKSIZE :] + more
    if rest.strip(b"\0"):
        return f"holds no tar header at byte {end}; what follows cannot be read"
    if len(rest) < 2 * tarfile.BLOCKSIZE:
        return f"is cut at byte {end}: the end mark of the tar is missing"
    return None


class _ByPosition(io.RawIOBase):
    """A file for tarfile, which seeks, tells and reads five times a member: the system is asked once for neighbouring headers."""

    def __init__(self, file: io.FileIO) -> None:
        self._descriptor = file.fileno()
        self._num_bytes = os.fstat(self._descriptor).st_size
        self._position = 0
        self._window, self._window_start = b"", 0

    def read(self, size: int = -1) -> bytes:
        # No more than is there: memory is taken before the system is asked.
        size = min(size, max(self._num_bytes - self._position, 0))
        start = self._position - self._window_start
        if not 0 <= start <= len(self._window) - size:
            self._window = os.pread(self._descriptor, max(size, WINDOW_BYTES), self._position)
            self._window_start, start = self._position, 0
        content = self._window[start : start + size]
        self._position += len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position


class _QuickTarInfo(TarInfo):
    """Reads the header of a plain USTAR or GNU file in a quarter of the time, and leaves every other to its parent.

    Three headers a sample were most of the time of indexing a tar. Owner, mode and time stay unread.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        plain = _PLAIN_HEADER.fullmatch(buf)
        if plain is None or sum(buf) - sum(buf[148:156]) + 8 * ord(" ") != int(plain["checksum"], 8):
            member = super().frombuf(buf, encoding, errors)
            if member.size > MAX_EXTENDED_BYTES and member.type in EXTENDED_TYPES:
                raise tarfile.ReadError(f"a header states a name or fields of {member.size} bytes")
            return member
        member = cls(plain["name"].partition(b"\0")[0].decode(encoding, errors))
        member.size = int(plain["size"], 8)
        return member

    def _block(self, count: int) -> int:
        # Of a negative size tarfile makes a step back, without end (CVE-2025-8194, mended in Python 3.11.14).
        if count < 0:
            raise tarfile.ReadError(f"a header states {count} bytes")
        return -(-count // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
