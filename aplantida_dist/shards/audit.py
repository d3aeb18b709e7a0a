"""The audit: does a file hold a picture that can be trained on, and which."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from aplantida_dist.data.decode import DecodeError, open_picture, to_rgb
from aplantida_dist.data.index import MAX_PICTURE_BYTES
from aplantida_dist.shards.looks import is_blank, look_of, mean_colour, shrink
from aplantida_dist.shards.place import Place
from aplantida_dist.shards.record import Reason, Record
from aplantida_dist.shards.workers import map_in_order

KEY_DIGITS = 24
SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
MIN_SIDE = 32
"""The side of the smallest picture that is looked at (`looks.SMALL_SIDE`); at 224 pixels it is enlarged seven times already."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that decodes: the key that its bytes give it, the suffix that its format gives it, its size.

    `look` is its perceptual hash, 0 where the audit was not asked for it.
    """

    sample_key: str
    suffix: str
    num_bytes: int
    look: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a file is not a picture that can be trained on."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A record whose picture decodes."""

    record: Record
    picture: Picture


def sample_key_of(content: bytes) -> str:
    """The sample key of a picture: the first 24 hex digits of the sha256 of its bytes."""
    return hashlib.sha256(content).hexdigest()[:KEY_DIGITS]


def audit_places(
    places: Iterable[Place], *, num_workers: int, with_looks: bool, min_side: int = MIN_SIDE
) -> Iterator[Picture | Fault]:
    """Audit pictures in `num_workers` processes (0: in this one); the findings come in the order of the places.

    A picture whose shorter side is below `min_side` pixels is a fault.
    """
    audit = partial(_audit_together, with_looks=with_looks, min_side=min_side)
    return map_in_order(audit, places, num_workers=num_workers)


def keys_of_places(places: Iterable[Place], *, num_workers: int) -> Iterator[str | None]:
    """The sample keys of what lies at these places, whether or not they are pictures; None where nothing can be read."""
    return map_in_order(_keys_together, places, num_workers=num_workers)


def audit_picture(content: bytes, *, with_looks: bool, min_side: int = MIN_SIDE) -> Picture | Fault:
    """Audit the bytes of one picture."""
    with warnings.catch_warnings():
        # Pillow warns of odd metadata and of large pictures; what matters here are its errors.
        warnings.simplefilter("ignore")
        return _see(content, with_looks=with_looks, min_side=min_side)


def _audit_together(places: Sequence[Place], *, with_looks: bool, min_side: int) -> list[Picture | Fault]:
    contents = map(_read, places)
    audit = partial(audit_picture, with_looks=with_looks, min_side=min_side)
    return [content if isinstance(content, Fault) else audit(content) for content in contents]


def _keys_together(places: Sequence[Place]) -> list[str | None]:
    contents = map(_read, places)
    return [None if isinstance(content, Fault) else sample_key_of(content) for content in contents]


def _read(place: Place) -> bytes | Fault:
    try:
        num_bytes = place.size()
        if num_bytes is None:
            return Fault("not_a_picture", "neither a file nor a folder")
        if num_bytes > MAX_PICTURE_BYTES:
            return Fault("too_large", f"{num_bytes} bytes, at most {MAX_PICTURE_BYTES} are read")
        return place.read()
    except OSError as error:
        return Fault("unreadable", error.strerror or type(error).__name__)


def _see(content: bytes, *, with_looks: bool, min_side: int) -> Picture | Fault:
    """Decode a picture exactly as training will, and look at it. What kind it is comes from its bytes, never from its name."""
    try:
        opened = open_picture(content)
        suffix = SUFFIX_OF_FORMAT[opened.format or ""]
        image = to_rgb(opened)
    except DecodeError as error:
        return Fault(error.flaw, error.detail)
    if suffix == "png" and not _checksums_fit(content):
        return Fault("undecodable", "its checksums do not fit")
    if min(image.size) < min_side:
        return Fault("too_small", f"{image.width} × {image.height} pixels; the shorter side must have {min_side}")
    small = shrink(image)
    if is_blank(image, small):
        return Fault("blank", f"nearly all {mean_colour(image)}")
    return Picture(sample_key_of(content), suffix, len(content), look_of(small) if with_looks else 0)


def _checksums_fit(content: bytes) -> bool:
    """Whether a PNG is whole by the checksums of its chunks, which decoding passes over; neither JPEG nor WebP has any."""
    try:
        open_picture(content).verify()
    except Exception:  # SyntaxError, OSError, struct.error and more
        return False
    return True
