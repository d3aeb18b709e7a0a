"""Work: what it took to make micro-batches, which travels with each of them from the process that made it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Pictures made, padding included; nanoseconds of one process to make them, and of these to read; bytes of pictures read.

    Reading ends when the bytes of a picture are in memory and checked, a shard that had to be opened or brought first included.
    The rest of the time is decoding and augmenting.
    """

    num_images: int = 0
    working_ns: int = 0
    reading_ns: int = 0
    read_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.num_images + other.num_images,
            self.working_ns + other.working_ns,
            self.reading_ns + other.reading_ns,
            self.read_bytes + other.read_bytes,
        )
