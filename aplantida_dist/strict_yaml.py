"""YAML read in one way only: what its versions or its readers take differently is refused, with what to write instead.

Built on PyYAML's parser (YAML 1.1 syntax); what a plain word means is decided here and not by PyYAML's resolver, which
reads `1e-3` as text, `on` as true, `010` as 8, `1:30` as 90 and keeps the last of two equal keys. The only importer of yaml.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from aplantida_dist.errors import UserError

MAX_DEPTH = 32

_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("null", "Null", "NULL", "~")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]*)\.[0-9]+([eE][-+][0-9]+)?")
_LIKE_A_NUMBER = re.compile(r"([-+]?)(?=\.?[0-9])([0-9_]*)\.?([0-9_]*)(?:[eE]([-+]?)([0-9]+))?")
_OBJECTIONS = tuple(
    (re.compile(pattern, re.IGNORECASE), objection)
    for pattern, objection in (
        ("", "which means null to some and nothing to others; write null, or a value"),
        ("y|yes|on", 'which some readers take for true and others for text; write true, or "{text}" in quotes'),
        ("n|no|off", 'which some readers take for false and others for text; write false, or "{text}" in quotes'),
        ("none|nil", 'which YAML reads as text; write null, or "{text}" in quotes'),
        (r"[-+]?\.?(inf|infinity|nan)", 'but numbers are finite here; write a number, or "{text}" in quotes'),
        (r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([t ].*)?", 'which some readers take for a date; write "{text}" in quotes'),
        (r"[-+]?[0-9]+(:[0-9]+)+(\.[0-9]*)?", 'which some readers take for base 60; write "{text}" in quotes'),
        (r"[-+]?0[xob][0-9a-f_]+", 'whose base readers disagree on; write a decimal number, or "{text}" in quotes'),
        (r"[-+]?0[0-9_]+", 'which some readers take for octal; write it without the leading 0, or "{text}" in quotes'),
        (r"[-+]?[0-9]+(,[0-9]+)+(\.[0-9]+)?", 'which YAML reads as text; write a decimal point, or "{text}" in quotes'),
        (r"[-+]?[1-9][0-9]{19,}", 'which is too large for a whole number; write a smaller one, or "{text}" in quotes'),
        ("=|<<", 'which is a command of YAML 1.1; write the keys out, or "{text}" in quotes'),
    )
)
_SYNTAX_HINTS = (
    (r"'\t'", "indent with spaces, not with tabs"),
    ("mapping values are not allowed", 'check the indentation, and put text that holds ": " in quotes'),
    ("could not find expected ':'", "write `key: value`, with a space after the colon"),
    ("cannot start any token", "put text that begins with this character in quotes"),
)


class YamlError(UserError):
    """Text that is not YAML, or that is not read in one way only."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a document: its line (from 1), its dotted place ("" for the whole), and what to do about it."""

    line: int
    place: str
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.place + ': ' if self.place else ''}{self.text}"


@dataclass(frozen=True)
class Document:
    """What a text holds: None, bool, int, float, str, and lists and dicts (keys are str) of them.

    `lines` maps each dotted place to its line. Where there are faults, what stands at their places is None.
    """

    content: Any
    lines: dict[str, int]
    faults: tuple[Fault, ...]


def read_yaml(text: str) -> Document:
    """Read a text with all that is wrong in it; a syntax error hides every other fault. Never raises."""
    events: list[yaml.Event] = []
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            events.append(event)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                fault = Fault(_line(event.start_mark), "", f"nested more than {MAX_DEPTH} deep; write it flatter")
                return Document(None, {}, (fault,))
    except yaml.YAMLError as error:
        return Document(None, {}, (_syntax_fault(text, error),))
    walk = _Walk(iter(events))
    content = walk.stream()
    return Document(content, walk.lines, tuple(walk.faults))


def load_yaml(text: str, *, source: str) -> Any:
    """Read a text, None for an empty one. YamlError tells everything that is wrong; `source` says where the text is from."""
    document = read_yaml(text)
    if document.faults:
        raise YamlError(together([f"{source}: {fault}" for fault in document.faults]))
    return document.content


def load_scalar(text: str, *, source: str) -> Any:
    """Read a value that stands alone, such as one from the command line, by the same rules; `[0.5, 1.0]` is a list."""
    document = read_yaml(text)
    texts = [fault.text for fault in document.faults]
    if not text.strip():
        texts = ["nothing is written here; write null, or a value"]
    elif not texts and re.search(r"(^|\s)#", text) and _comment_is_lost(text):
        texts = [f"what follows the # in {text} would be lost as a comment; put the text in quotes"]
    if texts:
        raise YamlError(f"{source}: {'; '.join(texts)}")
    return document.content


def dump_yaml(content: Any) -> str:
    """Write content so that `load_yaml` reads the same again, keys in their order. ValueError for NaN and infinities."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def together(messages: Sequence[str]) -> str:
    """One message as it is; several as a line each under a heading."""
    return messages[0] if len(messages) == 1 else "\n  ".join([f"{len(messages)} errors:", *messages])


class _Walk:
    """A pass over the parser's events that builds the content and notes every fault."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self.lines: dict[str, int] = {}
        self.faults: list[Fault] = []

    def stream(self) -> Any:
        """The content of the stream's one document."""
        contents: list[Any] = []
        for event in self._events:
            if not isinstance(event, yaml.DocumentStartEvent):
                continue
            if contents:
                self._fault(event, "", "a second document begins here; write one document a file")
            if event.version or event.tags:
                self._fault(event, "", "a % directive changes how YAML is read; leave it out")
            contents.append(self._value(next(self._events), ""))
        return contents[0] if contents else None

    def _value(self, event: yaml.Event, place: str) -> Any:
        self.lines.setdefault(place, _line(event.start_mark))
        match event:
            case yaml.AliasEvent():
                return self._fault(event, place, f"found the alias *{event.anchor}; write the value out again")
            case yaml.ScalarEvent():
                self._refuse_marks(event, place)
                return self._scalar(event, place)
            case yaml.SequenceStartEvent():
                self._refuse_marks(event, place)
                return self._sequence(place)
            case yaml.MappingStartEvent():
                self._refuse_marks(event, place)
                return self._mapping(place)

    def _refuse_marks(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent, place: str) -> None:
        if event.anchor is not None:
            self._fault(event, place, f"found the anchor &{event.anchor}; leave it out")
        if event.tag is not None:
            self._fault(event, place, f"found the tag {event.tag}; leave it out")

    def _sequence(self, place: str) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._value(event, _below(place, str(len(items)))))
        return items

    def _mapping(self, place: str) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            name = event.value if isinstance(event, yaml.ScalarEvent) else "?"
            below = _below(place, name)
            num_faults = len(self.faults)
            key = self._value(event, below)
            if not isinstance(key, str) and len(self.faults) == num_faults:
                self._fault(event, below, f'found a key that is not text; write "{name}" in quotes')
            if name in items:
                self._fault(
                    event, below, f"this key stands twice, first on line {self.lines[below]}; leave one of them"
                )
            value = self._value(next(self._events), below)
            items.setdefault(name, value)
        return items

    def _scalar(self, event: yaml.ScalarEvent, place: str) -> Any:
        if event.style is not None:
            return event.value
        if _line(event.start_mark) != _line(event.end_mark):
            return self._fault(event, place, "found text over several lines; write it on one, or in quotes")
        if objection := _objection(event.value):
            return self._fault(event, place, f"found {event.value or 'nothing'}, {objection}")
        return _meaning(event.value)

    def _fault(self, event: yaml.Event, place: str, text: str) -> None:
        self.faults.append(Fault(_line(event.start_mark), place, text))


class _Dumper(yaml.SafeDumper):
    """Quotes whatever text would be refused or read as something else, and writes lists of plain values on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(dumper: _Dumper, text: str) -> yaml.Node:
    is_plain = _objection(text) is None and _meaning(text) == text
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


def _write_float(dumper: _Dumper, number: float) -> yaml.Node:
    if not math.isfinite(number):
        raise ValueError(f"{number} cannot be written; numbers are finite here")
    return dumper.represent_float(number)


def _write_list(dumper: _Dumper, items: list[Any]) -> yaml.Node:
    is_flat = not any(isinstance(item, list | dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=is_flat)


_Dumper.add_representer(str, _write_text)
_Dumper.add_representer(float, _write_float)
_Dumper.add_representer(list, _write_list)


def _meaning(text: str) -> Any:
    """The value of a plain word that nobody objects to."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _objection(text: str) -> str | None:
    """Why a plain word is not read in one way only, and what to write; None where it is."""
    for pattern, objection in _OBJECTIONS:
        if pattern.fullmatch(text):
            return objection.format(text=text)
    if _FLOAT.fullmatch(text):
        return None if math.isfinite(float(text)) else "which is too large for a number; write a smaller one"
    parts = _LIKE_A_NUMBER.fullmatch(text)
    if not parts or _INTEGER.fullmatch(text):
        return None
    sign, whole, fraction, exponent_sign, exponent = (part or "" for part in parts.groups())
    whole, fraction = whole.replace("_", "").lstrip("0") or "0", fraction.replace("_", "")
    if "." not in text and not exponent:
        return f'which not every reader takes for a number; write {sign}{whole}, or "{text}" in quotes'
    power = f"e{exponent_sign or '+'}{exponent}" if exponent else ""
    return f'which not every reader takes for a number; write {sign}{whole}.{fraction or "0"}{power}, or "{text}" in quotes'


def _syntax_fault(text: str, error: yaml.YAMLError) -> Fault:
    """PyYAML's error as one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        hint = next((hint for part, hint in _SYNTAX_HINTS if part in error.problem), "mend it there or just before")
        return Fault(_line(error.problem_mark), "", f"not YAML: {error.problem}; {hint}")
    position = getattr(error, "position", 0)
    what = " ".join(str(error).split())
    return Fault(text.count("\n", 0, position) + 1, "", f"not YAML: {what}; take that character out")


def _comment_is_lost(text: str) -> bool:
    """Whether the last word that YAML reads ends before the text does."""
    written = [
        token for token in yaml.scan(text, Loader=yaml.SafeLoader) if token.end_mark.index > token.start_mark.index
    ]
    return not written or bool(written[-1].end_mark.index < len(text.rstrip()))


def _below(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _line(mark: Any) -> int:
    """The line of one of PyYAML's marks (of the Python parser or the C one), from 1; 1 where there is no mark."""
    return int(mark.line) + 1 if mark else 1
