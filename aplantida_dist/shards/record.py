"""A record: what a source knows of one picture before it is a sample, and why it may not become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aplantida_dist.shards.licence import Licence
from aplantida_dist.shards.place import Place

Reason = Literal[
    "outside_classes",
    "missing",
    "not_downloaded",
    "licence",
    "unreadable",
    "not_a_picture",
    "other_format",
    "too_large",
    "undecodable",
    "animated",
    "too_small",
    "blank",
    "duplicate",
    "leak",
    "conflicting_labels",
    "no_sample",
    "not_one_image",
    "no_label",
    "bad_metadata",
    "not_selected",
    "untrained_class",
    "few_samples",
]

MEANING_OF_REASON: dict[Reason, str] = {
    "outside_classes": "lies in no class folder",
    "missing": "the picture of the record is not in the image folder",
    "not_downloaded": "the picture of the record could not be fetched",
    "licence": "under a licence that was not asked for, or the same photograph is in another record",
    "unreadable": "could not be read",
    "not_a_picture": "holds nothing that is known as a picture",
    "other_format": "a picture, but neither JPEG, PNG nor WebP",
    "too_large": "more bytes or pixels than a picture may have",
    "undecodable": "a picture that does not decode to its end",
    "animated": "more than one frame",
    "too_small": "shorter on one side than a picture must be",
    "blank": "a picture of nothing but one colour, as placeholders are",
    "duplicate": "same bytes as a sample of the same split",
    "leak": "same bytes as a sample of another split, which keeps it, or nearly the same look",
    "conflicting_labels": "same bytes under several classes",
    "no_sample": "a member of a tar whose name makes it part of no sample",
    "not_one_image": "a sample of a tar with no image or with several",
    "no_label": "a sample of a tar with neither a latin_name nor a .cls",
    "bad_metadata": "a sample of a tar whose .json or .cls cannot be understood",
    "not_selected": "a sample of the parent that the subset does not ask for",
    "untrained_class": "in val or test, of a class of which the subset keeps nothing in train",
    "few_samples": "of a class with fewer usable photographs than --min-samples",
}
"""Every reason for which a record is left out, in the order of the report."""


@dataclass(frozen=True, slots=True)
class Record:
    """One picture as its source describes it.

    `place` is where its bytes lie; `source` names it in reports: a relative path with '/' between its parts, FILE:LINE or TAR:MEMBER; valid UTF-8.
    `split` is None where the builder is to decide. `metadata` is the canonical JSON that becomes KEY.json: bytes, since a
    million dictionaries are 1 GB. `licence` is None where the source states none.
    """

    place: Place
    source: str
    class_name: str
    split: str | None
    metadata: bytes
    licence: Licence | None

    def left_out(self, reason: Reason, detail: str, *, twin: Record | None = None) -> LeftOut:
        """This record as one that does not become a sample."""
        return LeftOut(self.source, self.class_name, reason, detail, self.place, twin)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One file or record that did not become a sample.

    `detail` says what was found; `class_name` is None outside the class folders; `place` is None where no bytes are there, and
    is not part of the report's data: it leads to the picture while the dataset is built. So does `twin`, the record with the same
    picture: of a duplicate or leak the one that was preferred, of conflicting labels the first of all that conflict; None for other reasons.
    """

    source: str
    class_name: str | None
    reason: Reason
    detail: str
    place: Place | None
    twin: Record | None = None
