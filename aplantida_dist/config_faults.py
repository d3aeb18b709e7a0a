"""What is wrong with the plain values of a config, told in the words of the person who wrote them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from aplantida_dist.config import SECTIONS, Config, flat
from aplantida_dist.config_sections import is_loss
from aplantida_dist.credentials import without_credentials
from aplantida_dist.data.address import SCHEMES, Address, AddressError, place_of
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
    faults += [Fault(place, _CREDENTIALS) for place, value in written.items() if _may_hold_secrets(str(value))]
    broken = {*doubtful, *(fault.place for fault in faults)}
    values = {name: field.default for name, field in FIELDS.items() if not field.is_required()} | written
    # Where an element of a list is broken, so is the list.
    sound = {name: values[name] for name in values if not any(_touch(name, place) for place in broken)}
    return faults + [Fault(place, f"found {show(sound[place])}, expected {text}") for place, text in _relations(sound)]


_CREDENTIALS = "found a URL with a user, a password or a query in it, which config.yaml, the checkpoints and W&B would show; take it out"


def _may_hold_secrets(text: str) -> bool:
    """Whether a text has what is not to be shown; the address of a dataset has no query."""
    return without_credentials(text) != text


def is_within(place: str, others: Collection[str]) -> bool:
    """Whether a dotted place is one of the others, or below one of them."""
    return any(f"{place}.".startswith(f"{other}.") for other in others)


def _touch(one: str, other: str) -> bool:
    """Whether one of two dotted places is the other, or below it."""
    return is_within(one, [other]) or is_within(other, [one])


def _schema_faults(content: Mapping[str, Any]) -> Iterator[Fault]:
    try:
        Config.model_validate(content)
    except ValidationError as error:
        # Of `a number or a word` pydantic tells two errors, each in a place of its own below the field: the first is told.
        first: dict[str, ErrorDetails] = {}
        for details in error.errors():
            first.setdefault(_place_of(details), details)
        for place, details in first.items():
            yield Fault(place, _schema_text(place, details))


def _place_of(details: ErrorDetails) -> str:
    place = ".".join(str(part) for part in details["loc"])
    field = next((name for name in FIELDS if is_within(place, [name]) and _words_of(FIELDS[name])), None)
    return field or place


def _words_of(field: FieldInfo) -> list[str]:
    """The words that may stand in the place of another type's value."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    literals = [kind for kind in kinds if get_origin(kind) is Literal]
    return [str(word) for literal in literals for word in get_args(literal)] if len(kinds) > len(literals) else []


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
    expected = " or ".join([expected, *(_words_of(field) if field else [])])
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
    if known(micro, whole) and values[micro] != "auto" and values[whole] % values[micro]:
        yield micro, f"a divisor of {whole}, {values[whole]}"
    if known("data.lanes", micro, whole):
        yield from _lane_relations(values["data.lanes"], values[micro], values[whole])
    for small, large, reason in _AT_MOST:
        if known(small, large) and values[small] > values[large]:
            yield small, f"at most {large}, {show(values[large])}{reason}"
    if known("model.pretrained", "model.init_from") and values["model.pretrained"] and values["model.init_from"]:
        yield "model.pretrained", "false where model.init_from says what to begin with"
    off, epochs = "mixing.last_epochs_off", "train.epochs"
    if known(off, epochs) and values[off] >= values[epochs]:
        yield off, f"fewer than {epochs}, {values[epochs]}"
    if known(micro, *_ALPHAS) and values[micro] == 1 and any(values[name] for name in _ALPHAS):
        yield micro, f"at least 2 where {' or '.join(_ALPHAS)} mixes the pictures of a micro-batch"
    for name in ("loss.focal_gamma", "loss.logit_adjustment"):
        if known("loss.kind", name) and values["loss.kind"] == "binary_cross_entropy" and values[name]:
            yield name, "0 where loss.kind is binary_cross_entropy: it speaks of softmax probabilities"
    yield from _place_relations(values)
    yield from _sampling_relations(values)
    teachers, weights = "distillation.teachers", "distillation.teacher_weights"
    if known(teachers, weights) and values[teachers] and len(values[weights]) not in (0, len(values[teachers])):
        yield weights, f"one number for each of the {len(values[teachers])} of {teachers}, or none"
    soft, label = "distillation.soft_share", "distillation.label_share"
    if known(soft, label) and values[soft] == values[label] == 0:
        yield label, f"above 0 where {soft} is 0, or nothing would be learned"
    files, weights = "soft_labels.files", "soft_labels.weights"
    if known(files, weights) and values[weights] is not None and len(values[weights]) != len(values[files]):
        yield weights, f"one number for each of the {len(values[files])} soft_labels.files"
    if known(files, teachers) and values[files] and values[teachers]:
        yield teachers, f"empty where {files} names what teachers said: one or the other"
    if known(files, *_ALPHAS) and values[files] and any(values[name] for name in _ALPHAS):
        yield files, f"empty where {' or '.join(_ALPHAS)} mixes pictures: a soft label is that of one picture"
    if known(micro, "evaluation.micro_batch_size") and values["evaluation.micro_batch_size"] == "auto" != values[micro]:
        yield "evaluation.micro_batch_size", f"a number, or {micro} to be auto as well"
    if known("train.clip_agc", "train.clip_norm") and values["train.clip_agc"] and values["train.clip_norm"]:
        yield "train.clip_agc", "null beside train.clip_norm, or train.clip_norm null"
    yield from _decay_relations(values)
    if values.get("train.parallel") == "fsdp":
        yield from _fsdp_relations(values)
    yield from _metric_relations(values, metric="checkpoint.best_metric", mode="checkpoint.best_mode")
    if values.get("stopping.patience_epochs") is not None:
        yield from _metric_relations(values, metric="stopping.metric", mode="stopping.mode")


def _lane_relations(lanes: int, micro: int | str, whole: int) -> Iterator[tuple[str, str]]:
    """Lanes share the micro-batches of a step evenly; which size `auto` will find is not known yet."""
    num_slots = whole if micro == "auto" else whole // int(micro)
    if num_slots % lanes:
        of = "train.global_batch_size" if micro == "auto" else "the number of micro-batches of a step"
        yield "data.lanes", f"a divisor of {of}, {num_slots}"


def _metric_relations(values: Mapping[str, Any], *, metric: str, mode: str) -> Iterator[tuple[str, str]]:
    """What a metric of the history expects of the evaluation, and of the mode beside it."""
    every = "evaluation.every_epochs"
    if {metric, every} <= values.keys() and values[every] == 0 and not values[metric].startswith("train."):
        yield metric, f"a metric of train, such as train.loss, where {every} is 0"
    if {metric, "ema.decay"} <= values.keys() and values[metric].startswith("val_ema.") and values["ema.decay"] is None:
        yield metric, "a metric of train or val where ema.decay is null"
    if {metric, mode} <= values.keys() and (values[mode] == "min") != is_loss(values[metric]):
        yield mode, f"{'max' if values[mode] == 'min' else 'min'} for {metric} {values[metric]}"


def _place_relations(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a dataset's place may be, and what it needs."""
    dataset, cache_dir = "data.dataset", "data.cache_dir"
    try:
        is_address = dataset in values and isinstance(place_of(values[dataset]), Address)
    except AddressError:
        yield dataset, f"a path, or an address of {', '.join(SCHEMES)}"
        return
    if is_address and cache_dir in values and values[cache_dir] is None:
        yield (
            cache_dir,
            f"a folder on this machine's own disk where {dataset} is an address: shards are read from there",
        )


def _sampling_relations(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Sampling evens the classes out; what does so by their train counts would do it a second time."""
    exponent = "data.sampling_exponent"
    for name, off in (("loss.logit_adjustment", 0.0), ("loss.class_weights", None)):
        if {exponent, name} <= values.keys() and values[exponent] < 1.0 and values[name] != off:
            yield (
                name,
                f"{show(off)} where {exponent} is below 1: both even out the classes, by counts that hold for one alone",
            )


_ALPHAS = ("mixing.mixup_alpha", "mixing.cutmix_alpha")


def _decay_relations(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A wsd schedule says when it falls, and has warmed up by then."""
    kind, decay, warmup, epochs = (
        values.get(name)
        for name in ("schedule.kind", "schedule.decay_epochs", "schedule.warmup_epochs", "train.epochs")
    )
    if kind != "wsd" or "schedule.decay_epochs" not in values:
        return
    if decay is None:
        yield "schedule.decay_epochs", "the number of epochs in which wsd falls to final_lr"
    elif warmup is not None and epochs is not None and warmup <= epochs < warmup + decay:
        yield (
            "schedule.decay_epochs",
            f"at most {show(epochs - warmup)}, what train.epochs has left after schedule.warmup_epochs",
        )


def _fsdp_relations(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What does not go with parameters of which each rank holds a part."""
    where = "where train.parallel is fsdp"
    for name, fitting, reason in _WHOLE_PARAMETERS_ONLY:
        if name in values and values[name] != fitting:
            yield name, f"{show(fitting)} {where}: {reason}"
    if values.get("train.micro_batch_size") == "auto":
        yield "train.micro_batch_size", f"a number {where}: its trials hold the whole model"
    if "optimizer.name" in values and values["optimizer.name"] not in FSDP_OPTIMIZERS:
        yield "optimizer.name", f"one of {', '.join(FSDP_OPTIMIZERS)} {where}"
    if dict(values.get("optimizer.kwargs") or {}).get("caution"):
        yield "optimizer.kwargs", f"no caution {where}: it needs the mean over whole weights"


FSDP_OPTIMIZERS = (
    *("adam", "adamax", "adamw", "adan", "adanw", "adopt", "adoptw", "lamb", "lars", "lion", "momentum", "nadam"),
    *("nadamw", "radam", "radamw", "rmsprop", "rmsproptf", "sgd", "sgdw"),
)
"""timm's names of optimizers that move parts of a parameter as they would the whole; a test holds each of them."""

_WHOLE_PARAMETERS_ONLY = (
    ("model.channels_last", False, "FSDP2 takes contiguous parameters alone"),
    ("model.compile", None, "the two have not been tested together"),
    ("model.sync_batchnorm", False, "the two have not been tested together"),
    ("train.clip_agc", None, "it needs the norm of whole units"),
)
"""Fields, their values that go with fsdp, and why others do not."""

_AT_MOST = (
    ("schedule.warmup_epochs", "train.epochs", ""),
    ("model.head_only_epochs", "train.epochs", ""),
    ("schedule.final_lr", "optimizer.peak_lr", ""),
    ("evaluation.every_epochs", "train.epochs", ", so that there is an evaluation; 0 never evaluates"),
)
"""Fields of which the first is at most the second, and why."""
