"""Beats: who is to blame when a run stands still."""

from __future__ import annotations

import pytest

from aplantida_dist.beat import Beat, Doing, Sight, Stage, blame, decode_beat


def sight(
    rank: int,
    stage: Stage = "training",
    *,
    step: int = 7,
    doing: Doing = "waiting for the other ranks",
    silent_s: float = 0.0,
    is_gone: bool = False,
) -> Sight:
    beat = Beat(
        rank=rank, host="node", pid=100 + rank, pid_space="", count=3, moves=5, stage=stage, step=step, doing=doing
    )
    return Sight(beat, silent_s, 60.0, is_gone)


@pytest.mark.parametrize(
    ("sights", "expected"),
    [
        ([sight(0), sight(1, is_gone=True), sight(2, silent_s=9)], "rank 1 (pid 101 on node) is gone"),
        ([sight(0), sight(1, step=3), sight(2, silent_s=9)], "rank 2 (pid 102 on node) has given no sign of life for 9 s"),
        ([sight(0), sight(1, step=3), sight(2)], "rank 1 (pid 101 on node) is alive and has not moved for 60 s"),
        ([sight(0, "saving"), sight(1), sight(2)], "rank 0 (pid 100 on node) is alive"),
        ([sight(0), sight(1, doing="working"), sight(2)], "rank 1 (pid 101 on node) is alive"),
        ([sight(0), sight(1, doing="working"), sight(2, doing="reading a batch")], "rank 2 (pid 102 on node) is alive"),
        ([sight(0), sight(1, "left", is_gone=True)], "rank 0 (pid 100 on node) is alive"),
        ([sight(0), sight(1)], "all 2 ranks stand still at the same place: training, after step 7, waiting for the"),
        ([sight(0, doing="reading a batch")], "rank 0 (pid 100 on node) is alive"),
    ],
)  # fmt: skip
def test_the_rank_that_the_others_wait_for_is_named(sights: list[Sight], expected: str) -> None:
    """The dead before the silent, the silent before those behind, and of equals those that wait for nobody."""
    assert blame(sights).startswith(expected)
    assert "; last seen" in blame(sights) or len(sights) > 1


def test_two_are_named_together() -> None:
    """Whoever shares the fault is told in one line."""
    told = blame([sight(0), sight(1, is_gone=True), sight(2, is_gone=True)])
    assert "rank 1" in told
    assert "rank 2" in told
    assert "\n" not in told


def test_a_beat_travels_as_text() -> None:
    """What is decoded is what was encoded."""
    beat = sight(1).beat
    assert decode_beat(beat.encode()) == beat
