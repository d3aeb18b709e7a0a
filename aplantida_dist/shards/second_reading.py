"""The second reading: pictures that were audited are read again to be written, and are what they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from aplantida_dist.data.manifest import Reencoding
from aplantida_dist.errors import UserError
from aplantida_dist.shards.audit import sample_key_of
from aplantida_dist.shards.place import Place
from aplantida_dist.shards.reencode import Encoded, reencode
from aplantida_dist.shards.workers import map_in_order


class ChangedError(UserError):
    """A picture is no longer what was audited."""


@dataclass(frozen=True, slots=True)
class Audited:
    """Where a picture lies, and the key and the suffix that the audit gave it."""

    place: Place
    sample_key: str
    suffix: str


def read_again(pictures: Iterable[Audited], *, reencoding: Reencoding | None, num_workers: int) -> Iterator[Encoded]:
    """Read pictures in their order. ChangedError where one cannot be read any more or has other bytes than its key says.

    They are re-encoded where that is asked for, in `num_workers` processes; the bytes do not depend on how many.
    """
    if reencoding is None:
        return map(_read, pictures)
    return map_in_order(partial(_reencode_together, reencoding=reencoding), pictures, num_workers=num_workers)


def _read(picture: Audited) -> Encoded:
    place = picture.place
    try:
        image = place.read()
    except OSError as error:
        raise ChangedError(
            f"{place}: cannot be read any more: {error.strerror}; leave the pictures alone and build again"
        ) from error
    if sample_key_of(image) != picture.sample_key:
        raise ChangedError(f"{place}: changed while the dataset was built; leave the pictures alone and build again")
    return Encoded(image, picture.suffix)


def _reencode_together(pictures: Sequence[Audited], *, reencoding: Reencoding) -> list[Encoded]:
    return [reencode(_read(picture), reencoding=reencoding) for picture in pictures]
