"""What is wrong with the plain values of a config, told in the words of the person who wrote them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from aplantida_dist.config import SECTIONS, Config, flat
from aplantida_dist.strict_yaml import show

FIELDS: dict[str, FieldInfo] = {name: field for name, field in Config.model_fields.items() if name not in SECTIONS} | {
    f"{section}.{name}": field for section, kind in SECTIONS.items() for name, field in kind.model_fields.items()
}
"""Every field that is no section, by dotted name."""


class Fault(NamedTuple):
    """One thing wrong: its dotted place, and what was found and expected there."""

    place: str
    text: str


def find_faults(content: Mapping[str, Any], *, doubtful: Collection[str]) -> list[Fault]:
    """Everything that breaks the schema, then the fields that are right by themselves and wrong together.

    Nothing is said of what stands in a `doubtful` place or below it, nor of what only follows from another fault.
    """
    written = flat(content)
    # What is left out here is filled with train's, of which everything is said already.
    unjudged = {*doubtful, *({"evaluation.micro_batch_size"} - written.keys())}
    faults = [fault for fault in _schema_faults(content) if not is_within(fault.place, unjudged)]
    broken = {*doubtful, *(fault.place for fault in faults)}
    values = {name: field.default for name, field in FIELDS.items() if not field.is_required()} | written
    sound = {name: value for name, value in values.items() if not is_within(name, broken)}
    return faults + [Fault(place, f"found {show(sound[place])}, expected {text}") for place, text in _relations(sound)]


def is_within(place: str, others: Collection[str]) -> bool:
    """Whether a dotted place is one of the others, or below one of them."""
    return any(f"{place}.".startswith(f"{other}.") for other in others)


def _schema_faults(content: Mapping[str, Any]) -> Iterator[Fault]:
    try:
        Config.model_validate(content)
    except ValidationError as error:
        for details in error.errors():
            place = ".".join(str(part) for part in details["loc"])
            yield Fault(place, _schema_text(place, details))


def _schema_text(place: str, details: ErrorDetails) -> str:
    """What was found and expected, from pydantic's account of it."""
    field = FIELDS.get(place)
    if details["type"] == "extra_forbidden":
        return _unknown_key(place)
    if details["type"] == "missing":
        meaning = re.split(r"\.(?:\s|$)", (field and field.description) or "A value")[0]
        return f"missing, expected {meaning[0].lower()}{meaning[1:]}"
    found, message = details["input"], details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = _EXPECTED.get(details["type"], message)
    if field and type(None) in get_args(field.annotation):
        expected += " or null"
    if details["type"] == "string_type" and isinstance(found, bool | int | float):
        expected += f': write "{show(found)}"'
    return f"found {show(found)}, expected {expected}"


_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "keys with values beneath it",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "mapping_type": "keys with values beneath it",
    "model_type": "keys with values beneath it",
    "string_too_short": "text that is not empty",
    "string_type": "text",
    "too_long": "fewer values in the list",
    "tuple_type": "a list",
}
"""What pydantic's types of errors expect, where its own words speak of Python."""


def _unknown_key(place: str) -> str:
    """Advice on a key that the schema does not know: the same one elsewhere, a like one here, or a like one elsewhere."""
    section, _, key = place.rpartition(".")
    names = {name: name.rpartition(".")[2] for name in (*SECTIONS, *FIELDS)}
    here = [last for name, last in names.items() if name.rpartition(".")[0] == section]
    same = [name for name, last in names.items() if last == key]
    near = _alike(key, list(names.values()))
    meant = same or _alike(key, here) or [name for name, last in names.items() if last in near]
    if meant:
        return f"unknown key; did you mean {' or '.join(meant)}?"
    return f"unknown key; the keys here are {', '.join(here)}"


def _alike(key: str, words: Sequence[str]) -> list[str]:
    """The words that hold the key between underscores; if none does, the one that is spelled most like it."""
    return [word for word in words if f"_{key}_" in f"_{word}_"] or difflib.get_close_matches(key, words, n=1)


def _relations(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The places of fields that do not fit another one, and what is expected there. Names that are absent are not judged."""

    def known(*names: str) -> bool:
        return all(name in values for name in names)

    micro, whole = "train.micro_batch_size", "train.global_batch_size"
    if known(micro, whole) and values[whole] % values[micro]:
        yield micro, f"a divisor of {whole}, {values[whole]}"
    for small, large, reason in _AT_MOST:
        if known(small, large) and values[small] > values[large]:
            yield small, f"at most {large}, {show(values[large])}{reason}"
    if known("model.pretrained", "model.init_from") and values["model.pretrained"] and values["model.init_from"]:
        yield "model.pretrained", "false where model.init_from says what to begin with"
    files, weights = "soft_labels.files", "soft_labels.weights"
    if known(files, weights) and values[weights] is not None and len(values[weights]) != len(values[files]):
        yield weights, f"one number for each of the {len(values[files])} soft_labels.files"
    every, metric, mode = "evaluation.every_epochs", "checkpoint.best_metric", "checkpoint.best_mode"
    if known(metric, every) and values[every] == 0 and values[metric].startswith("val."):
        yield metric, f"a metric of train, such as train.loss, where {every} is 0"
    if known(metric, mode) and (values[mode] == "min") != values[metric].endswith(".loss"):
        yield mode, f"{'max' if values[mode] == 'min' else 'min'} for {metric} {values[metric]}"


_AT_MOST = (
    ("schedule.warmup_epochs", "train.epochs", ""),
    ("schedule.final_lr", "optimizer.peak_lr", ""),
    ("evaluation.every_epochs", "train.epochs", ", so that there is an evaluation; 0 never evaluates"),
)
"""Fields of which the first is at most the second, and why."""
