"""A host: how many requests are open at it, how long it is left in peace, and whether it is given up for this run."""

from __future__ import annotations

import asyncio

from aplantida_dist.shards.download.failure import Failure
from aplantida_dist.shards.download.manners import Manners


class Host:
    """One host in one run. Times are those of the running event loop."""

    def __init__(self, name: str, manners: Manners) -> None:
        self.name = name
        self.slots = asyncio.Semaphore(manners.per_host)
        self.given_up: Failure | None = None
        """What becomes of all its pictures from now on; None while it is asked."""
        self._manners = manners
        self._quiet_until_s = 0.0
        self._num_failed_in_a_row = 0

    def quiet_left_s(self) -> float:
        """The seconds for which nothing may be asked of it, 0 or less where it may."""
        return self._quiet_until_s - asyncio.get_running_loop().time()

    def keep_quiet(self, wait_s: float) -> None:
        """Ask nothing of it for so long, or give it up where that is beyond all patience."""
        if wait_s > self._manners.longest_quiet_s:
            self._give_up(
                f"it asks for {wait_s:,.0f} s of quiet, at most {self._manners.longest_quiet_s:,.0f} are waited"
            )
        self._quiet_until_s = max(self._quiet_until_s, asyncio.get_running_loop().time() + wait_s)

    def note(self, failure: Failure | None) -> None:
        """Count how a picture ended: any answer about it is a sign of life, failures that are none add up."""
        if failure is None or failure.kind == "lasting":
            self._num_failed_in_a_row = 0
            return
        self._num_failed_in_a_row += 1
        if self._num_failed_in_a_row >= self._manners.failures_in_a_row and self.given_up is None:
            self._give_up(f"{self._num_failed_in_a_row} pictures in a row failed, the last with: {failure}")

    def _give_up(self, why: str) -> None:
        self.given_up = Failure("refused", "host given up", f"{self.name}: {why}")
