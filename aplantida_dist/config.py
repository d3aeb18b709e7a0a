"""The config: what a run is asked to do, whole, and what of it decides the numbers. `config_file.py` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from aplantida_dist.config_sections import (
    CheckpointSection,
    DataSection,
    DistillationSection,
    EmaSection,
    EvaluationSection,
    LossSection,
    MixingSection,
    ModelSection,
    OptimizerSection,
    ReportSection,
    ScheduleSection,
    Section,
    SoftLabelsSection,
    StoppingSection,
    TrainSection,
)
from aplantida_dist.errors import UserError
from aplantida_dist.files import digest
from aplantida_dist.strict_yaml import show, together

FREE = frozenset(
    {
        "data.dataset",  # the manifests' digests identify the data, wherever it lies
        "distillation.teachers",  # likewise, by the digests of their checkpoints
        "soft_labels.files",  # likewise
        *("data.cache_dir", "data.cache_bytes"),
        *("data.num_workers", "data.prefetch_micro_batches"),
        *(
            "data.on_bad_sample",
            "data.bad_sample_budget",
        ),  # they act at a bad sample alone, where a run would else stop
        *("train.epochs", "train.log_every_steps", "train.timeout_s", "evaluation.every_epochs"),
        "train.parallel",  # like the number of ranks, it decides the order of sums alone
        *("train.on_nonfinite", "train.nonfinite_budget", "stopping"),  # a run that stopped may go on with `skip`
        *("checkpoint", "report"),
    }
)
"""Fields and sections that a resumed run may change: they decide how fast, long or often, but no number of a given step."""


class ConfigError(UserError):
    """A config that cannot be read, breaks its schema, or holds a key that nothing reads. It tells everything at once."""


class Change(NamedTuple):
    """One field that differs between two configs: its dotted name and both values."""

    name: str
    old: Any
    new: Any


class Config(Section):
    """Everything that a run is asked to do. Made by `load_config`, which also holds what relates two fields."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """From which all randomness is derived; 0 to 2^63 − 1."""
    data: DataSection
    model: ModelSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    mixing: MixingSection
    loss: LossSection
    distillation: DistillationSection
    soft_labels: SoftLabelsSection
    train: TrainSection
    ema: EmaSection
    evaluation: EvaluationSection
    stopping: StoppingSection
    checkpoint: CheckpointSection
    report: ReportSection

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Sections that are left out are empty, and evaluation.micro_batch_size is train's."""
        filled: dict[str, Any] = {section: {} for section in SECTIONS} | content
        match filled:
            case {"train": {"micro_batch_size": size}, "evaluation": dict(evaluation)}:
                filled["evaluation"] = {"micro_batch_size": size} | evaluation
        return filled

    def to_dict(self) -> dict[str, Any]:
        """The resolved config, every default filled in, as plain values; written as YAML, `load_config` makes an equal Config of it."""
        return self.model_dump(mode="json")

    def with_micro_batch_size(self, size: int) -> Config:
        """This config with a number wherever it says `auto`. Nothing of it counts as read."""
        content = self.to_dict()
        content["train"]["micro_batch_size"] = size
        if content["evaluation"]["micro_batch_size"] == "auto":
            content["evaluation"]["micro_batch_size"] = size
        return Config.model_validate(content)

    @property
    def digest(self) -> str:
        """The sha256 (hex) of the resolved config."""
        return digest(self.to_dict())

    def law_fields(self) -> dict[str, Any]:
        """The fields that decide the numbers of a run, by dotted name: what a resumed run must find unchanged."""
        return {name: value for name, value in flat(self.to_dict()).items() if not _is_free(name)}

    def free_fields(self) -> dict[str, Any]:
        """All the others, by dotted name: a resumed run may change them, and notes that it did."""
        return {name: value for name, value in flat(self.to_dict()).items() if _is_free(name)}

    @staticmethod
    def law_defaults() -> dict[str, Any]:
        """The defaults of the fields that decide the numbers, by dotted name.

        A new field's default is what the program did before there was the field, so a checkpoint that lacks one holds its default.
        """
        return {name: value for name, value in _defaults().items() if not _is_free(name)}

    @staticmethod
    def free_defaults() -> dict[str, Any]:
        """The defaults of all the others, by dotted name."""
        return {name: value for name, value in _defaults().items() if _is_free(name)}

    def require_all_read(self) -> None:
        """Raise ConfigError for every field that was set and that nothing has read, such as final_lr of a constant schedule.

        To be called when everything is composed, before the first step. A value equal to its default is not held against
        anyone, so that a resolved config, which states every default, can be run again.
        """
        values, advice = flat(self.to_dict()), "but nothing reads it under this config; take it out"
        messages = [f"{name}: is set to {show(values[name])}, {advice}" for name in self.unread()]
        if messages:
            raise ConfigError(together(messages))


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
"""The sections of a config by name, in their order."""


def _is_free(name: str) -> bool:
    return not FREE.isdisjoint({name, name.partition(".")[0]})


def _defaults() -> dict[str, Any]:
    return {
        f"{name}.{key}": field.default
        for name, section in SECTIONS.items()
        for key, field in section.model_fields.items()
        if not field.is_required()
    }


def flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """A config's plain values by dotted name; what is no section stays whole."""
    values = dict(content)
    for section in SECTIONS:
        if isinstance(values.get(section), Mapping):
            values |= {f"{section}.{name}": value for name, value in values.pop(section).items()}
    return values


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What differs between two sets of named values; None stands for a name that one of them lacks."""
    names = [*old, *(name for name in new if name not in old)]
    return [Change(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]
