"""The terminal: what a command prints reaches it whatever its encoding, and what is no longer there to be reached; warnings."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress

_GONE = (errno.EPIPE, errno.EIO)
"""What writing says when the reader of a pipe has ended, and when a terminal has hung up."""


def open_streams(*, outlive_readers: bool) -> None:
    """Make stdout and stderr fit for texts with any character; one that the reader's encoding lacks is written as \\xb7.

    A stream that was closed leads nowhere, so that no file gets its number and what libraries print. Where the command is to
    outlive its readers, as a training whose record is in files, a stream whose reader has gone leads nowhere from then on.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        _open_if_closed(descriptor)
        stream = getattr(sys, name)
        if stream is None:  # it was closed when the interpreter started
            stream = open(descriptor, "r" if descriptor == 0 else "w", closefd=False)  # noqa: SIM115 -- for as long as the process
            setattr(sys, name, stream)
        if descriptor == 0 or not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="backslashreplace")
        if outlive_readers and _descriptor_of(stream) == descriptor:
            stream.flush()
            raw = io.BufferedWriter(_Outliving(descriptor))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))


def warn(text: str) -> None:
    """Say on stderr what the user should know, and what does not end the run."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class _Outliving(io.FileIO):
    """A descriptor that leads nowhere once nobody reads from it."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, content: object) -> int:
        assert isinstance(content, bytes | bytearray | memoryview)
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(content)


def _open_if_closed(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, descriptor)
        if nowhere != descriptor:
            os.close(nowhere)
        os.set_inheritable(descriptor, True)


def _descriptor_of(stream: io.TextIOWrapper) -> int:
    with suppress(OSError):
        return stream.fileno()
    return -1
