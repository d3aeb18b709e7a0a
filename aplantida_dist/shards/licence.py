"""What a licence text allows: read as a licence, whole, so that CC-BY-NC is never taken for CC-BY."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from aplantida_dist.errors import UserError

TERM_WORDS = {
    "BY": r"by|attribution",
    "NC": r"nc|non ?commercial",
    "SA": r"sa|share ?alike",
    "ND": r"nd|non? ?deriv(?:s|atives?)?(?: works?)?",
}
PORTS = (
    "am ar at au az be bg br ca ch cl cn co cr cz de dk ec ee eg es fi fr gb ge gr gt hk hr hu ie igo il in it jp kr lu mk "
    "mt mx my nl no nz pe ph pl pr pt ro rs se sg si th tw ug uk us ve vn za"
)
"""The jurisdictions to which Creative Commons ported its licences. `nc`, `nd` and `sa` are none of them."""
_TERM = "|".join(f"(?:{words})" for words in TERM_WORDS.values())
_LICENCE = r"(?: (?:public )?licen[cs]e)?"
_VERSION = r"(?:(?: v| version)? (?P<major>[1-4])(?: (?P<minor>[05]))?)?"
_WHERE = rf"(?: (?:international|unported|generic|universal|{PORTS.replace(' ', '|')}))?"
_COMMONS = re.compile(
    rf"(?:the )?(?:(?:cc|creative commons) ?)*(?P<terms>(?:{_TERM})(?: ?(?:{_TERM}))*){_LICENCE}{_VERSION}{_WHERE}{_LICENCE}"
)
_CC0 = re.compile(
    rf"no rights reserved|(?:creative commons )?(?:cc ?(?:0|zero)|creative commons zero){_LICENCE}{_VERSION}{_WHERE}"
    rf"(?: public domain(?: dedication)?)?{_LICENCE}"
)
_PUBLIC_DOMAIN = re.compile(rf"(?:(?:cc )?pdm?|(?:in the )?public ?domain(?: mark)?){_VERSION}(?: work)?")
_RESERVED = re.compile(
    r"all rights reserved|copyright(?:ed)?|alle rechte vorbehalten|tous droits réservés|todos los derechos reservados"
)
_URL = re.compile(r"(?:https?://|www\.|creativecommons\.org/)[^\s()]+")
_DEED = re.compile(
    r"(?:https?://)?(?:www\.)?creativecommons\.org/(?:licen[cs]es/(?P<terms>[a-z-]+)|publicdomain/(?P<public>zero|mark))"
    r"(?:/(?P<version>[1-4]\.[05]))?(?:/[a-z]{2,3})?(?:/(?:legalcode|deed)(?:\.[a-z_-]+)?)?/?(?:[?#]\S*)?"
)
_SOME_RIGHTS = re.compile(r"©[^()]*, (?:some|no) rights reserved \((?P<licence>[^()]+)\)(?:, uploaded by .*)?")


class LicenceError(UserError):
    """A requirement that names no licence."""


@dataclass(frozen=True, slots=True)
class Licence:
    """What may be done with a picture. Of an unknown licence nothing is known to be allowed.

    `name` has no version and reads back as this licence: CC0, public domain, CC-BY, …, all rights reserved, unknown.
    `version` is None where the text names none. `share_alike` binds only who may make derivatives.
    """

    name: str
    version: str | None
    is_known: bool
    allows_commercial: bool
    allows_derivatives: bool
    share_alike: bool


UNKNOWN = Licence("unknown", None, False, False, False, False)
RESERVED = Licence("all rights reserved", None, True, False, False, False)


def parse_licence(text: str) -> Licence:
    """Read a licence text in any of its usual spellings; UNKNOWN where any part of it is not understood.

    The whole text must be the licence: names and deeds of Creative Commons, the credit lines of iNaturalist
    ("(c) Ada, some rights reserved (CC BY-NC)"), GBIF's constants and URLs, or a reservation of all rights. A text that states
    a licence more than once must state the same.
    """
    return _parse(" ".join(unicodedata.normalize("NFKC", text).casefold().split()))


def licence_of(metadata: dict[str, Any]) -> Licence | None:
    """The licence that a picture's metadata states as `license`; None where it is silent."""
    stated = metadata.get("license")
    if stated is None or stated == "":
        return None
    return parse_licence(stated) if isinstance(stated, str) else UNKNOWN


def stated_licence(metadata: dict[str, Any]) -> str:
    """The licence of a picture's metadata as its source puts it, for reports."""
    return str(metadata.get("license") or "no licence is stated")


def strictest(licences: Iterable[Licence]) -> Licence:
    """The most restrictive of one or more licences: what it allows, every one of them allows.

    Where no single one is (CC-BY-NC-SA beside CC-BY-ND), it is the licence with the conditions of all (CC-BY-NC-ND).
    """
    licences = set(licences)
    if not all(licence.is_known for licence in licences):
        return UNKNOWN
    if RESERVED in licences:
        return RESERVED
    names = {licence.name for licence in licences}
    if names <= {"CC0", "public domain"}:
        return _public("CC0" if names == {"CC0"} else "public domain", None)
    terms = {"BY"}
    if not all(licence.allows_commercial for licence in licences):
        terms.add("NC")
    if not all(licence.allows_derivatives for licence in licences):
        terms.add("ND")
    elif any(licence.share_alike for licence in licences):
        terms.add("SA")
    return _commons(frozenset(terms), None)


def licence_inside(stated: Iterable[Licence | None]) -> str | None:
    """What a manifest states of the licences of its samples: the name of the strictest; None where no sample states one."""
    licences = set(stated)
    return strictest(licence or UNKNOWN for licence in licences).name if any(licences) else None


def count_licences(stated: Iterable[Licence | None]) -> dict[str, int]:
    """Samples of each licence by its name, the most frequent first; empty where no sample states one."""
    counts = Counter(stated)
    of_name: Counter[str] = Counter()
    for licence, count in counts.items():
        of_name[(licence or UNKNOWN).name] += count
    return dict(sorted(of_name.items(), key=lambda item: (-item[1], item[0]))) if any(counts) else {}


@dataclass(frozen=True)
class Requirement:
    """Which licences a build accepts: those in `listed`, all that allow commercial use, or any and none."""

    commercial: bool
    listed: tuple[Licence, ...]

    def __str__(self) -> str:
        named = ",".join(f"{one.name} {one.version}" if one.version else one.name for one in self.listed)
        return named or ("commercial" if self.commercial else "any")

    def is_met_by(self, licence: Licence) -> bool:
        """A listed licence without a version stands for each of its versions."""
        if self.listed:
            return any(licence.name == one.name and one.version in (None, licence.version) for one in self.listed)
        return licence.allows_commercial or not self.commercial


ANY_LICENCE = Requirement(commercial=False, listed=())


def parse_requirement(text: str) -> Requirement:
    """Read what `--require-license` says: `any`, `commercial`, or licences separated by commas. Raises LicenceError."""
    if text in ("any", "commercial"):
        return Requirement(commercial=text == "commercial", listed=())
    listed = tuple(parse_licence(name) for name in text.split(","))
    for name, licence in zip(text.split(","), listed, strict=True):
        if not licence.is_known:
            raise LicenceError(
                f"--require-license: {name.strip()!r} names no licence; give any, commercial, or a list such as CC0,CC-BY,CC-BY-SA"
            )
    return Requirement(commercial=False, listed=listed)


@lru_cache(maxsize=4096)
def _parse(text: str) -> Licence:
    """Parse casefolded text without superfluous blanks: every statement in it is a licence, and they agree."""
    text = text.replace("(c)", "©")
    credit = _SOME_RIGHTS.fullmatch(text)
    if credit is not None:
        text = credit["licence"]
    elif text.startswith(("©", "copyright ")):
        # Who may be named in a credit is open; that it grants nothing is not.
        return UNKNOWN if re.search(r"\bcc|creative ?commons|public|some rights|no rights|\blicen", text) else RESERVED
    statements = [_parse_deed(url.rstrip(").,;")) for url in _URL.findall(text)]
    words = _URL.sub(" ", text)
    spans = [*re.findall(r"\(([^()]*)\)", words), re.sub(r"\([^()]*\)", " ", words)]
    statements += [_parse_words(span) for span in spans if re.search(r"\w", span)]
    if len({statement.name for statement in statements}) != 1:
        return UNKNOWN
    versions = {statement.version for statement in statements} - {None}
    if len(versions) > 1:
        return UNKNOWN
    return next((statement for statement in statements if statement.version), statements[0])


def _parse_deed(url: str) -> Licence:
    """The licence of a creativecommons.org address; UNKNOWN for every other address."""
    deed = _DEED.fullmatch(url)
    if deed is None:
        return UNKNOWN
    if deed["public"]:
        return _public("CC0" if deed["public"] == "zero" else "public domain", deed["version"])
    if deed["terms"] == "publicdomain":
        return _public("public domain", None)
    return _of_terms(deed["terms"].upper().split("-"), deed["version"])


def _parse_words(text: str) -> Licence:
    """The licence that words and figures name, whatever stands between them; UNKNOWN where a word is left over."""
    if re.search(r"[^\w\s.,;:/|\"'‐-―-]", text):
        return UNKNOWN
    words = " ".join(re.findall(r"[^\W\d_]+|\d+", text))
    if _RESERVED.fullmatch(words):
        return RESERVED
    for pattern, name in ((_CC0, "CC0"), (_PUBLIC_DOMAIN, "public domain")):
        if match := pattern.fullmatch(words):
            return _public(name, _version_of(match))
    match = _COMMONS.fullmatch(words)
    if match is None:
        return UNKNOWN
    found = re.findall(_TERM, match["terms"])
    terms = [next(term for term, spelling in TERM_WORDS.items() if re.fullmatch(spelling, word)) for word in found]
    return _of_terms(terms, _version_of(match))


def _version_of(match: re.Match[str]) -> str | None:
    version = match.groupdict()
    return f"{version['major']}.{version['minor'] or 0}" if version.get("major") else None


def _of_terms(terms: list[str], version: str | None) -> Licence:
    """The licence of these conditions; UNKNOWN for a set of conditions that no licence has."""
    chosen = frozenset(terms)
    if len(chosen) != len(terms) or "BY" not in chosen or not chosen <= TERM_WORDS.keys() or chosen >= {"SA", "ND"}:
        return UNKNOWN
    return _commons(chosen, version)


@lru_cache(maxsize=256)
def _commons(terms: frozenset[str], version: str | None) -> Licence:
    return Licence(
        name="-".join(["CC", *(term for term in TERM_WORDS if term in terms)]),
        version=version,
        is_known=True,
        allows_commercial="NC" not in terms,
        allows_derivatives="ND" not in terms,
        share_alike="SA" in terms,
    )


@lru_cache(maxsize=256)
def _public(name: str, version: str | None) -> Licence:
    return Licence(name, version, True, True, True, False)
