"""A place: where the bytes of a picture lie, a whole file or a stretch of one."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """The file at `path`, whole, or `num_bytes` of it from `offset` on: a member of a tar."""

    path: str
    offset: int = 0
    num_bytes: int | None = None

    def __str__(self) -> str:
        return self.path if self.num_bytes is None else f"{self.path} at byte {self.offset:,}"

    def size(self) -> int | None:
        """How many bytes lie here, without reading them; None where it is not a plain file. Raises OSError."""
        status = os.stat(self.path)
        if not stat.S_ISREG(status.st_mode):
            return None
        return status.st_size if self.num_bytes is None else self.num_bytes

    def read(self) -> bytes:
        """The bytes; fewer than `num_bytes` where the file ends before. Raises OSError."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            return file.read(self.num_bytes)
