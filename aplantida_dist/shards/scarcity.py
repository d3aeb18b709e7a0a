"""Scarcity: classes with too few usable photographs are left out whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from aplantida_dist.errors import UserError
from aplantida_dist.shards.audit import Candidate
from aplantida_dist.shards.record import LeftOut


class ScarcityError(UserError):
    """No class has as many photographs as were asked for."""


def leave_out_few(candidates: Sequence[Candidate], *, min_samples: int) -> tuple[list[Candidate], list[LeftOut]]:
    """Keep the candidates of classes that have at least `min_samples` of them, over all splits; leave out the others whole.

    Photographs are counted, near copies of each other included: so a class of the dataset has at least that many samples in
    its manifests, and one that is left out had fewer. Raises ScarcityError where no class would stay.
    """
    counts = Counter(candidate.record.class_name for candidate in candidates)
    if counts and max(counts.values()) < min_samples:
        name, most = max(counts.items(), key=lambda item: (item[1], item[0]))
        raise ScarcityError(
            f"--min-samples {min_samples}: would leave out all {len(counts):,} classes; "
            f"the largest, {name}, has {most} usable photographs; ask for fewer"
        )
    kept: list[Candidate] = []
    left_out: list[LeftOut] = []
    for candidate in candidates:
        count = counts[candidate.record.class_name]
        if count >= min_samples:
            kept.append(candidate)
        else:
            detail = f"{count} usable photograph{'s' if count > 1 else ''}, --min-samples {min_samples}"
            left_out.append(candidate.record.left_out("few_samples", detail))
    return kept, left_out
