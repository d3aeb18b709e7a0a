"""Reading a config: a YAML file with dotted overrides over it, and one error that tells every fault."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aplantida_dist.config import SECTIONS, Config, ConfigError
from aplantida_dist.config_faults import Fault, find_faults, is_within
from aplantida_dist.credentials import without_credentials
from aplantida_dist.strict_yaml import YamlError, load_scalar, read_yaml, show, together

COMMAND_LINE = "command line"


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and lay dotted overrides (`train.epochs=3`) over it, the last of equal names.

    Raises one ConfigError that tells everything that is wrong in both.
    """
    document = read_yaml(_read_text(path))
    values, faults = _read_overrides(overrides)
    content = document.content
    if isinstance(content, dict):
        for name, value in values:
            content = _laid_over(content, name, value)
    origin = _Origin(str(path), document.lines, [name for name, _ in values])
    return _checked(content, origin, [*(Fault(fault.place, f"{path}: {fault}") for fault in document.faults), *faults])


@dataclass(frozen=True)
class _Origin:
    """Where values are from: a source, in which the dotted places have lines, and names that the command line set."""

    source: str
    lines: Mapping[str, int]
    overridden: Collection[str]

    def of(self, place: str) -> str:
        """The command line, or the source with its line where that is known."""
        # A section that holds an override may still be the file's; a field that holds one is not.
        holds_one = place not in SECTIONS and any(is_within(name, [place]) for name in self.overridden)
        if holds_one or is_within(place, self.overridden):
            return COMMAND_LINE
        return f"{self.source}: line {self.lines[place]}" if place in self.lines else self.source


def _checked(content: Any, origin: _Origin, earlier: Sequence[Fault]) -> Config:
    """The config, or one ConfigError that tells the faults of reading it, whole messages by now, and all that it finds."""
    messages = [fault.text for fault in earlier]
    if isinstance(content, dict):
        found = find_faults(content, doubtful={fault.place for fault in earlier if fault.place})
        messages += [f"{origin.of(fault.place)}: {fault.place}: {fault.text}" for fault in found]
    elif not earlier:
        messages.append(f"{origin.source}: found {show(content)}, expected the sections of a config")
    if messages:
        raise ConfigError(without_credentials(together(messages)))
    return Config.model_validate(content)


def _read_overrides(overrides: Sequence[str]) -> tuple[list[tuple[str, Any]], list[Fault]]:
    """The names and values of `name=value` texts, and what is wrong with the others."""
    values: list[tuple[str, Any]] = []
    faults: list[Fault] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not all(name.split(".")):
            expected = "expected name=value, such as train.epochs=3"
            faults.append(Fault("", f"{COMMAND_LINE}: found {override!r}, {expected}"))
            continue
        try:
            values.append((name, load_scalar(text, source=f"{COMMAND_LINE}: {name}")))
        except YamlError as error:
            shell = f" that the shell leaves alone: '{name}=\"{text}\"'" if str(error).endswith("in quotes") else ""
            faults.append(Fault(name, f"{error}{shell}"))
    return values, faults


def _laid_over(content: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The content with another value of a dotted name, and the sections on its way."""
    key, _, below = name.partition(".")
    if below:
        inside = content.get(key)
        value = _laid_over(inside if isinstance(inside, dict) else {}, below, value)
    return {**content, key: value}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(str(other) for other in path.parent.glob("*.yaml"))
        near = difflib.get_close_matches(str(path), beside, n=1) or beside
        hint = f"there is {', '.join(near)}" if near else "configs/demo.yaml is one to begin with"
        raise ConfigError(f"{path}: no config here; {hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; name a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
