"""A failure: why a picture did not come, and whether asking again can mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a picture did not come. `reason` is one of few texts, by which failures are counted; `detail` may add to it.

    kind says when it is asked for again: `passing`, in this run, after a wait; `refused`, in the next run; `lasting`, never.
    `status` is that of HTTP, None where no answer came. `asks_for_quiet` is a server's word that it is asked too often, for as
    long as `retry_after_s`, where it says how long. Nothing here depends on the clock, since reports show it.
    """

    kind: Literal["passing", "refused", "lasting"]
    reason: str
    detail: str = ""
    status: int | None = None
    asks_for_quiet: bool = False
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
