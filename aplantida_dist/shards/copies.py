"""Copies: records of the same photograph, byte for byte. Which of them stays, under which licence, and where none may."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from aplantida_dist.files import canonical_json
from aplantida_dist.shards.audit import Candidate
from aplantida_dist.shards.licence import UNKNOWN, Requirement, stated_licence, strictest
from aplantida_dist.shards.record import LeftOut, Reason, Record

COPY_STAYS_IN = ("test", "val", "train", None)
"""Of equal pictures the one in the earliest of these stays: a photograph that is measured on must not be learnt from."""


def part_by_licence(records: Iterable[Record], requirement: Requirement) -> tuple[list[Record], list[Record]]:
    """The records whose own licence is accepted, and the others."""
    accepted: list[Record] = []
    refused: list[Record] = []
    for record in records:
        (accepted if requirement.is_met_by(record.licence or UNKNOWN) else refused).append(record)
    return accepted, refused


def leave_out_refused(
    candidates: Iterable[Candidate], refused_of_key: Mapping[str, Record]
) -> tuple[list[Candidate], list[LeftOut]]:
    """Leave out the candidates whose photograph also stands under a licence that is refused (sample key → such a record).

    A photograph is as restricted as its most restrictive record: who published it anew under a freer one may not have had the right to.
    """
    kept: list[Candidate] = []
    left_out: list[LeftOut] = []
    for candidate in candidates:
        refused = refused_of_key.get(candidate.picture.sample_key)
        if refused is None:
            kept.append(candidate)
        else:
            detail = f"same bytes as {refused.source}: {stated_licence(json.loads(refused.metadata))}"
            left_out.append(candidate.record.left_out("licence", detail))
    return kept, left_out


def drop_copies(candidates: Iterable[Candidate]) -> tuple[list[Candidate], list[LeftOut]]:
    """Keep one candidate of each picture, and none of a picture that stands under several classes.

    Of equal pictures the copy in test stays before val before train, then the first that comes; a dropped copy is a `leak` where
    it stood in another split than the one that stays, else a `duplicate`. The one that stays states the strictest of their licences.
    """
    copies_of_key: defaultdict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        copies_of_key[candidate.picture.sample_key].append(candidate)
    kept: list[Candidate] = []
    left_out: list[LeftOut] = []
    for copies in copies_of_key.values():
        classes = sorted({copy.record.class_name for copy in copies})
        if len(classes) > 1:
            detail, twin = f"under {', '.join(classes)}", copies[0].record
            left_out += [copy.record.left_out("conflicting_labels", detail, twin=twin) for copy in copies]
            continue
        first, *others = sorted(copies, key=_preference)
        kept.append(_under_the_strictest_licence(first, copies))
        for copy in others:
            reason: Reason = "duplicate" if copy.record.split == first.record.split else "leak"
            detail, twin = f"same bytes as {first.record.source}", first.record
            left_out.append(copy.record.left_out(reason, detail, twin=twin))
    return kept, left_out


def _preference(candidate: Candidate) -> int:
    return COPY_STAYS_IN.index(candidate.record.split)


def _under_the_strictest_licence(first: Candidate, copies: Sequence[Candidate]) -> Candidate:
    """The candidate as it is where no copy is more restricted, else with the strictest licence, in KEY.json too."""
    licences = {copy.record.licence for copy in copies}
    if len(licences) == 1:
        return first
    licence = strictest(licence or UNKNOWN for licence in licences)
    own = first.record.licence
    if own is not None and own.name == licence.name:
        return first
    metadata = canonical_json({**json.loads(first.record.metadata), "license": licence.name})
    return replace(first, record=replace(first.record, licence=licence, metadata=metadata))
