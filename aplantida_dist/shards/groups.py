"""Groups of photographs that look nearly the same: they are found, and each is held on one side of the split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aplantida_dist.shards.audit import Candidate
from aplantida_dist.shards.copies import COPY_STAYS_IN
from aplantida_dist.shards.record import LeftOut
from aplantida_dist.shards.split import split_by_class

BAND_BITS = 16
NUM_BANDS = 4
MAX_DISTANCE = NUM_BANDS - 1
"""Two looks that differ in fewer bits than there are bands agree in one band whole, so only such pairs are compared."""
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Group:
    """Two or more photographs that look nearly the same, sorted by key. The first key names the group."""

    members: tuple[Candidate, ...]

    @property
    def name(self) -> str:
        return self.members[0].picture.sample_key

    @property
    def class_names(self) -> set[str]:
        return {member.record.class_name for member in self.members}


def find_groups(candidates: Sequence[Candidate], *, distance: int) -> tuple[Group, ...]:
    """Group the candidates whose looks differ in at most `distance` bits, directly or through others; ordered by name."""
    looks = np.array([candidate.picture.look for candidate in candidates], dtype=np.uint64)
    numbers = number_groups(looks, distance=distance)
    # Most photographs are alone: a list for each of a million takes 100 MB.
    is_alone = np.bincount(numbers, minlength=len(numbers))[numbers] == 1
    members_of_number: defaultdict[int, list[Candidate]] = defaultdict(list)
    for position in np.flatnonzero(~is_alone).tolist():
        members_of_number[int(numbers[position])].append(candidates[position])
    groups = (
        Group(tuple(sorted(members, key=lambda member: member.picture.sample_key)))
        for members in members_of_number.values()
    )
    return tuple(sorted(groups, key=lambda group: group.name))


def number_groups(looks: NDArray[np.uint64], *, distance: int) -> NDArray[np.int64]:
    """Give equal numbers to looks that a chain of steps of at most `distance` ≤ MAX_DISTANCE bits connects.

    looks: uint64 [n]; returns int64 [n]. Memory is that of the looks, whatever the number of near pairs.
    """
    distinct, number_of_look = np.unique(looks, return_inverse=True)
    parents = list(range(len(distinct)))
    for one, other in _near_pairs(distinct, distance=distance):
        first, second = _root(parents, one), _root(parents, other)
        parents[max(first, second)] = min(first, second)
    roots = np.array([_root(parents, number) for number in range(len(parents))], dtype=np.int64)
    return roots[number_of_look]


def _near_pairs(distinct: NDArray[np.uint64], *, distance: int) -> Iterator[tuple[int, int]]:
    for band in range(NUM_BANDS):
        keys = (distinct >> np.uint64(band * BAND_BITS)) & np.uint64((1 << BAND_BITS) - 1)
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order])) + 1
        for run in np.split(order, starts):
            if len(run) > 1:
                yield from _near_pairs_of_run(distinct, run, distance=distance)


def _near_pairs_of_run(distinct: NDArray[np.uint64], run: NDArray[Any], *, distance: int) -> Iterator[tuple[int, int]]:
    looks = distinct[run]
    for first in range(0, len(run), ROWS_AT_ONCE):
        block = looks[first : first + ROWS_AT_ONCE]
        is_near = np.bitwise_count(block[:, None] ^ looks[None, first:]) <= distance
        rows, columns = np.nonzero(np.triu(is_near, k=1))
        yield from zip(run[first + rows].tolist(), run[first + columns].tolist(), strict=True)


def _root(parents: list[int], number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number


def leave_out_leaks(
    candidates: Sequence[Candidate], *, groups: Sequence[Group], kept: Mapping[str, str]
) -> tuple[list[Candidate], list[LeftOut]]:
    """Where a group stands in several given splits, keep those in test before val before train, and leave out the others."""
    leak_of_key: dict[str, LeftOut] = {}
    for group in groups:
        given = {member.picture.sample_key: given_split(member, kept=kept) for member in group.members}
        stays_in = min(set(given.values()), key=COPY_STAYS_IN.index)
        staying = (member.record for member in group.members if given[member.picture.sample_key] == stays_in)
        stays = min(staying, key=lambda record: record.source)
        for member in group.members:
            if given[member.picture.sample_key] not in (stays_in, None):
                detail = f"looks nearly the same as {stays.source}"
                leak_of_key[member.picture.sample_key] = member.record.left_out("leak", detail, twin=stays)
    return [each for each in candidates if each.picture.sample_key not in leak_of_key], list(leak_of_key.values())


def given_split(candidate: Candidate, *, kept: Mapping[str, str]) -> str | None:
    """The split that the source or an earlier dataset gives this photograph."""
    return candidate.record.split or kept.get(candidate.picture.sample_key)


def split_by_group(
    candidates: Sequence[Candidate], *, groups: Sequence[Group], kept: Mapping[str, str], seed: int
) -> dict[str, str]:
    """Decide the split of every photograph (sample key → split): a group counts and goes as one photograph, by its name.

    A group whose members have a kept split follows them; no group has two of them (see `leave_out_leaks`). Another group that
    stands under several classes trains: who learns a label that may be wrong loses less than who is measured on it.
    """
    keys = {candidate.picture.sample_key for candidate in candidates}
    unit_of_key: dict[str, str] = {}  # of those in groups; every other photograph is its own unit
    kept_units = {key: kept[key] for key in keys if key in kept}
    for group in groups:
        members = [member for member in group.members if member.picture.sample_key in keys]
        unit_of_key.update((member.picture.sample_key, group.name) for member in members)
        given = {given_split(member, kept=kept) for member in members} - {None}
        if len(group.class_names) > 1 and not given:
            given = {"train"}
        kept_units.update((group.name, split) for split in given if split is not None)
    chosen = split_by_class(_units_of(candidates, unit_of_key), seed=seed, kept=kept_units)
    chosen.update({key: chosen[unit] for key, unit in unit_of_key.items()})
    return chosen


def _units_of(candidates: Sequence[Candidate], unit_of_key: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What counts as one photograph, with the class: each that is alone, and each group once in each of its classes."""
    told: set[tuple[str, str]] = set()
    for candidate in candidates:
        key, class_name = candidate.picture.sample_key, candidate.record.class_name
        if key not in unit_of_key:
            yield key, class_name
        elif (unit := (unit_of_key[key], class_name)) not in told:
            told.add(unit)
            yield unit
