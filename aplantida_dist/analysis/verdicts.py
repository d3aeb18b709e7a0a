"""The verdicts on a run: every question is asked, the gravest answers come first, and silence is called healthy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aplantida_dist.analysis import accounts, faults, learning
from aplantida_dist.analysis.curves import Curves, best_epoch, finite, measured_losses
from aplantida_dist.analysis.verdict import Severity, Verdict
from aplantida_dist.analysis.wording import count_text, list_text, loss_text, percent_text

_QUESTIONS: tuple[Callable[[Curves], Verdict | None], ...] = (
    faults.no_train_batches,
    faults.not_a_number,
    learning.constant_val_loss,
    learning.val_at_chance,
    faults.no_val_batches,
    faults.top1_above_top5,
    faults.impossible_accuracy,
    accounts.leak,
    accounts.coverage,
    learning.diverged,
    learning.loss_above_chance,
    learning.nothing_learned,
    learning.over_fitted,
    learning.rate_not_moving,
    faults.unequal_lengths,
    faults.broken_epochs,
    faults.unreadable_values,
    accounts.changed_ground,
    accounts.void_samples,
    accounts.input_bound,
    accounts.no_validation,
)
_ORDER: tuple[Severity, ...] = ("error", "warning", "note", "good")


@dataclass(frozen=True)
class JudgedRun:
    """A run and its verdicts, the gravest first."""

    curves: Curves
    verdicts: tuple[Verdict, ...]


def judge(curves: Curves) -> tuple[Verdict, ...]:
    """Every verdict on a run, errors first; "healthy" is among them when there is no error and no warning."""
    found = [verdict for question in _QUESTIONS if (verdict := question(curves)) is not None]
    if not any(verdict.severity in ("error", "warning") for verdict in found):
        found.append(_healthy(curves))
    return tuple(sorted(found, key=lambda verdict: _ORDER.index(verdict.severity)))


def gravest(run: JudgedRun) -> str:
    """The name of the gravest verdict, and how many more errors and warnings there are."""
    grave = [verdict.name for verdict in run.verdicts if verdict.severity in ("error", "warning")]
    if not grave:
        return "healthy"
    return grave[0] if len(grave) == 1 else f"{grave[0]} (+{len(grave) - 1})"


def compare(runs: Sequence[Curves]) -> tuple[Verdict, ...]:
    """The verdicts on several runs together; none for one run."""
    verdict = accounts.different_ground(runs)
    return () if verdict is None else (verdict,)


def _healthy(curves: Curves) -> Verdict:
    """Say what went well, and which questions this history could not answer."""
    losses, best = measured_losses(curves.train), best_epoch(curves)
    told = []
    if len(losses) > 1:
        told.append(f"train loss fell from {loss_text(losses[min(losses)])} to {loss_text(losses[max(losses)])}")
    if best is not None:
        value = percent_text(best.value) if best.is_top1 else loss_text(best.value)
        told.append(f"{best.metric} reached {value} in epoch {curves.epochs[best.index]}")
    open_questions = []
    if len(curves.epochs) < learning.MIN_EPOCHS:
        open_questions.append(f"any trend ({count_text(len(curves.epochs), 'epoch')})")
    if not curves.num_classes:
        open_questions.append("the loss of guessing (--num-classes)")
    if not finite(curves.val.top1):
        open_questions.append("the class maps of the splits (no val top-1)")
    untold = f" It could not tell about {list_text(open_questions)}." if open_questions else ""
    return Verdict(
        "good",
        "healthy",
        f"{'; '.join(told) or 'nothing stands out'}.",
        f"None of the known faults shows in this history.{untold}",
    )
