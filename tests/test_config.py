"""Laws of the config: one schema, every error at once, a key that nothing reads is an error, and it reads back as written."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from aplantida_dist.config import SECTIONS, Change, Config, ConfigError, changes
from aplantida_dist.config_file import load_config
from aplantida_dist.debug import debug_overrides, load_debug_config
from aplantida_dist.strict_yaml import dump_yaml

CONFIGS = Path(__file__).parent.parent / "configs"

SMALL = """\
data: {dataset: shards/x}
model: {name: resnet10t}
optimizer: {peak_lr: 1.0e-3}
schedule: {kind: cosine}
train:
  epochs: 4
  global_batch_size: 64
  micro_batch_size: 16
"""


def write(folder: Path, text: str = SMALL) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def fault_of(folder: Path, *overrides: str, text: str = SMALL) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return str(caught.value)


def read_all(config: Config, *, but: str = "") -> None:
    """Read every field of a config, apart from the one that is named."""
    for name in Config.model_fields:
        section = getattr(config, name)
        if name in SECTIONS:
            for field in type(section).model_fields:
                if f"{name}.{field}" != but:
                    getattr(section, field)


@pytest.mark.parametrize(
    "name", sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
)
def test_a_shipped_config_is_whole(name: str) -> None:
    """Every shipped config loads, opens with what it is for, and can be made small by --debug."""
    path = CONFIGS / f"{name}.yaml"
    assert path.read_text().startswith("# The ")
    assert "# Command:" in path.read_text()
    assert "# Expected:" in path.read_text()
    config = load_config(path)
    assert config.train.global_batch_size % config.train.micro_batch_size == 0
    small, _ = load_debug_config(path)
    assert (small.model.name, small.train.epochs, small.train.precision) == ("test_vit", 2, "fp32")


def test_the_global_teacher_has_the_original_settings() -> None:
    """What the first trainer's teacher was trained with."""
    config = load_config(CONFIGS / "teacher_global.yaml")
    assert (config.model.name, config.data.image_size, config.model.pretrained) == ("vit_base_patch16_384", 384, True)
    assert (config.optimizer.name, config.optimizer.peak_lr, config.optimizer.weight_decay) == ("adamw", 3e-5, 0.05)
    assert (config.schedule.kind, config.schedule.warmup_epochs, config.train.clip_norm) == ("cosine", 2.0, 1.0)
    assert config.loss.label_smoothing == 0.1


def test_a_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    """config.yaml states every default and makes the same config with the same digest."""
    config = load_config(
        write(tmp_path), ['report.name="on"', "model.kwargs.drop_rate=1.0e-07", "train.clip_norm=null"]
    )
    text = dump_yaml(config.to_dict())
    (tmp_path / "resolved.yaml").write_text(text)
    again = load_config(tmp_path / "resolved.yaml")
    assert again == config
    assert again.digest == config.digest
    assert again.report.name == "on"
    assert again.evaluation.micro_batch_size == config.train.micro_batch_size == 16
    assert text.count(": ") > 30


def test_a_config_keeps_its_values(tmp_path: Path) -> None:
    """Frozen, and equal to its copies and pickles, whatever was read of either."""
    config = load_config(write(tmp_path))
    read_all(config)
    assert config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == load_config(write(tmp_path))
    assert config != load_config(write(tmp_path), ["seed=1"])
    with pytest.raises(ValidationError, match="frozen"):
        config.train.epochs = 3  # type: ignore[misc]


def test_overrides_are_decoded_by_the_rules_of_the_file(tmp_path: Path) -> None:
    """Numbers, text, null, lists and arguments of the model; the last of equal names holds."""
    config = load_config(
        write(tmp_path),
        [
            "train.epochs=3",
            "train.epochs=2",
            "data.crop_scale=[0.5,1.0]",
            "model.kwargs.img_size=128",
            "model.kwargs.act=relu",
            "train.clip_norm=1",
            "report.tags=[a, b]",
            "optimizer.kwargs={betas: [0.9, 0.99]}",
            "schedule.warmup_epochs=0.5",
        ],
    )
    assert (config.train.epochs, config.data.crop_scale, config.train.clip_norm) == (2, (0.5, 1.0), 1.0)
    assert (config.model.kwargs, config.report.tags) == ({"img_size": 128, "act": "relu"}, ("a", "b"))
    assert (config.optimizer.kwargs, config.schedule.warmup_epochs) == ({"betas": [0.9, 0.99]}, 0.5)


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("data.nmu_workers=3", "data.nmu_workers: unknown key; did you mean num_workers?"),
        ("epochs=3", "epochs: unknown key; did you mean train.epochs?"),
        ("trian.epochs=3", "trian: unknown key; did you mean train?"),
        ("train.warmup_epochs=1", "train.warmup_epochs: unknown key; did you mean schedule.warmup_epochs?"),
        ("train.batch_size=1", "train.batch_size: unknown key; did you mean global_batch_size or micro_batch_size?"),
        ("loss.mixup=0.8", "loss.mixup: unknown key; did you mean mixing.mixup_alpha?"),
        ("loss.zeal=0.8", "loss.zeal: unknown key; the keys here are kind, label_smoothing"),
        ("seed.x=1", 'seed: found {"x": 1}, expected a whole number'),
        ("seed=-1", "seed: found -1, expected greater than or equal to 0"),
        ("train.epochs=2.0", "train.epochs: found 2.0, expected a whole number"),
        ("train.epochs=true", "train.epochs: found true, expected a whole number"),
        ("train.clip_norm=0", "train.clip_norm: found 0, expected greater than 0 or null"),
        ("train.precision=fp8", "train.precision: found \"fp8\", expected 'fp32', 'bf16' or 'fp16'"),
        (
            "train.micro_batch_size=24",
            "train.micro_batch_size: found 24, expected a divisor of train.global_batch_size, 64",
        ),
        ("train=5", "train: found 5, expected keys with values beneath it"),
        ("model.name=5", 'model.name: found 5, expected text: write "5"'),
        ('model.name=""', 'model.name: found "", expected text that is not empty'),
        ("model.pretrained=1", "model.pretrained: found 1, expected true or false"),
        (
            "model.kwargs.a={b: 1}",
            'model.kwargs.a: found {"b": 1}, expected a number, text, true, false, null, or a list',
        ),
        ("data.horizontal_flip=1.5", "data.horizontal_flip: found 1.5, expected less than or equal to 1"),
        ("data.crop_scale=[1.0,0.5]", "data.crop_scale: found [1.0, 0.5], expected the smaller bound first"),
        ("data.crop_scale=[0.0,0.5]", "data.crop_scale.0: found 0.0, expected greater than 0"),
        ("data.crop_ratio=2", "data.crop_ratio: found 2, expected a list"),
        ("schedule.warmup_epochs=5", "schedule.warmup_epochs: found 5, expected at most train.epochs, 4"),
        ("schedule.final_lr=0.1", "schedule.final_lr: found 0.1, expected at most optimizer.peak_lr, 0.001"),
        ("optimizer.peak_lr=-1.0e-5", "optimizer.peak_lr: found -1.0e-05, expected greater than 0"),
        ("evaluation.every_epochs=5", "evaluation.every_epochs: found 5, expected at most train.epochs, 4"),
        ("evaluation.every_epochs=0", 'checkpoint.best_metric: found "val.top1", expected a metric of train'),
        ("checkpoint.best_metric=top1", 'checkpoint.best_metric: found "top1", expected names with points between'),
        (
            "checkpoint.best_metric=val.loss",
            'checkpoint.best_mode: found "max", expected min for checkpoint.best_metric',
        ),
        (
            "optimizer.peak_lr=1e-3",
            "optimizer.peak_lr: found 1e-3, which not every reader takes for a number; write 1.0e-3",
        ),
        ("report.name=on", "that the shell leaves alone: 'report.name=\"on\"'"),
        ("train.epochs", "found 'train.epochs', expected name=value, such as train.epochs=3"),
        ("train..epochs=3", "found 'train..epochs=3', expected name=value"),
        ("train.epochs=", "train.epochs: nothing is written here"),
    ],
)
def test_a_wrong_value_is_one_line(tmp_path: Path, override: str, fault: str) -> None:
    """One mistake gives one line with its place, what was found and what was expected, wherever it was made."""
    found = fault_of(tmp_path, override)
    assert fault in found
    assert "\n" not in found


def test_every_error_is_told_at_once_with_where_it_is_from(tmp_path: Path) -> None:
    """YAML, schema, relations and command line are all in one message, each with its place; nothing follows from another."""
    text = (
        "data: {dataset: shards/x, nmu_workers: 2}\n"
        "model: {}\n"
        "optimizer: {peak_lr: 1e-3}\n"
        "schedule: {kind: cosin, warmup_epochs: 9}\n"
        "train: {epochs: 4, global_batch_size: 10, micro_batch_size: 4, extra: 1}\n"
        "report: [a]\n"
    )
    heading, *lines = fault_of(tmp_path, "loss.label_smoothing=2", "report.name=on", "oops", text=text).splitlines()
    path = str(tmp_path / "config.yaml")
    wanted = [
        f"{path}: line 3: optimizer.peak_lr: found 1e-3",
        "command line: report.name: found on",
        "command line: found 'oops'",
        f"{path}: line 1: data.nmu_workers: unknown key",
        f"{path}: model.name: missing, expected name of the model in timm",
        f"{path}: line 4: schedule.kind: found",
        "command line: loss.label_smoothing: found 2",
        f"{path}: line 5: train.extra: unknown key",
        f"{path}: line 6: report: found",
        f"{path}: line 5: train.micro_batch_size: found 4",
        f"{path}: line 4: schedule.warmup_epochs: found 9",
    ]
    assert heading == "11 errors:"
    assert len(lines) == len(wanted)
    for line in lines:
        assert any(line.strip().startswith(part) for part in wanted), line


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    """An absent, unreadable or broken file is one line."""
    write(tmp_path)
    with pytest.raises(ConfigError, match=r"confg\.yaml: no config here; there is .*config\.yaml"):
        load_config(tmp_path / "confg.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"seed: 1 # \xff")
    with pytest.raises(ConfigError, match="byte 10 is not UTF-8"):
        load_config(tmp_path / "config.yaml")
    assert "found null, expected the sections of a config" in fault_of(tmp_path, "seed=1", text="# nothing\n")
    assert "line 2: not YAML" in fault_of(tmp_path, text="a:\n\tb: 1\n")


SET = {
    "data.dataset": "shards/y",
    "data.horizontal_flip": 0.25,
    "model.kwargs": "{drop_rate: 0.1}",
    "schedule.final_lr": 0.0005,
    "train.clip_norm": 2.0,
    "evaluation.micro_batch_size": 8,
    "report.tags": "[a]",
}


@pytest.mark.parametrize("name", SET)
def test_a_key_that_nothing_reads_is_an_error(tmp_path: Path, name: str) -> None:
    """Whatever was set must have been read by attribute; validation, copies, dumps and comparisons are no reads."""
    config = load_config(write(tmp_path), [f"{name}={SET[name]}"])
    read_all(config, but=name)
    assert config.to_dict()
    assert config.digest
    assert config.law_fields()
    assert repr(config)
    assert config == copy.deepcopy(config)
    with pytest.raises(
        ConfigError, match=rf"^{name}: is set to .*, but nothing reads it under this config; take it out$"
    ):
        config.require_all_read()
    section, field = name.split(".")
    getattr(getattr(config, section), field)
    config.require_all_read()


def test_every_unread_key_is_named_at_once(tmp_path: Path) -> None:
    """A config of which nothing was read names each field that the file set, and none that it left alone."""
    config = load_config(write(tmp_path))
    with pytest.raises(ConfigError) as caught:
        config.require_all_read()
    names = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert names == [
        *("data.dataset", "model.name", "optimizer.peak_lr", "schedule.kind"),
        *("train.epochs", "train.global_batch_size", "train.micro_batch_size", "evaluation.micro_batch_size"),
    ]


def test_a_resolved_config_can_be_run_again(tmp_path: Path) -> None:
    """Values equal to their defaults are not held against a config that states them all."""
    config = load_config(write(tmp_path), ["schedule.kind=constant"])
    (tmp_path / "resolved.yaml").write_text(dump_yaml(config.to_dict()))
    again = load_config(tmp_path / "resolved.yaml")
    read_all(again, but="schedule.final_lr")
    again.require_all_read()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1", [Change("seed", 0, 1)]),
        ("data.crop_scale=[0.5,1.0]", [Change("data.crop_scale", [0.35, 1.0], [0.5, 1.0])]),
        (
            "train.micro_batch_size=8",
            [Change("train.micro_batch_size", 16, 8), Change("evaluation.micro_batch_size", 16, 8)],
        ),
        ("schedule.kind=linear", [Change("schedule.kind", "cosine", "linear")]),
        ("model.kwargs.drop_rate=0.1", [Change("model.kwargs", {}, {"drop_rate": 0.1})]),
        ("data.dataset=elsewhere", []),
        ("data.num_workers=7", []),
        ("train.epochs=9", []),
        ("evaluation.every_epochs=2", []),
        ("checkpoint.every_steps=5", []),
        ("report.wandb=disabled", []),
    ],
)
def test_fields_that_decide_the_numbers_are_compared(tmp_path: Path, override: str, expected: list[Change]) -> None:
    """A resumed run may differ in speed, length and reports, and in nothing that a step is made of."""
    path = write(tmp_path)
    old, new = load_config(path), load_config(path, [override])
    assert changes(old.law_fields(), new.law_fields()) == expected
    assert load_config(path).digest != load_config(path, [override]).digest


def test_debug_is_small_beneath_the_users_overrides(tmp_path: Path) -> None:
    """--debug shrinks the file's values, tells each change, and gives way to what the command line says."""
    path = write(tmp_path, SMALL.replace("cosine}", "cosine, warmup_epochs: 3.0}") + "report: {wandb: online}\n")
    config, changes = load_debug_config(path, ["train.epochs=3", "model.kwargs.drop_rate=0.1"])
    assert Change("model.name", "resnet10t", "test_vit") in changes
    assert Change("schedule.warmup_epochs", 3.0, 1.0) in changes
    assert Change("report.wandb", "online", "disabled") in changes
    assert not any(change.name in ("train.epochs", "model.kwargs") or change.old == change.new for change in changes)
    assert (config.train.epochs, config.model.kwargs, config.data.image_size) == (3, {"drop_rate": 0.1}, 96)
    assert (config.train.global_batch_size, config.train.micro_batch_size) == (32, 8)


@pytest.mark.parametrize("whole", [1, 2, 6, 31, 36, 64, 254])
@pytest.mark.parametrize("fixed", [(), ("micro",), ("global",), ("micro", "global")])
def test_debug_batches_always_fit(tmp_path: Path, whole: int, fixed: tuple[str, ...]) -> None:
    """Whichever sizes the user fixes, micro_batch_size divides global_batch_size, and what is free is small."""
    for micro in [size for size in range(1, whole + 1) if whole % size == 0]:
        sizes = {"micro": micro, "global": whole}
        text = SMALL.replace("size: 64", f"size: {whole}").replace("size: 16", f"size: {micro}")
        config, _ = load_debug_config(
            write(tmp_path, text), [f"train.{name}_batch_size={sizes[name]}" for name in fixed]
        )
        train = config.train
        assert train.global_batch_size % train.micro_batch_size == 0
        assert train.micro_batch_size <= (micro if "micro" in fixed else 8)
        assert train.global_batch_size <= (whole if fixed else 32)


def test_debug_overrides_are_fields(tmp_path: Path) -> None:
    """What --debug sets exists, under the name it is set by."""
    names: dict[str, Any] = load_config(write(tmp_path)).to_dict()
    for name in debug_overrides(load_config(write(tmp_path))):
        section, field = name.split(".")
        assert field in names[section]


def test_every_field_says_what_it_is() -> None:
    """Each field has its description, which `missing` shows."""
    for name, field in Config.model_fields.items():
        for below_name, below in SECTIONS[name].model_fields.items() if name in SECTIONS else [(name, field)]:
            assert below.description, f"{name}.{below_name}"
