"""The galleries of a report: which of the pictures that were left out are shown, and beside which others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from aplantida_dist.shards.account import Account
from aplantida_dist.shards.place import Place
from aplantida_dist.shards.record import MEANING_OF_REASON, LeftOut, Reason, Record

PICTURES_PER_GALLERY = 24
PICTURES_PER_EXHIBIT = 4

Item = TypeVar("Item")


@dataclass(frozen=True)
class View:
    """One picture on show. `role` says what it is beside the others of its exhibit; empty where they are alike."""

    source: str
    class_name: str | None
    place: Place | None
    role: str = ""


@dataclass(frozen=True)
class Exhibit:
    """What belongs side by side: one picture, or several that are the same; `num_more` of these are not shown."""

    views: tuple[View, ...]
    detail: str
    num_more: int = 0


@dataclass(frozen=True)
class Gallery:
    """Some of `num_all` exhibits, evenly spaced over them."""

    exhibits: tuple[Exhibit, ...]
    num_all: int

    @property
    def has_pictures(self) -> bool:
        """Whether any bytes can be looked for; of a missing picture there are none."""
        return any(view.place is not None for exhibit in self.exhibits for view in exhibit.views)


@dataclass(frozen=True)
class Galleries:
    """One gallery for each reason for which anything was left out, in the order of the reasons, and one of the disagreeing groups."""

    of_reason: dict[Reason, Gallery]
    of_groups: Gallery

    @property
    def places(self) -> Iterator[Place]:
        """Where the bytes of everything on show lie; a place may come more than once."""
        for gallery in (*self.of_reason.values(), self.of_groups):
            for exhibit in gallery.exhibits:
                yield from (view.place for view in exhibit.views if view.place is not None)


def choose_galleries(account: Account) -> Galleries:
    """Choose what the page shows: at most 24 pictures a gallery, whatever was left out."""
    of_reason: defaultdict[Reason, list[LeftOut]] = defaultdict(list)
    for left_out in account.left_out:
        of_reason[left_out.reason].append(left_out)
    disagreeing = account.groups.disagreeing if account.groups is not None else ()
    return Galleries(
        {reason: _gallery_of(reason, of_reason[reason]) for reason in MEANING_OF_REASON if of_reason[reason]},
        _gallery([_exhibit_of_records(group) for group in spread(disagreeing)], num_all=len(disagreeing)),
    )


def spread(items: Sequence[Item], *, most: int = PICTURES_PER_GALLERY) -> list[Item]:
    """At most so many of the items, evenly spaced from the first on, in their order."""
    count = min(len(items), most)
    return [items[number * len(items) // count] for number in range(count)]


def _gallery_of(reason: Reason, left_out: Sequence[LeftOut]) -> Gallery:
    match reason:
        case "conflicting_labels":
            conflicts = _conflicts_of(left_out)
            return _gallery([_exhibit_of_conflict(copies) for copies in spread(conflicts)], num_all=len(conflicts))
        case "leak":
            return _gallery([_exhibit_of_leak(one) for one in spread(left_out)], num_all=len(left_out))
        case _:
            exhibits = [Exhibit((_view_of(one),), one.detail) for one in spread(left_out)]
            return _gallery(exhibits, num_all=len(left_out))


def _gallery(exhibits: Sequence[Exhibit], *, num_all: int) -> Gallery:
    widest = max((len(exhibit.views) for exhibit in exhibits), default=1)
    return Gallery(tuple(spread(exhibits, most=PICTURES_PER_GALLERY // widest)), num_all)


def _conflicts_of(left_out: Sequence[LeftOut]) -> list[list[LeftOut]]:
    """The copies of each picture together, which the order of names keeps apart."""
    copies_of: defaultdict[str, list[LeftOut]] = defaultdict(list)
    for one in left_out:
        copies_of[one.source if one.twin is None else one.twin.source].append(one)
    return list(copies_of.values())


def _exhibit_of_conflict(copies: Sequence[LeftOut]) -> Exhibit:
    shown = copies[:PICTURES_PER_EXHIBIT]
    return Exhibit(tuple(_view_of(copy) for copy in shown), copies[0].detail, num_more=len(copies) - len(shown))


def _exhibit_of_leak(leak: LeftOut) -> Exhibit:
    if leak.twin is None:
        return Exhibit((_view_of(leak),), leak.detail)
    return Exhibit((_view_of(leak, role="left out"), _view_of(leak.twin, role="preferred to it")), leak.detail)


def _exhibit_of_records(group: Sequence[Record]) -> Exhibit:
    """A group, its classes in turn: of a thousand pictures under one class and one under another, that one is on show too."""
    of_class: defaultdict[str, list[Record]] = defaultdict(list)
    for record in group:
        of_class[record.class_name].append(record)
    turns = [(turn, record) for records in of_class.values() for turn, record in enumerate(records)]
    shown = [record for _, record in sorted(turns, key=lambda one: one[0])][:PICTURES_PER_EXHIBIT]
    return Exhibit(tuple(map(_view_of, shown)), "", num_more=len(group) - len(shown))


def _view_of(one: LeftOut | Record, *, role: str = "") -> View:
    return View(one.source, one.class_name, one.place, role)
