"""The origin of a run's weights: what they descend from, what they were trained on, and what of an evaluated split is among it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aplantida_dist.checkpoint import Checkpoint
from aplantida_dist.data.dataset import Split
from aplantida_dist.init_from import Beginning, account_lines
from aplantida_dist.lineage import Descent, Identities, LeakError, Lineage, descend
from aplantida_dist.world import World

Parents = Sequence[tuple[Descent, Lineage]]
"""Whom weights begin with or learn from, each with what it was trained on."""
NO_IDENTITIES: Identities = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Origin:
    """What is known of a run's weights before its first step, or before the one that it goes on with.

    leaked: the val samples that they were or will be trained on, int64 [n], ascending, the same on every rank. lineage and
    lines (what to tell on the screen) are the main process's; the other ranks hold nothing.
    """

    lineage: Lineage
    leaked: Identities
    lines: tuple[str, ...]


def trace_origin_across_ranks(
    *,
    world: World,
    train_split: Split,
    val_split: Split | None,
    checkpoint: Checkpoint | None,
    beginning: Beginning | None,
    pretrained: str | None,
    taught_by: Parents,
    allow_leak: bool,
) -> Origin:
    """Collective. Trace the lineage of a run and hold the val split against it. The main process alone reads the keys.

    `pretrained` names the weights of timm that the run began with, `taught_by` the teachers that it learns from. Raises LeakError on every rank where val has leaked and a
    leak is not allowed.
    """
    lineage = world.agree_across_ranks(
        lambda: (
            lineage_of_run(train_split, checkpoint, beginning, pretrained, taught_by)
            if world.is_main
            else Lineage(NO_IDENTITIES)
        )
    )
    leaked = NO_IDENTITIES
    lines = [] if beginning is None else account_lines(beginning.account, beginning.descent)
    lines += unknown_lines(lineage)
    if val_split is not None:
        leaked = world.learn_from_main_across_ranks(lambda: lineage.among(val_split.identities))
    if val_split is not None and len(leaked):
        fact = world.learn_from_main_across_ranks(
            lambda: _leak_of_run(leaked, val_split, train_split, lineage, taught_by)
        )
        if not allow_leak:
            raise world.told_by_main(leak_error(fact))
        lines.append(f"warning: {fact}; each row shows val whole and its clean part, and best goes by the clean part")
    return Origin(lineage, leaked, tuple(lines) if world.is_main else ())


def lineage_of_run(
    train_split: Split,
    checkpoint: Checkpoint | None,
    beginning: Beginning | None,
    pretrained: str | None,
    taught_by: Parents,
) -> Lineage:
    """The lineage as the checkpoint to go on from recorded it, or that of a run that begins. For the main process."""
    if checkpoint is not None and checkpoint.position.lineage is not None:
        return checkpoint.lineage()
    parents = [*([] if beginning is None else [(beginning.descent, beginning.lineage)]), *taught_by]
    unknown = [] if pretrained is None else [f"timm's pretrained weights of {pretrained}"]
    return descend(train_split.identities, parents, unknown=unknown)


def leak_error(fact: str) -> LeakError:
    """The error of a leak that is not allowed."""
    return LeakError(
        f"{fact}; use a dataset that keeps the splits of the ancestor's (`shards/build.py --from-dataset`, or --keep-splits), "
        "or pass --allow-leak to go on and see the score on the clean part beside the whole"
    )


def leak_text(leaked: Identities, split: Split, *, by: str) -> str:
    """The fact of a leak; `by` says who was trained on the photographs."""
    return f"{len(leaked)} of {split.num_samples} photographs of {split.name} were trained on {by}"


def _inheritance(lineage: Lineage, teachers: Sequence[Descent]) -> str:
    """By whom a run may have inherited photographs: its nearest ancestor, and whether there are others."""
    if not lineage.ancestors:
        return ""
    nearest, *others = lineage.ancestors
    if nearest in teachers:
        return f"by {nearest.path} (a teacher)" + (" or one of the other teachers or ancestors" if others else "")
    further = " or one of the teachers or other ancestors" if teachers else " or what it began with"
    return f"by {nearest.path} (init_from)" + (further if others else "")


def unknown_lines(lineage: Lineage) -> list[str]:
    """What a lineage cannot tell, in one line; none where it tells all."""
    if not lineage.unknown:
        return []
    return [
        f"warning: the lineage is not known whole: nobody recorded what was trained on by {' and '.join(lineage.unknown)}; "
        "a leak from there cannot be seen"
    ]


def _leak_of_run(
    leaked: Identities,
    val_split: Split,
    train_split: Split,
    lineage: Lineage,
    taught_by: Parents,
) -> str:
    """Who was trained on the leaked samples: this run's own train split, the run that it began with, or a teacher."""
    num_own = int(np.isin(leaked, train_split.identities).sum())
    own = "in this run's own train split"
    inherited = _inheritance(lineage, [descent for descent, _ in taught_by])
    if num_own == 0:
        return leak_text(leaked, val_split, by=inherited)
    if num_own == len(leaked):
        return leak_text(leaked, val_split, by=own)
    return leak_text(leaked, val_split, by=f"({num_own} {own}, {len(leaked) - num_own} {inherited})")
