"""The learning rate is a pure function of the step."""

from __future__ import annotations

import itertools
import math

import pytest

from aplantida_dist.schedule import Schedule


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 5])
def test_warm_up_rises_to_the_peak_and_nothing_exceeds_it(kind: str, warmup_steps: int) -> None:
    """Strictly rising through the warm-up, the peak right after it, never above it."""
    schedule = Schedule(kind, 1e-3, 1e-5, warmup_steps, 40)  # type: ignore[arg-type]
    rates = [schedule.learning_rate(step) for step in range(40)]
    assert all(a < b for a, b in itertools.pairwise(rates[: warmup_steps + 1]))
    assert rates[warmup_steps] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[warmup_steps:]))
    assert rates[0] > 0


def test_cosine_and_linear_end_at_the_final_rate() -> None:
    """Half-way a cosine and a line stand in the middle; at the end, at final_lr."""
    for kind in ("cosine", "linear"):
        schedule = Schedule(kind, 1.0, 0.2, 10, 110)  # type: ignore[arg-type]
        assert schedule.learning_rate(60) == pytest.approx(0.6)
        assert schedule.learning_rate(110) == pytest.approx(0.2)
    quarter = Schedule("cosine", 1.0, 0.0, 0, 100).learning_rate(25)
    assert quarter == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_a_run_of_warm_up_alone_does_not_divide_by_zero() -> None:
    """The shortest runs too."""
    assert Schedule("cosine", 1.0, 0.0, 5, 5).learning_rate(4) == pytest.approx(5 / 6)
    assert Schedule("linear", 1.0, 0.0, 0, 1).learning_rate(0) == 1.0
