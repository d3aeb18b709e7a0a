"""Progress on the main process's screen: one bar on a terminal, plain lines now and then elsewhere. Only importer of tqdm."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from tqdm import tqdm

BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]"

LINE_EVERY_S = 10.0
"""Off a terminal, a line at most this often; a log file of a week stays readable."""


class Progress(Protocol):
    """What the loop tells of itself."""

    def advance(self, step: int, *, epoch: int, facts: dict[str, str]) -> None:
        """Say that `step` steps are done. `epoch` counts from 1 here."""

    def say(self, text: str) -> None:
        """Print one line, without tearing a bar."""

    def close(self) -> None:
        """Leave the screen in order."""


class NullProgress:
    """The other ranks' progress: silence."""

    def advance(self, step: int, *, epoch: int, facts: dict[str, str]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Bar:
    """A tqdm bar over the run's steps, on stderr. It appears with the first step, below what was said before."""

    def __init__(self, *, first_step: int, total_steps: int) -> None:
        self._first_step = first_step
        self._total_steps = total_steps
        self._bar: tqdm | None = None

    def advance(self, step: int, *, epoch: int, facts: dict[str, str]) -> None:
        if self._bar is None:
            self._bar = tqdm(
                initial=self._first_step, total=self._total_steps, dynamic_ncols=True, bar_format=BAR_FORMAT
            )
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        self._bar.set_postfix(facts, refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Lines:
    """Lines on stdout, at most one in LINE_EVERY_S, and one at the end."""

    def __init__(self, *, total_steps: int) -> None:
        self._total_steps = total_steps
        self._last_line_s = -LINE_EVERY_S

    def advance(self, step: int, *, epoch: int, facts: dict[str, str]) -> None:
        now_s = time.monotonic()
        if now_s - self._last_line_s < LINE_EVERY_S and step < self._total_steps:
            return
        self._last_line_s = now_s
        self.say(
            f"epoch {epoch} · step {step}/{self._total_steps} · "
            + " · ".join(f"{name} {fact}" for name, fact in facts.items())
        )

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        """Lines leave nothing open."""


def open_progress(*, is_main: bool, first_step: int, total_steps: int) -> Progress:
    """The progress that fits this process and its screen."""
    if not is_main:
        return NullProgress()
    if sys.stderr.isatty():
        return Bar(first_step=first_step, total_steps=total_steps)
    return Lines(total_steps=total_steps)
