"""The audit: does a file hold a picture that decodes to its end, and which of several equal copies stays."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial

from PIL import Image, UnidentifiedImageError

from aplantida_dist.data.images import MAX_PIXELS, DecodeError, decode
from aplantida_dist.errors import UserError
from aplantida_dist.shards.looks import look_of
from aplantida_dist.shards.place import Place
from aplantida_dist.shards.pool import follow_the_main_process
from aplantida_dist.shards.record import LeftOut, Reason, Record

KEY_DIGITS = 24
SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
MAX_PICTURE_BYTES = 512 * 2**20
FILES_PER_TASK = 16
COPY_STAYS_IN = ("test", "val", "train", None)
"""Of equal pictures the one in the earliest of these stays: a photograph that is measured on must not be learnt from."""


class AuditError(UserError):
    """The audit itself could not be carried out."""


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


def audit_places(places: Sequence[Place], *, num_workers: int, with_looks: bool) -> Iterator[Picture | Fault]:
    """Audit pictures in `num_workers` processes (0: in this one); the findings come in the order of the places."""
    if num_workers < 0:
        raise AuditError(f"{num_workers} workers cannot decode; give --workers 0 or more")
    audit = partial(audit_place, with_looks=with_looks)
    if num_workers == 0:
        yield from map(audit, places)
        return
    # spawn: a fork would copy whatever threads and locks the caller holds.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=follow_the_main_process)
    try:
        yield from pool.map(audit, places, chunksize=FILES_PER_TASK)
    except BrokenProcessPool:
        raise AuditError(
            "a decoding process was killed, mostly for want of memory; build again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def audit_place(place: Place, *, with_looks: bool = False) -> Picture | Fault:
    """Read one picture and decode it fully. What kind of picture it is comes from its bytes, never from its name."""
    try:
        num_bytes = place.size()
        if num_bytes is None:
            return Fault("not_a_picture", "neither a file nor a folder")
        if num_bytes > MAX_PICTURE_BYTES:
            return Fault("too_large", f"{num_bytes} bytes, at most {MAX_PICTURE_BYTES} are read")
        content = place.read()
    except OSError as error:
        return Fault("unreadable", error.strerror or type(error).__name__)
    return audit_picture(content, with_looks=with_looks)


def audit_picture(content: bytes, *, with_looks: bool) -> Picture | Fault:
    """Decode a picture to its last row, exactly as training will."""
    if not content:
        return Fault("not_a_picture", "empty file")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow warns of odd metadata and of large pictures; what matters here are its errors.
        try:
            with Image.open(io.BytesIO(content)) as image:
                suffix, num_pixels = SUFFIX_OF_FORMAT.get(image.format or ""), image.width * image.height
        except UnidentifiedImageError:
            return Fault("not_a_picture", f"{len(content)} bytes that do not begin as any picture does")
        except Image.DecompressionBombError:
            return Fault("too_large", f"more than {MAX_PIXELS} pixels")
        except Exception as error:  # Pillow's readers raise nearly every built-in exception on damaged bytes.
            return Fault("undecodable", _text_of(error))
        if suffix is None:
            return Fault("other_format", f"{image.format}; convert it to JPEG, PNG or WebP")
        if num_pixels > MAX_PIXELS:
            return Fault("too_large", f"{num_pixels} pixels, at most {MAX_PIXELS} are decoded")
        try:
            pixels = decode(content)
        except DecodeError as error:
            return Fault("undecodable", _text_of(error))
    return Picture(sample_key_of(content), suffix, len(content), look_of(pixels) if with_looks else 0)


def drop_copies(candidates: Iterable[Candidate]) -> tuple[list[Candidate], list[LeftOut]]:
    """Keep one candidate of each picture, and none of a picture that stands under several classes.

    Of equal pictures the copy in test stays before val before train, then the first that comes; a dropped copy is a `leak` where
    it stood in another split than the one that stays, else a `duplicate`.
    """
    copies_of_key: defaultdict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        copies_of_key[candidate.picture.sample_key].append(candidate)
    kept: list[Candidate] = []
    left_out: list[LeftOut] = []
    for copies in copies_of_key.values():
        classes = sorted({copy.record.class_name for copy in copies})
        if len(classes) > 1:
            left_out += [copy.record.left_out("conflicting_labels", f"under {', '.join(classes)}") for copy in copies]
            continue
        first, *others = sorted(copies, key=_preference)
        kept.append(first)
        for copy in others:
            reason: Reason = "duplicate" if copy.record.split == first.record.split else "leak"
            left_out.append(copy.record.left_out(reason, f"same bytes as {first.record.source}"))
    return kept, left_out


def _preference(candidate: Candidate) -> int:
    return COPY_STAYS_IN.index(candidate.record.split)


def _text_of(error: Exception) -> str:
    """An error as one line that is the same in every run: without the addresses of objects in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split())) or type(error).__name__
