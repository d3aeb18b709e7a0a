"""The one error that a user can mend, and how a command reports it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake that the reader of the message can mend.

    The text says where, what was found, what was expected and what to do. Commands print it as one line on stderr and
    exit with code 2; it never comes with a traceback. The more specific errors live beside what raises them.
    """


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit: 0 when it is done, 2 for a `UserError` (one line on stderr), 130 for Ctrl-C."""
    try:
        code = command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); closing stderr keeps the interpreter from complaining at exit.
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code or 0)
