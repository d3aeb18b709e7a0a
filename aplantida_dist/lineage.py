"""Lineage: the identities that weights were trained on, through every run they descend from, and what of a split is among them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.errors import UserError

Identities = NDArray[np.int64]


class LeakError(UserError):
    """A split is to be evaluated with weights that were trained on some of its photographs."""


@dataclass(frozen=True)
class Descent:
    """A checkpoint, or a file of weights, that other weights began with: where it lay and the sha256 that it had."""

    path: str
    digest: str


@dataclass(frozen=True)
class Lineage:
    """What weights were trained on, as far as it is known.

    identities: int64 [n], ascending, each once (`data.manifest.identity_of`). ancestors: what the weights descend from, the
    nearest first. unknown: those of whom nobody recorded what they were trained on; with any, a clean split is not proven.
    """

    identities: Identities
    ancestors: tuple[Descent, ...] = ()
    unknown: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """All but the identities, as plain values for JSON."""
        return {
            "num_identities": len(self.identities),
            "ancestors": [asdict(ancestor) for ancestor in self.ancestors],
            "unknown": list(self.unknown),
        }

    def among(self, identities: Identities) -> Identities:
        """Those of the identities that are in the lineage, ascending; as often as they were given."""
        if not len(self.identities):
            return np.zeros(0, dtype=np.int64)
        places = np.searchsorted(self.identities, identities).clip(max=len(self.identities) - 1)
        found: Identities = np.sort(identities[self.identities[places] == identities])
        return found


def lineage_from(identities: Identities, facts: Mapping[str, Any]) -> Lineage:
    """The lineage whose `facts` and identities these are."""
    ancestors = tuple(Descent(**ancestor) for ancestor in facts["ancestors"])
    return Lineage(identities, ancestors, tuple(facts["unknown"]))


def require_lineage_facts(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The facts, once they have the shape of `Lineage.facts`; ValueError where they have not."""
    match facts:
        case {"num_identities": int(number), "ancestors": list(ancestors), "unknown": list(unknown)} if number >= 0:
            texts = [*unknown, *(text for one in ancestors if isinstance(one, dict) for text in one.values())]
            are_descents = all(isinstance(one, dict) and one.keys() == {"path", "digest"} for one in ancestors)
            if are_descents and all(isinstance(text, str) for text in texts):
                return facts
    raise ValueError("expected the number of identities, the ancestors and what is unknown of a lineage")


def descend(own: Identities, parents: Sequence[tuple[Descent, Lineage]], *, unknown: Collection[str] = ()) -> Lineage:
    """The lineage of weights that are trained on `own` after they began with, or learn from, their parents.

    The whole train split counts as seen from the first step on: a checkpoint in mid-epoch claims too much, never too little.
    """
    identities = _ascending(np.concatenate([own, *(lineage.identities for _, lineage in parents)]))
    ancestors = [ancestor for descent, lineage in parents for ancestor in (descent, *lineage.ancestors)]
    sources = [*unknown, *(source for _, lineage in parents for source in lineage.unknown)]
    return Lineage(identities, tuple(dict.fromkeys(ancestors)), tuple(dict.fromkeys(sources)))


def _ascending(identities: Identities) -> Identities:
    """Each identity once, ascending. Sorting a million takes 0.07 s; numpy's `unique`, which hashes, 1.1 s."""
    ordered = np.sort(identities)
    once: Identities = ordered[np.concatenate(([True], ordered[1:] != ordered[:-1]))] if len(ordered) else ordered
    return once
