"""Interruption: a signal that reached one rank, or all, as an end that all ranks reach at the same step."""

from __future__ import annotations

import signal
from collections.abc import Callable

from aplantida_dist.signals import Listener
from aplantida_dist.world import World


class Interrupted(Exception):  # noqa: N818 -- no error: the run does what it was asked to
    """The ranks have agreed to stop. Raised on all of them at the same poll."""

    def __init__(self, number: int) -> None:
        self.signal_name = signal.Signals(number).name
        super().__init__(self.signal_name)


class Interruption:
    """The question whether any rank was asked to stop, put to all of them at every step boundary.

    The question of one poll is answered at the next, by hosts alone, while the devices do the step between them: so no rank
    waits for another, and none passes the boundary at which they stop. The first is answered at once, before any step.
    """

    def __init__(self, world: World, listener: Listener) -> None:
        self._world = world
        self._listener = listener
        self._answer: Callable[[], int] | None = None

    def poll_across_ranks(self) -> None:
        """Collective. Raise Interrupted on every rank if one had been asked to stop by the poll before this one."""
        answer = self._answer or self._ask_across_ranks()
        number = answer()
        if number:
            raise Interrupted(number)
        self._answer = self._ask_across_ranks()

    def _ask_across_ranks(self) -> Callable[[], int]:
        return self._world.begin_maximum_across_ranks(self._listener.number)
