"""Beats: what each rank tells of itself once a second, and which ranks are to blame when a run stands still."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

SILENT_AFTER_S = 5.0
"""A rank whose beats have stopped for so long is silent; one beats every second."""

Stage = Literal["start-up", "evaluating", "saving", "training", "finishing", "left"]
"""Where in a run a rank is; those that share a number of completed steps come in this order."""

Doing = Literal["working", "reading a batch", "waiting for the other ranks"]
"""What a rank last began within its stage."""

_ORDER: tuple[str, ...] = get_args(Stage)


@dataclass(frozen=True)
class Beat:
    """One sign of life: `count` rises with every beat of the rank's thread, `moves` with every act of its training.

    `pid_space` tells what the pid is a number of: a host, or a container on it.
    """

    rank: int
    host: str
    pid: int
    pid_space: str
    count: int
    moves: int
    stage: Stage
    step: int
    doing: Doing

    def encode(self) -> str:
        """As JSON, for the other ranks."""
        return json.dumps(asdict(self))

    @property
    def place(self) -> tuple[int, int]:
        """Completed steps and stage: comparable between ranks."""
        return self.step, _ORDER.index(self.stage)

    @property
    def text(self) -> str:
        """Where the rank is, for an error."""
        return f"{self.stage}, after step {self.step}, {self.doing}"

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


def decode_beat(text: str) -> Beat:
    """The beat that another rank encoded."""
    return Beat(**json.loads(text))


@dataclass(frozen=True)
class Sight:
    """A rank as another sees it: its last beat, the seconds since a beat came and since it moved, and whether its process is gone."""

    beat: Beat
    silent_s: float
    still_s: float
    is_gone: bool

    @property
    def is_lost(self) -> bool:
        """Whether it died: a rank that has left the run at its end did not."""
        return self.is_gone and self.beat.stage != "left"


def blame(sights: Sequence[Sight]) -> str:
    """Name the ranks that the others wait for, and why; `sights` holds every rank, this one too.

    In this order: those whose process is gone, those whose beats have stopped, those that are behind the others. Of
    ranks at the same place those are behind that do not wait for others. Where none is behind, it says so.
    """
    if lost := [sight for sight in sights if sight.is_lost]:
        return _tell(lost, lambda sight: "is gone: it was killed, or it crashed")
    if silent := [sight for sight in sights if sight.silent_s >= SILENT_AFTER_S]:
        return _tell(silent, lambda sight: f"has given no sign of life for {sight.silent_s:.0f} s: stopped, or cut off")
    last_place = min(sight.beat.place for sight in sights)
    behind = [sight for sight in sights if sight.beat.place == last_place]
    busy = [sight for sight in behind if sight.beat.doing != "waiting for the other ranks"]
    reading = [sight for sight in busy if sight.beat.doing == "reading a batch"]
    blamed = reading or busy or behind
    if len(blamed) == len(sights) > 1:
        return f"all {len(sights)} ranks stand still at the same place: {blamed[0].beat.text}"
    return _tell(blamed, lambda sight: f"is alive and has not moved for {sight.still_s:.0f} s")


def _tell(sights: Sequence[Sight], why: Callable[[Sight], str]) -> str:
    return "; ".join(f"{sight.beat.name} {why(sight)}; last seen {sight.beat.text}" for sight in sights)
