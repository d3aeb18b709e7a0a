"""How a command of the project speaks: its arguments, its one-line errors, its exit codes."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from aplantida_dist.credentials import without_credentials
from aplantida_dist.errors import UserError
from aplantida_dist.signals import INTERRUPTED_CODE
from aplantida_dist.terminal import open_streams


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose help ends with an example and whose complaint is one line."""

    def __init__(self, *, prog: str, description: str, example: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found, instead of printing the usage over several lines."""
        raise UserError(f"{message}; see {self.prog} --help")


def count(text: str) -> int:
    """Read a positive whole number from the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive whole number")
    return int(text)


def positive(text: str) -> float:
    """Read a finite number above 0 from the command line."""
    value = _number(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
    return value


def share(text: str) -> float:
    """Read a number from 0 to 1 from the command line."""
    value = _number(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 0 to 1")
    return value


def _number(text: str) -> float:
    """The number that a text states; NaN, which fits no bounds, where it states none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def run_command(command: Callable[[], int | None], *, outlives_readers: bool = False) -> NoReturn:
    """Run a command and exit: with its own code or 0 when it is done, 2 for a `UserError` (one line on stderr), 130 for Ctrl-C.

    One whose output nobody reads any more ends, unless it is one that outlives its readers.
    """
    open_streams(outlive_readers=outlives_readers)
    try:
        code = command()
    except UserError as error:
        if not error.is_told_elsewhere:
            print(f"error: {without_credentials(str(error))}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED_CODE)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); closing stderr keeps the interpreter from complaining at exit.
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code or 0)
