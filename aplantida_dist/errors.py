"""The one error that a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the reader of the message can mend.

    The text says where, what was found, what was expected and what to do. Commands print it as one line on stderr and
    exit with code 2; it never comes with a traceback. The more specific errors live beside what raises them.
    """

    is_told_elsewhere = False
    """Whether another process prints it: of an error that all ranks meet, the main process alone speaks."""
