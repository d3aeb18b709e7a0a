"""YAML read in one way only: what its versions or its readers take differently is refused, with what to write instead.

Built on PyYAML's parser (YAML 1.1 syntax); what a plain word means is decided here and not by PyYAML's resolver, which
reads `1e-3` as text, `on` as true, `010` as 8, `1:30` as 90 and keeps the last of two equal keys. The only importer of yaml.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from aplantida_dist.errors import UserError
from aplantida_dist.yaml_words import meaning, objection

MAX_DEPTH = 32

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
    except (ValueError, OverflowError) as error:
        # PyYAML turns "\U00110000" and the digits of a %YAML directive into numbers without a guard.
        line = _line(events[-1].end_mark) if events else 1
        return Document(None, {}, (Fault(line, "", f"not YAML: {error}; take it out, on this line or below"),))
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
    elif not texts and _comment_is_lost(text):
        texts = [f"what follows the # in {text} would be lost as a comment; put the text in quotes"]
    if texts:
        raise YamlError(f"{source}: {'; '.join(texts)}")
    return document.content


def dump_yaml(content: Any) -> str:
    """Write content so that `load_yaml` reads the same again, keys in their order. ValueError for NaN and infinities."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def show(value: Any) -> str:
    """A value as messages hold it: on one line, text in quotes, numbers as `load_scalar` reads them; cut after 60 characters."""
    # In a list, because PyYAML ends a plain word that stands alone with a line of points.
    listed = yaml.dump(
        [value], Dumper=_Shower, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )
    text = listed.removeprefix("[").removesuffix("]\n")
    return text if len(text) <= 60 else f"{text[:60]}…"


def together(messages: Sequence[str]) -> str:
    """One message as it is; several as a line each under a heading."""
    return messages[0] if len(messages) == 1 else "\n  ".join([f"{len(messages)} errors:", *messages])


@dataclass
class _Walk:
    """A pass over the parser's events that builds the content and notes every fault."""

    events: Iterator[yaml.Event]
    lines: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def stream(self) -> Any:
        """The content of the stream's one document."""
        contents: list[Any] = []
        for event in self.events:
            if not isinstance(event, yaml.DocumentStartEvent):
                continue
            if contents:
                self._fault(event, "", "a second document begins here; write one document a file")
            if event.version or event.tags:
                self._fault(event, "", "a % directive changes how YAML is read; leave it out")
            contents.append(self._value(next(self.events), ""))
        return contents[0] if contents else None

    def _value(self, event: yaml.Event, place: str) -> Any:
        self.lines.setdefault(place, _line(event.start_mark))
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            self._refuse_marks(event, place)
        match event:
            case yaml.AliasEvent():
                return self._fault(event, place, f"found the alias *{event.anchor}; write the value out again")
            case yaml.ScalarEvent():
                return self._scalar(event, place)
            case yaml.SequenceStartEvent():
                return self._sequence(place)
            case yaml.MappingStartEvent():
                return self._mapping(place)

    def _refuse_marks(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent, place: str) -> None:
        if event.anchor is not None:
            self._fault(event, place, f"found the anchor &{event.anchor}; leave it out")
        if event.tag is not None:
            self._fault(event, place, f"found the tag {event.tag}; leave it out")

    def _sequence(self, place: str) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self._value(event, _below(place, str(len(items)))))
        return items

    def _mapping(self, place: str) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
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
            value = self._value(next(self.events), below)
            items.setdefault(name, value)
        return items

    def _scalar(self, event: yaml.ScalarEvent, place: str) -> Any:
        if event.style is not None:
            if any("\ud800" <= character <= "\udfff" for character in event.value):
                return self._fault(
                    event, place, "found half a surrogate pair, which is no text; write the whole character"
                )
            return event.value
        if _line(event.start_mark) != _line(event.end_mark):
            return self._fault(event, place, "found text over several lines; write it on one, or in quotes")
        if reason := objection(event.value):
            return self._fault(event, place, f"found {event.value or 'nothing'}, {reason}")
        return meaning(event.value)

    def _fault(self, event: yaml.Event, place: str, text: str) -> None:
        self.faults.append(Fault(_line(event.start_mark), place, text))


class _Shower(yaml.SafeDumper):
    """Quotes every text, and writes also what could not be read back, such as NaN."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Dumper(_Shower):
    """Quotes whatever text would be refused or read as something else, and writes lists of plain values on one line."""


def _quote(dumper: _Shower, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')


def _write_text(dumper: _Dumper, text: str) -> yaml.Node:
    is_plain = objection(text) is None and meaning(text) == text
    return dumper.represent_scalar("tag:yaml.org,2002:str", text) if is_plain else _quote(dumper, text)


def _write_float(dumper: _Dumper, number: float) -> yaml.Node:
    if not math.isfinite(number):
        raise ValueError(f"{number} cannot be written; numbers are finite here")
    return dumper.represent_float(number)


def _write_list(dumper: _Dumper, items: list[Any]) -> yaml.Node:
    is_flat = not any(isinstance(item, list | dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=is_flat)


_Shower.add_representer(str, _quote)
_Dumper.add_representer(str, _write_text)
_Dumper.add_representer(float, _write_float)
_Dumper.add_representer(list, _write_list)


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
