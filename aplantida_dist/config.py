"""The config: what a run is asked to do, as typed and frozen sections read from strict YAML and dotted overrides."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from aplantida_dist.errors import UserError
from aplantida_dist.files import digest
from aplantida_dist.strict_yaml import YamlError, load_scalar, read_yaml, together

FREE_FIELDS = frozenset(
    {
        "data.dataset",  # the manifests' digests identify the data, wherever it lies
        "data.num_workers",
        "data.prefetch_micro_batches",
        "train.epochs",
        "train.log_every_steps",
        "train.timeout_s",
        "evaluation.every_epochs",
    }
)
"""Fields that a resumed run may change: they decide how fast, how long or how often, but no number of a given step."""

FREE_SECTIONS = frozenset({"checkpoint", "report"})


class ConfigError(UserError):
    """A config that cannot be read, breaks its schema, or holds a key that nothing reads. It tells everything at once."""


class Change(NamedTuple):
    """One field that differs between two configs: its dotted name and both values."""

    name: str
    old: Any
    new: Any


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the smaller bound first")
    return pair


def _argument(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    if not all(item is None or isinstance(item, bool | int | float | str) for item in items):
        raise ValueError("a number, text, true, false, null, or a list of them")
    return value


def _metric(name: str) -> str:
    split, _, metric = name.partition(".")
    if split not in ("train", "val") or metric not in ("loss", "top1", "top5", "macro_top1"):
        raise ValueError("train or val, a point, and loss, top1, top5 or macro_top1")
    return name


Share = Annotated[float, Field(ge=0.0, le=1.0)]
Area = Annotated[float, Field(gt=0.0, le=1.0)]
Ratio = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Arguments = Mapping[str, Annotated[Any, AfterValidator(_argument)]]


class Section(BaseModel):
    """Fields that belong together. It notes which of them were read, so that a key that nothing reads can be an error.

    A read is an attribute access (`config.data.image_size`). Validation, `to_dict`, comparison, printing and copying go
    past attribute access and are none. Equality is that of the values, whatever was read.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )
    _read: set[str] = PrivateAttr(default_factory=set)

    if not TYPE_CHECKING:  # a typed __getattribute__ would make every misspelt attribute pass the type checker

        def __getattribute__(self, name: str) -> Any:
            if name in type(self).__pydantic_fields__:
                super().__getattribute__("__pydantic_private__")["_read"].add(name)  # ten times as fast as self._read
            return super().__getattribute__(name)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def unread(self) -> list[str]:
        """The fields that were set to something else than their default and never read since, in their order."""
        fields, values = type(self).__pydantic_fields__, vars(self)
        return [
            name
            for name in fields
            if name in self.model_fields_set and name not in self._read and values[name] != fields[name].default
        ]


class DataSection(Section):
    """Which pictures, and what is done to them."""

    dataset: Text
    """Folder of a built dataset (`shards/README.md`), from where the command is run."""
    image_size: Count = 224
    """Side of the square that the model sees, in pixels. Source: ImageNet practice (AlexNet, VGG)."""
    crop_scale: Annotated[tuple[Area, Area], Field(strict=False), AfterValidator(_ordered)] = (0.35, 1.0)
    """Smallest and largest share of the picture's area that a training crop covers, each in (0, 1].

    Source: Inception's crop (Szegedy et al. 2015), with 0.35 for its 0.08: a leaf's outline must stay in the picture.
    """
    crop_ratio: Annotated[tuple[Ratio, Ratio], Field(strict=False), AfterValidator(_ordered)] = (0.75, 1.3333)
    """Smallest and largest width / height of a training crop, above 0. Source: Szegedy et al. 2015."""
    horizontal_flip: Share = 0.5
    """Probability that a training picture is mirrored, in [0, 1]. Source: ImageNet practice."""
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Processes a rank that read and decode; 0 does it in the rank's own. Changes the speed and nothing else."""
    prefetch_micro_batches: Count = 4
    """Micro-batches that each worker keeps ready; at least 1. Changes the speed and nothing else."""
    block_samples: Count = 262144
    """Samples that are shuffled together; at least 1, and more than the split holds shuffles all of it (DESIGN §4)."""


class ModelSection(Section):
    """Which timm model."""

    name: Text
    """Name of the model in timm (`timm.list_models()`)."""
    pretrained: bool = False
    """Whether to begin with timm's pretrained weights; the head is new whenever the classes are."""
    kwargs: Arguments = {}
    """Further arguments of `timm.create_model`, such as drop_path_rate. Image size and number of classes come by themselves."""


class OptimizerSection(Section):
    """Which optimizer. Its rate at each step comes from the schedule."""

    name: Text = "adamw"
    """Name of the optimizer in timm (`timm.optim.list_optimizers()`). Source: Loshchilov & Hutter 2019."""
    peak_lr: Annotated[float, Field(gt=0.0)]
    """Learning rate at the end of the warm-up, above 0, for train.global_batch_size as written: it is never rescaled."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    """Decoupled weight decay, at least 0; biases and norms are left out. Source: ViT fine-tuning (MAE, DeiT)."""
    kwargs: Arguments = {}
    """Further arguments of the optimizer, such as betas."""


class ScheduleSection(Section):
    """How the learning rate moves with the step."""

    kind: Literal["cosine", "linear", "constant"]
    """Its course from peak_lr, after the warm-up, to final_lr at the end. Source of cosine: Loshchilov & Hutter 2017."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.0
    """Epochs, also fractions of one, of linear rise to peak_lr; from 0 to train.epochs. Source: Goyal et al. 2017."""
    final_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate at the end, from 0 to peak_lr. A constant schedule does not read it."""


class LossSection(Section):
    """What is minimised: cross-entropy."""

    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the target that is spread over all classes, in [0, 1). Source: Szegedy et al. 2016."""


class TrainSection(Section):
    """How long, in which portions, how precisely."""

    epochs: Count
    """Passes over the train split; at least 1."""
    global_batch_size: Count
    """Samples a step, over all ranks; at least 1."""
    micro_batch_size: Count
    """Samples that are forwarded at once; at least 1, and global_batch_size is a multiple of it."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward and backward pass; weights stay fp32, and fp16 scales its loss."""
    clip_norm: Annotated[float, Field(gt=0.0)] | None = None
    """Largest norm of a step's gradient, above 0; null does not clip. Source: Pascanu et al. 2013."""
    log_every_steps: Count = 10
    """Steps between two lines of progress; at least 1."""
    timeout_s: Count = 600
    """Seconds that a rank waits for the others before the run ends with an error; at least 1."""


class EvaluationSection(Section):
    """When and how the val split is evaluated."""

    every_epochs: Annotated[int, Field(ge=0)] = 1
    """Epochs from one evaluation to the next, at most train.epochs; 0 never evaluates."""
    micro_batch_size: Count
    """Samples that are forwarded at once; at least 1. Left out, it is train.micro_batch_size."""


class CheckpointSection(Section):
    """What is kept of a run beside its history."""

    every_steps: Count | None = None
    """Steps between two checkpoints within an epoch, at least 1; null saves at the end of epochs only."""
    keep_last: Count = 2
    """Newest checkpoints that are kept, at least 1; the best one is kept besides."""
    best_metric: Annotated[str, AfterValidator(_metric)] = "val.top1"
    """Metric that chooses the best checkpoint: split.name, as in a row of the history."""
    best_mode: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value of best_metric is best."""


class ReportSection(Section):
    """How W&B hears of the run."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    """offline writes into the run folder for `wandb sync`; online needs an account."""
    project: Text = "aplantida"
    """W&B project."""
    name: Text | None = None
    """Name of the run in W&B; null takes the run folder's."""
    tags: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """W&B tags."""


class Config(Section):
    """Everything that a run is asked to do. Made by `load_config` and `parse_config`, which also hold what relates two fields."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """From which all randomness is derived; 0 to 2^63 − 1."""
    data: DataSection
    model: ModelSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    loss: LossSection
    train: TrainSection
    evaluation: EvaluationSection
    checkpoint: CheckpointSection
    report: ReportSection

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, content: Any) -> Any:
        return _filled(content) if isinstance(content, dict) else content

    def to_dict(self) -> dict[str, Any]:
        """The resolved config, every default filled in, as plain values; `parse_config` makes an equal Config of it."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """The sha256 (hex) of the resolved config."""
        return digest(self.to_dict())

    def law_fields(self) -> dict[str, Any]:
        """The fields that decide the numbers of a run, by dotted name: what a resumed run must find unchanged."""
        return {
            name: value
            for name, value in flat(self.to_dict()).items()
            if name not in FREE_FIELDS and name.partition(".")[0] not in FREE_SECTIONS
        }

    def require_all_read(self) -> None:
        """Raise ConfigError for every field that was set and that nothing has read, such as final_lr of a constant schedule.

        To be called when everything is composed, before the first step. A value equal to its default is not held against
        anyone, so that a resolved config, which states every default, can be run again.
        """
        names = [name for name in self.unread() if name not in SECTIONS]
        for section in SECTIONS:
            names += [f"{section}.{name}" for name in vars(self)[section].unread()]
        if names:
            values = flat(self.to_dict())
            advice = "but nothing reads it under this config; take it out"
            raise ConfigError(together([f"{name}: is set to {_shown(values[name])}, {advice}" for name in names]))


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
"""The sections of a config by name, in their order."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and lay dotted overrides (`train.epochs=3`) over it, the last of equal names.

    Raises one ConfigError that tells everything that is wrong in both.
    """
    return _Draft.of_file(path, overrides).config()


def parse_config(content: Any, *, source: str) -> Config:
    """Check plain values against the schema; `source` says in errors where they are from."""
    return _Draft(content, source=source).config()


def load_debug_config(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, list[Change]]:
    """Read a config and make it small and fast on one device, beneath the overrides; also returns what that changed."""
    draft = _Draft.of_file(path, overrides)
    asked = draft.config()
    content = asked.to_dict()
    for name, value in debug_overrides(asked, fixed=frozenset(draft.overrides)).items():
        _put(content, name, value)
    debug = _Draft(content, source=f"{path} under --debug")
    for name, value in draft.overrides.items():
        debug.override(name, value)
    config = debug.config()
    old, new = flat(asked.to_dict()), flat(config.to_dict())
    return config, [Change(name, old[name], new[name]) for name in old if old[name] != new[name]]


def debug_overrides(config: Config, *, fixed: frozenset[str] = frozenset()) -> dict[str, Any]:
    """What --debug sets, by dotted name: a model of 0.3 million weights, 2 epochs, steps of at most 32 samples, no W&B.

    The `fixed` names are the user's and stay; batch sizes fit themselves to those that are fixed.
    """
    now = flat(config.to_dict())
    micro, whole = now["train.micro_batch_size"], now["train.global_batch_size"]
    micro_is_fixed, whole_is_fixed = (
        not fixed.isdisjoint({"train", f"train.{size}"}) for size in ("micro_batch_size", "global_batch_size")
    )
    if not micro_is_fixed:
        micro = max(size for size in range(1, min(8, micro) + 1) if not whole_is_fixed or whole % size == 0)
    if not whole_is_fixed:
        whole = micro * max(1, min(32, whole) // micro)
    small = {
        "data.image_size": 96,
        "data.num_workers": 0,
        "model.name": "test_vit",
        "model.pretrained": False,
        "model.kwargs": {},
        "schedule.warmup_epochs": min(1.0, now["schedule.warmup_epochs"]),
        "train.epochs": min(2, now["train.epochs"]),
        "train.global_batch_size": whole,
        "train.micro_batch_size": micro,
        "train.precision": "fp32",
        "train.log_every_steps": 1,
        "evaluation.every_epochs": min(1, now["evaluation.every_epochs"]),
        "evaluation.micro_batch_size": micro,
        "report.wandb": "disabled",
    }
    return {name: value for name, value in small.items() if name not in fixed}


def changed_fields(old: Config, new: Config) -> list[Change]:
    """The fields that decide the numbers of a run and differ between two configs."""
    before, after = old.law_fields(), new.law_fields()
    return [Change(name, before[name], after[name]) for name in before if before[name] != after[name]]


def flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """A config's plain values by dotted name; what is no section stays whole."""
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name in SECTIONS and isinstance(value, Mapping):
            values |= {f"{name}.{key}": below for key, below in value.items()}
        else:
            values[name] = value
    return values


@dataclass(frozen=True)
class _Fault:
    """One thing wrong: where it is from (file and line, or the command line), its dotted place, and what to do about it."""

    where: str
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.place + ': ' if self.place else ''}{self.text}"

    def covers(self, place: str) -> bool:
        """Whether this fault is of a place or of something above it."""
        return bool(self.place) and f"{place}.".startswith(f"{self.place}.")


class _Draft:
    """A config before it is checked: its plain values, where each of them is from, and the faults found so far."""

    def __init__(self, content: Any, *, source: str) -> None:
        self.content = content
        self.source = source
        self.lines: dict[str, int] = {}
        self.overrides: dict[str, Any] = {}
        self.faults: list[_Fault] = []

    @classmethod
    def of_file(cls, path: Path, overrides: Sequence[str]) -> _Draft:
        """The values of a YAML file, under those of the command line."""
        document = read_yaml(_read_text(path))
        draft = cls(document.content, source=str(path))
        draft.lines = document.lines
        draft.faults = [_Fault(f"{path}: line {fault.line}", fault.place, fault.text) for fault in document.faults]
        for override in overrides:
            draft.decode(override)
        return draft

    def decode(self, override: str) -> None:
        """Lay one `name=value` over the content; what is wrong with it becomes a fault."""
        name, equals, text = override.partition("=")
        if not equals or not all(name.split(".")):
            fault = f"found {override!r}, expected name=value, such as train.epochs=3"
            self.faults.append(_Fault("command line", "", fault))
            return
        try:
            self.override(name, load_scalar(text, source=name))
        except YamlError as error:
            shell = f" that the shell leaves alone: '{name}=\"{text}\"'" if str(error).endswith("in quotes") else ""
            self.faults.append(_Fault("command line", name, f"{str(error).removeprefix(f'{name}: ')}{shell}"))

    def override(self, name: str, value: Any) -> None:
        """Set the value of a dotted name."""
        self.overrides[name] = value
        if isinstance(self.content, dict):
            _put(self.content, name, value)

    def config(self) -> Config:
        """The config, or one ConfigError that tells every fault."""
        config = None
        if isinstance(self.content, dict):
            try:
                config = Config.model_validate(self.content)
            except ValidationError as error:
                self._note_schema(error)
            self._note_relations()
        elif not self.faults:
            self.faults.append(
                _Fault(self.source, "", f"found {_shown(self.content)}, expected the sections of a config")
            )
        if config is None or self.faults:
            raise ConfigError(together([str(fault) for fault in self.faults]))
        return config

    def _note_schema(self, error: ValidationError) -> None:
        """Add what breaks the schema, apart from what is in doubt already and from what was only filled in."""
        earlier, written = tuple(self.faults), flat(self.content)
        for details in error.errors():
            place = ".".join(str(part) for part in details["loc"])
            is_filled = place == "evaluation.micro_batch_size" and place not in written
            if not is_filled and not any(fault.covers(place) for fault in earlier):
                self.faults.append(_Fault(self._where(place), place, _schema_fault(place, details)))

    def _note_relations(self) -> None:
        """Add the fields that are right by themselves and wrong together."""
        values = _defaults() | flat(self.content)
        sound = {name: value for name, value in values.items() if not any(fault.covers(name) for fault in self.faults)}
        for place, expected in _broken_relations(sound):
            self.faults.append(_Fault(self._where(place), place, f"found {_shown(sound[place])}, expected {expected}"))

    def _where(self, place: str) -> str:
        for name in self.overrides:
            if f"{place}.".startswith(f"{name}.") or (place not in SECTIONS and name.startswith(f"{place}.")):
                return "command line"
        return f"{self.source}: line {self.lines[place]}" if place in self.lines else self.source


def _filled(content: Mapping[str, Any]) -> dict[str, Any]:
    """Sections that are left out are empty, and evaluation.micro_batch_size is train's."""
    filled = {name: {} for name in SECTIONS} | dict(content)
    train, evaluation = filled["train"], filled["evaluation"]
    if isinstance(train, dict) and isinstance(evaluation, dict) and "micro_batch_size" in train:
        filled["evaluation"] = {"micro_batch_size": train["micro_batch_size"]} | evaluation
    return filled


def _broken_relations(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The places of fields that do not fit another one, and what is expected there. Names that are absent are not judged."""

    def known(*names: str) -> bool:
        return all(name in values for name in names)

    micro, whole = "train.micro_batch_size", "train.global_batch_size"
    if known(micro, whole) and values[whole] % values[micro]:
        yield micro, f"a divisor of {whole}, {values[whole]}"
    warmup, epochs = "schedule.warmup_epochs", "train.epochs"
    if known(warmup, epochs) and values[warmup] > values[epochs]:
        yield warmup, f"at most {epochs}, {values[epochs]}"
    final, peak = "schedule.final_lr", "optimizer.peak_lr"
    if known(final, peak) and values[final] > values[peak]:
        yield final, f"at most {peak}, {values[peak]}"
    every = "evaluation.every_epochs"
    if known(every, epochs) and values[every] > values[epochs]:
        yield every, f"at most {epochs}, {values[epochs]}, so that there is an evaluation; 0 never evaluates"
    metric, mode = "checkpoint.best_metric", "checkpoint.best_mode"
    if known(metric, every) and values[every] == 0 and values[metric].startswith("val."):
        yield metric, f"a metric of train, such as train.loss, where {every} is 0"
    if known(metric, mode) and (values[mode] == "min") != values[metric].endswith(".loss"):
        yield mode, f"{'max' if values[mode] == 'min' else 'min'} for {metric} {values[metric]}"


def _defaults() -> dict[str, Any]:
    """The default of every field that has one, by dotted name."""
    return {name: field.default for name, field in _fields().items() if field.default is not PydanticUndefined}


def _fields() -> dict[str, FieldInfo]:
    """Every field that is no section, by dotted name."""
    fields = {name: field for name, field in Config.model_fields.items() if name not in SECTIONS}
    for section, kind in SECTIONS.items():
        fields |= {f"{section}.{name}": field for name, field in kind.model_fields.items()}
    return fields


def _schema_fault(place: str, details: ErrorDetails) -> str:
    """What breaks the schema at a place, in the words of the person who wrote it."""
    field = _fields().get(place)
    if details["type"] == "extra_forbidden":
        return _unknown_key(place)
    if details["type"] == "missing":
        meaning = ((field and field.description) or "A value").partition(".\n")[0].partition(". ")[0].rstrip(".")
        return f"missing, expected {meaning[0].lower()}{meaning[1:]}"
    found, message = details["input"], details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = _EXPECTED.get(details["type"], message)
    if field and type(None) in get_args(field.annotation):
        expected += " or null"
    if details["type"] == "string_type" and isinstance(found, bool | int | float):
        expected += f': write "{_shown(found)}"'
    return f"found {_shown(found)}, expected {expected}"


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
    """Advice on a key that the schema does not know: the same or a like name, here before elsewhere."""
    section, _, key = place.rpartition(".")
    names = [*SECTIONS, *_fields()]
    last = {name: name.rpartition(".")[2] for name in names}
    here = [name for name in names if name.rpartition(".")[0] == section]

    def alike(among: list[str]) -> list[str]:
        near = difflib.get_close_matches(key, [last[name] for name in among], n=1)
        return [name for name in among if f"_{key}_" in f"_{last[name]}_"] or [n for n in among if last[n] in near]

    found = [last[name] for name in alike(here)]
    found = [name for name in names if last[name] == key] or found or alike(names)
    if found:
        return f"unknown key; did you mean {' or '.join(found)}?"
    return f"unknown key; the keys here are {', '.join(last[name] for name in here)}"


def _put(content: dict[str, Any], name: str, value: Any) -> None:
    """Set the value of a dotted name, making the sections on its way."""
    *sections, key = name.split(".")
    for section in sections:
        if not isinstance(content.get(section), dict):
            content[section] = {}
        content = content[section]
    content[key] = value


def _shown(value: Any) -> str:
    """A value as YAML would show it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"


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
