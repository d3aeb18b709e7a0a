"""Laws of strict YAML: one reading or none, every fault at once, and what is written is read back."""

from __future__ import annotations

import itertools
import math
import random
import re
from typing import Any

import pytest
import yaml

from aplantida_dist.strict_yaml import YamlError, dump_yaml, load_scalar, load_yaml, read_yaml, show

CORE_INTEGER = re.compile(r"[-+]?[0-9]+")
CORE_OTHER_INTEGER = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
CORE_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def read_by_core_schema(word: str) -> Any:
    """What the core schema of YAML 1.2 makes of a plain number-like word."""
    if CORE_INTEGER.fullmatch(word):
        return int(word)
    if CORE_OTHER_INTEGER.fullmatch(word):
        return int(word, 0)
    return float(word) if CORE_FLOAT.fullmatch(word) else word


def fault_of(text: str) -> str:
    with pytest.raises(YamlError) as caught:
        load_yaml(text, source="config.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *[
            ("3", 3),
            ("-2", -2),
            ("+1", 1),
            ("0", 0),
            ("0.5", 0.5),
            ("1.0e-3", 1e-3),
            ("1.0E-3", 1e-3),
            ("2.5e+4", 2.5e4),
        ],
        *[("true", True), ("False", False), ("null", None), ("~", None)],
        *[("eu_sw", "eu_sw"), ("shards/demo", "shards/demo"), ("1.2.3", "1.2.3"), ("2024-01-01-run", "2024-01-01-run")],
        *[('"on"', "on"), ("'1e-3'", "1e-3"), ('""', ""), ("[0.5, 1.0]", [0.5, 1.0]), ("{a: 1}", {"a": 1})],
    ],
)
def test_a_word_that_everyone_reads_alike_has_that_value(word: str, value: Any) -> None:
    """Decimal numbers, true, false, null, quoted text and plain text are read as they look."""
    read = load_scalar(word, source="test")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        *[("1e-3", "1.0e-3"), ("1e3", "1.0e+3"), ("1.0e3", "1.0e+3"), ("1.e-3", "1.0e-3"), ("1_000", "1000")],
        *[(".5", "0.5"), ("-.5", "-0.5"), ("5.", "5.0"), ("01.5", "1.5"), ("1_0.5", "10.5")],
        *[("on", "true"), ("Yes", "true"), ("y", "true"), ("off", "false"), ("NO", "false"), ("n", "false")],
        *[("None", "null"), ("none", "null")],
    ],
)
def test_a_refused_word_comes_with_one_that_is_read(word: str, advice: str) -> None:
    """A hint names a spelling that passes, and the word itself in quotes."""
    fault = fault_of(f"a:\n  b: {word}\n")
    assert fault.startswith(f"config.yaml: line 2: a.b: found {word}, ")
    assert re.search(rf"write {re.escape(advice)}[,;]", fault)
    assert f'"{word}" in quotes' in fault
    assert "\n" not in fault
    load_scalar(advice, source="test")
    assert load_scalar(f'"{word}"', source="test") == word


@pytest.mark.parametrize(
    "word", "010 08 00 0o10 0x10 0b1 1:30 12:30:15 1:30.5 2024-01-01 1,5 .inf -.inf nan NaN = <<".split()
)
def test_words_without_a_better_number_are_refused_with_quotes(word: str) -> None:
    """Octal, base 60, dates, decimal commas, infinities, NaN and YAML's own commands are never guessed at."""
    assert f'"{word}" in quotes' in fault_of(f"a: {word}")


def test_what_is_accepted_means_the_same_in_yaml_1_1_and_1_2() -> None:
    """Every word of up to four of these characters that passes has one value: PyYAML's, and that of YAML 1.2's core schema."""
    accepted = 0
    for length in range(1, 5):
        for characters in itertools.product("01.e+-_x", repeat=length):
            word = "".join(characters)
            document = read_yaml(word)
            if document.faults or isinstance(document.content, list | dict) or word == "---":
                continue
            accepted += 1
            assert document.content == yaml.safe_load(word) == read_by_core_schema(word), word
            assert type(document.content) is type(read_by_core_schema(word)), word
    assert accepted > 100


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: a: this key stands twice, first on line 1"),
        ("a: &x 1", "line 1: a: found the anchor &x"),
        ("a: [1]\nb: *a", "line 2: b: found the alias *a"),
        ("a: &x [1]\nb: *x", "line 2: b: found the alias *x"),
        ("a: &x [*x]", "line 1: a.0: found the alias *x"),
        ("<<: {a: 1}", "line 1: <<: found <<"),
        ("a: !!str 3", "line 1: a: found the tag"),
        ("a: !!python/name:os.system x", "line 1: a: found the tag"),
        ("a: 1\n---\nb: 2", "line 2: a second document begins here"),
        ("%YAML 1.2\n---\na: 1", "line 1: a % directive"),
        ("1: a", 'line 1: 1: found a key that is not text; write "1" in quotes'),
        ("? [a]\n: 1", "found a key that is not text"),
        ("on: 1", "line 1: on: found on"),
        ("a:", "line 1: a: found nothing"),
        ("a: one\n  two", "line 1: a: found text over several lines"),
        ("a: 1.0e+400", "line 1: a: found 1.0e+400, which is too large"),
        ("a: 99999999999999999999", "which is too large"),
        ("a:\n\tb: 1", "line 2: not YAML: found character '\\t' that cannot start any token; indent with spaces"),
        ("a: b: c", "line 1: not YAML: mapping values are not allowed here; check the indentation"),
        ("a: [1, 2", "not YAML: expected ',' or ']'"),
        ("a: @x", "put text that begins with this character in quotes"),
        ("a: 1\nb: \x01", "line 2: not YAML: unacceptable character"),
        ("[" * 100, "nested more than 32 deep"),
    ],
)
def test_structure_that_readers_differ_on_is_refused(text: str, part: str) -> None:
    """Each fault is one line with its line number and what to do."""
    lines = [line for line in fault_of(text).splitlines() if not line.endswith("errors:")]
    assert any(part in line for line in lines)
    assert all(re.match(r"\s*config\.yaml: line \d+: .*; ", line) for line in lines)


def test_every_fault_is_told_at_once() -> None:
    """A message of several faults is a line each under one heading."""
    lines = fault_of("a: on\nb: [1e-3, 010]\nc: &x 1\nd: *x\na: 2\n").splitlines()
    assert lines[0] == "6 errors:"
    assert [line.split(": ")[1:3] for line in lines[1:]] == [
        ["line 1", "a"],
        ["line 2", "b.0"],
        ["line 2", "b.1"],
        ["line 3", "c"],
        ["line 4", "d"],
        ["line 5", "a"],
    ]


@pytest.mark.parametrize("text", ["run #3", "#3", "[1, 2] # two", "'3'# three", ""])
def test_a_value_that_stands_alone_loses_nothing(text: str) -> None:
    """What YAML would drop as a comment, and an empty value, are errors on the command line."""
    with pytest.raises(YamlError, match=r"^report\.name: (what follows the #|nothing is written)"):
        load_scalar(text, source="report.name")
    assert load_scalar(f'"{text}"', source="report.name") == text


def test_what_is_written_is_read_back() -> None:
    """dump_yaml and load_yaml are inverse, on awkward text and numbers in 300 random nestings."""
    draw = random.Random(0)
    words = [
        "on",
        "1e-3",
        "010",
        "",
        " a ",
        "a: b",
        "x #y",
        "null",
        "None",
        "é\n b",
        "'",
        '"',
        "- a",
        "\t",
        "*a",
        "<<",
        "a" * 300,
    ]
    leaves = [*words, 0, -7, 10**18, 1e-05, 1e22, 5e-324, 0.1, -0.0, True, False, None]

    def content(depth: int) -> Any:
        match draw.randrange(3) if depth else 0:
            case 1:
                return [content(depth - 1) for _ in range(draw.randrange(4))]
            case 2:
                return {word: content(depth - 1) for word in draw.sample(words, draw.randrange(4))}
            case _:
                return draw.choice(leaves)

    for _ in range(300):
        wanted = {"a": content(4), "b": content(4)}
        assert load_yaml(dump_yaml(wanted), source="test") == wanted


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *[(1e-05, "1.0e-05"), (-1e22, "-1.0e+22"), (0.5, "0.5"), (3, "3"), (True, "true"), (None, "null")],
        *[("val", '"val"'), ("on", '"on"'), ("", '""'), ("a: 'é'\n", "\"a: 'é'\\n\"")],
        *[([1e-07, [2.0, "x"]], '[1.0e-07, [2.0, "x"]]'), ({"b": {}, "a": [0]}, '{"b": {}, "a": [0]}'), ([], "[]")],
    ],
)
def test_what_a_message_shows_can_be_copied_back(value: Any, shown: str) -> None:
    """A value is shown on one line in a spelling that is read as that value."""
    assert show(value) == shown
    assert load_scalar(shown, source="test") == value


def test_what_a_message_shows_is_short() -> None:
    """A long value is cut, and says so."""
    assert show("a" * 58) == f'"{"a" * 58}"'
    assert show("a" * 59) == f'"{"a" * 59}…'


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_could_not_be_read_back_is_not_written(number: float) -> None:
    """NaN and infinities raise in place of being written."""
    with pytest.raises(ValueError, match="numbers are finite"):
        dump_yaml({"a": [number]})


def test_an_empty_text_is_none() -> None:
    """Nothing, or comments alone, is no content and no fault."""
    assert load_yaml("# only this\n", source="test") is None
