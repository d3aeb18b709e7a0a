"""Licences are read as licences: a condition is never overlooked, and what is not understood allows nothing."""

from __future__ import annotations

import itertools
import re

import pytest

from aplantida_dist.shards.licence import (
    ANY_LICENCE,
    RESERVED,
    UNKNOWN,
    LicenceError,
    licence_of,
    parse_licence,
    parse_requirement,
    strictest,
)

TERMS = ("BY", "BY-SA", "BY-NC", "BY-NC-SA", "BY-ND", "BY-NC-ND")
LONG = {"BY": "Attribution", "NC": "NonCommercial", "SA": "ShareAlike", "ND": "NoDerivatives"}
SPACED = {"BY": "Attribution", "NC": "Non-Commercial", "SA": "Share Alike", "ND": "No Derivs"}


def spellings(terms: str) -> list[str]:
    """One licence as catalogues, licences and people write it."""
    low, words = terms.lower(), terms.split("-")
    hyphened = "\u2011".join(words)
    long, spaced = "-".join(LONG[word] for word in words), " ".join(SPACED[word] for word in words)
    return [
        f"cc-{low}", f"CC-{terms}", f"CC {terms}", f"CC {terms} 4.0", f"CC-{terms}-4.0", f" cc_{low.replace('-', '_')} ",
        f"CC_{terms.replace('-', '_')}_4_0", low, terms.replace("-", " "), f"cc{low.replace('-', '')}",
        f"CC\u2010{hyphened}", f"CC {hyphened} 3.0", f"CC {terms} 3.0 DE", f"CC {terms} v4.0",
        f"CC-{terms} License", f"CC: {terms}", f"CC {terms} 4", f"CC {terms} 2.5 Unported", f"cc/{low}/4.0",
        f"http://creativecommons.org/licenses/{low}/4.0/", f"https://creativecommons.org/licenses/{low}/4.0",
        f"http://creativecommons.org/licenses/{low}/4.0/legalcode", f"https://www.creativecommons.org/licenses/{low}/2.5/es/",
        f"creativecommons.org/licenses/{low}/3.0/deed.en", f"https://creativecommons.org/licenses/{low}/4.0/?ref=chooser-v1",
        f"HTTPS://CreativeCommons.org/licenses/{terms}/4.0/", f"https://creativecommons.org/licenses/{low}/3.0/igo/legalcode",
        f"https://creativecommons.org/licenses/{low}/4.0/deed.zh-hans",
        long, f"{long} 4.0 International", f"Creative Commons {long}", f"Creative Commons {long} 4.0 International Public License",
        f"{long} License", f"{spaced}", f"Creative Commons {spaced} 4.0", f"Creative Commons {long} 4.0 International (CC {terms} 4.0)",
        f"CC {terms} 4.0 (https://creativecommons.org/licenses/{low}/4.0/)",
        f"(c) Ada Lovelace, some rights reserved (CC {terms})", f"© Jürgen, some rights reserved (CC {terms}), uploaded by Jürgen",
        f"(c) Some, Body, some rights reserved (CC {terms} 4.0)",
    ]  # fmt: skip


@pytest.mark.parametrize("terms", TERMS)
def test_every_spelling_of_a_licence_is_that_licence(terms: str) -> None:
    """Name and permissions are those of its conditions, in each of forty spellings and in capitals."""
    for text in spellings(terms):
        for variant in (text, text.upper(), text.lower()):
            licence = parse_licence(variant)
            assert licence.name == f"CC-{terms}", variant
            assert licence.is_known
            assert licence.allows_commercial == ("NC" not in terms)
            assert licence.allows_derivatives == ("ND" not in terms)
            assert licence.share_alike == ("SA" in terms)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("CC0", "cc0|CC-0|CC0 1.0|CC0_1_0|CC0-1.0|CC Zero|Creative Commons Zero v1.0 Universal|no rights reserved|"
         "CC0 1.0 Universal (CC0 1.0) Public Domain Dedication|https://creativecommons.org/publicdomain/zero/1.0/|"
         "http://creativecommons.org/publicdomain/zero/1.0/legalcode|(c) Ada, no rights reserved (CC0)|CC0 Public Domain"),
        ("public domain", "public domain|Public Domain Mark 1.0|publicdomain|PD|pdm|PDM 1.0|in the public domain|"
         "https://creativecommons.org/publicdomain/mark/1.0/|http://creativecommons.org/licenses/publicdomain/"),
        ("all rights reserved", "all rights reserved|All Rights Reserved.|©|(c)|© Ada Lovelace|(c) Ada, all rights reserved|"
         "Copyright 2020 Ada|copyrighted|Tous droits réservés|© photo by Ada"),
        ("unknown", "|  |unknown|UNSPECIFIED|none|n/a|cc|creative commons|cc-nc|nc|cc-sa|GFDL|MIT|0|by Ada|cc-by-nd-sa|cc-by-by|"
         "CC BY or CC BY-NC|CC BY, CC BY-NC|CC BY 4.0 NC|cc-by NC only|not cc-by|CC BY (non-commercial use only)|"
         "CC BY for non-commercial use|CC BY-NC (CC BY)|CC BY 4.0 https://creativecommons.org/licenses/by-nc/4.0/|no CC0|cc-by-ncx|"
         "https://example.org/licenses/by/4.0/|https://creativecommons.org.example.org/licenses/by/4.0/|cc-by+|"
         "https://creativecommons.org/licenses/by-nc-x/4.0/|not in the public domain|© Ada, CC BY|some rights reserved|"
         "CC BY 3.0 (CC BY 4.0)|https://creativecommons.org/licenses/|cc-by-4.0-nd|xcc-by|by no means public domain|CC BY?"),
    ],
)  # fmt: skip
def test_what_grants_all_or_nothing_or_is_not_understood(name: str, texts: str) -> None:
    """Public domain, reserved rights, and everything that is not wholly a licence: unknown, which allows nothing."""
    for text in texts.split("|"):
        licence = parse_licence(text)
        assert licence.name == name, text
        assert licence.is_known == (name != "unknown")
        assert licence.allows_commercial == licence.allows_derivatives == (name in ("CC0", "public domain"))


@pytest.mark.parametrize("words", ["nc", "-NC", "non-commercial", "(NonCommercial)", "no commercial use", "BY-NC"])
@pytest.mark.parametrize("terms", ["BY", "BY-SA", "BY-ND"])
def test_a_condition_anywhere_is_never_overlooked(terms: str, words: str) -> None:
    """Put into any gap of any spelling, a word of non-commercial use leaves nothing that allows commercial use."""
    for text in spellings(terms):
        if "some rights reserved" in text:
            continue
        for gap in (found.start() for found in re.finditer(r"\b|$", text)):
            changed = f"{text[:gap]} {words} {text[gap:]}"
            assert not parse_licence(changed).allows_commercial, changed


@pytest.mark.parametrize(
    ("text", "version"),
    [("CC BY 4.0", "4.0"), ("CC_BY_NC_2_5", "2.5"), ("cc-by", None), ("CC BY 4", "4.0"), ("CC0 1.0", "1.0"), ("CC BY 3.0 DE", "3.0"),
     ("https://creativecommons.org/licenses/by-sa/2.0/", "2.0"), ("Attribution 4.0 International (CC BY)", "4.0")],
)  # fmt: skip
def test_the_version_is_kept(text: str, version: str | None) -> None:
    """A version stands beside the name, and is None where none is stated."""
    assert parse_licence(text).version == version


def test_non_commercial_pictures_are_not_counted_as_permissive() -> None:
    """The incident: `cc-by` looked for as a substring called 92.4 % permissive; read as licences, 31.2 % allow commercial use."""
    texts = ["cc-by-nc"] * 533 + ["cc-by"] * 260 + ["cc-by-nc-sa"] * 79 + ["cc0"] * 40 + ["cc-by-sa"] * 12 + [""] * 76
    permissive_by_substring = sum("cc-by" in text or "cc0" in text for text in texts)
    assert permissive_by_substring / len(texts) == 0.924
    commercial = parse_requirement("commercial")
    assert sum(commercial.is_met_by(parse_licence(text)) for text in texts) == 260 + 40 + 12


def test_names_read_back_as_their_licence() -> None:
    """Reports and manifests hold names; a name is a spelling of its licence."""
    for name in ("CC0", "public domain", *(f"CC-{terms}" for terms in TERMS), "all rights reserved", "unknown"):
        assert parse_licence(name).name == name


def test_the_strictest_licence_allows_what_all_allow() -> None:
    """Over every set of up to three licences: permissions are the conjunction, and one licence alone is itself."""
    names = ("CC0", "public domain", *(f"CC-{terms}" for terms in TERMS), "all rights reserved", "unknown")
    for size in (1, 2, 3):
        for chosen in itertools.product(names, repeat=size):
            licences = [parse_licence(name) for name in chosen]
            found = strictest(licences)
            assert found.allows_commercial == all(licence.allows_commercial for licence in licences), chosen
            assert found.allows_derivatives == all(licence.allows_derivatives for licence in licences), chosen
            assert found.is_known == all(licence.is_known for licence in licences)
            assert len(set(chosen)) > 1 or found.name == chosen[0]
            assert strictest(reversed(licences)) == found
    assert strictest([parse_licence("CC-BY-ND"), parse_licence("CC-BY-NC-SA 4.0")]).name == "CC-BY-NC-ND"
    assert strictest([parse_licence("CC0"), RESERVED, parse_licence("CC-BY")]) == RESERVED


@pytest.mark.parametrize(
    ("required", "met", "refused"),
    [
        ("any", ["cc-by", "cc-by-nc", "", "©", "what?"], []),
        ("commercial", ["cc0", "pd", "cc-by", "CC BY-SA 4.0", "cc-by-nd"], ["cc-by-nc", "cc-by-nc-nd", "", "©", "what?"]),
        ("cc-by", ["CC BY 4.0", "cc-by"], ["cc-by-nc", "cc-by-sa", "cc0", ""]),
        ("CC0, CC BY-NC", ["cc0", "cc-by-nc", "CC BY-NC 2.0"], ["cc-by", "cc-by-nc-sa", "public domain"]),
        ("CC BY 4.0", ["cc-by-4.0"], ["cc-by", "cc-by-3.0", "cc-by-nc-4.0"]),
    ],
)  # fmt: skip
def test_a_requirement_is_met_by_licences_and_not_by_their_letters(
    required: str, met: list[str], refused: list[str]
) -> None:
    """`cc-by` in a list is CC-BY of any version and nothing else; commercial is what the licence allows."""
    requirement = parse_requirement(required)
    assert [text for text in met + refused if requirement.is_met_by(parse_licence(text))] == met


@pytest.mark.parametrize("text", ["", "permissive", "cc-by,", "cc-by,cc-foo", "unknown", "Commercial"])
def test_a_requirement_that_names_no_licence_is_an_error(text: str) -> None:
    """A misspelt licence would leave out everything, or nothing."""
    with pytest.raises(LicenceError, match="names no licence; give any, commercial, or a list"):
        parse_requirement(text)


def test_silence_is_not_an_unknown_licence() -> None:
    """Metadata without a licence is None; a licence that is no text, or not understood, is unknown."""
    assert licence_of({}) is licence_of({"license": None}) is licence_of({"license": ""}) is None
    assert licence_of({"license": ["cc-by"]}) == licence_of({"license": "whatever"}) == UNKNOWN
    assert ANY_LICENCE.is_met_by(UNKNOWN)
