"""Every key of the config acts: where it acts first, and that nothing before that changes; then the laws with each switched on."""

from __future__ import annotations

import ast
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aplantida_dist.config_faults import FIELDS
from aplantida_dist.job import Running
from aplantida_dist.metrics import Totals
from aplantida_dist.step import run_step
from aplantida_dist.trainer import read_ahead
from tests.conftest import CLASSES
from tests.laws import require_exact_resume, require_same_on_two_ranks, run_whole, train
from tests.pictures import build, fill
from tests.ranks import command_on_ranks, run_ranks
from tests.runs import compose, write_config

TESTS = Path(__file__).parent

Trace = dict[str, Any]
"""What a run is in its first steps: start (weights), rates (of all steps), pictures (of the first step, with their keys), losses
(that step's totals, exact sums), update (weights after it), average (the EMA after the second: after the first it is the weights)."""


@dataclass(frozen=True)
class Acts:
    """A switch: the overrides beside which it is thrown, those that throw it, what must change, and what must not."""

    on: tuple[str, ...]
    beside: tuple[str, ...]
    changes: tuple[str, ...]
    keeps: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """A key that a first step on a CPU cannot show, and the test that shows it."""

    by: str


def start(*on: str, beside: Sequence[str] = ()) -> Acts:
    return Acts(on, tuple(beside), ("start", "losses"), ("rates", "pictures"))


def rates(*on: str, beside: Sequence[str] = ()) -> Acts:
    return Acts(on, tuple(beside), ("rates",), ("start", "pictures", "losses"))


def pictures(*on: str, beside: Sequence[str] = ()) -> Acts:
    return Acts(on, tuple(beside), ("pictures", "losses"), ("start", "rates"))


def losses(*on: str, beside: Sequence[str] = ()) -> Acts:
    return Acts(on, tuple(beside), ("losses", "update"), ("start", "rates", "pictures"))


def update(*on: str, beside: Sequence[str] = ()) -> Acts:
    return Acts(on, tuple(beside), ("update",), ("start", "rates", "pictures", "losses"))


def average(*on: str, beside: Sequence[str] = ()) -> Acts:
    return Acts(on, tuple(beside), ("average",), ("start", "rates", "pictures", "losses", "update"))


def nothing(*on: str, beside: Sequence[str] = ()) -> Acts:
    return Acts(on, tuple(beside), (), ("start", "rates", "pictures", "losses", "update", "average"))


BEGUN = ("model.init_from={teacher}",)
TAUGHT = ("distillation.teachers=[{teacher}]",)
STORED = ("soft_labels.files=[{soft}]",)
RANDAUGMENT = ("data.augment=randaugment",)
MIXED = ("mixing.mixup_alpha=0.8",)
UNCLIPPED = ("train.clip_norm=null",)

KEYS: dict[str, Acts | Shown] = {
    "seed": Acts(("seed=4",), (), ("start", "pictures", "losses"), ("rates",)),
    "data.dataset": pictures("data.dataset={other}"),
    "data.cache_dir": nothing("data.cache_dir={cache}"),
    "data.cache_bytes": nothing("data.cache_bytes=1000000", beside=["data.cache_dir={cache}"]),
    "data.image_size": pictures("data.image_size=48"),
    "data.crop_scale": pictures("data.crop_scale=[0.9, 1.0]"),
    "data.crop_ratio": pictures("data.crop_ratio=[1.0, 1.0]"),
    "data.horizontal_flip": pictures("data.horizontal_flip=1.0"),
    "data.vertical_flip": pictures("data.vertical_flip=1.0"),
    "data.rotation": pictures("data.rotation=20.0"),
    "data.augment": pictures("data.augment=trivialaugment"),
    "data.augment_ops": pictures("data.augment_ops=4", beside=RANDAUGMENT),
    "data.augment_magnitude": pictures("data.augment_magnitude=3.0", beside=RANDAUGMENT),
    "data.augment_magnitude_std": pictures("data.augment_magnitude_std=3.0", beside=RANDAUGMENT),
    "data.color_jitter": pictures("data.color_jitter=0.4"),
    "data.blur": pictures("data.blur=1.0"),
    "data.random_erasing": pictures("data.random_erasing=1.0"),
    "data.sampling_exponent": pictures("data.sampling_exponent=0.0"),
    "data.num_workers": nothing("data.num_workers=2"),
    "data.prefetch_micro_batches": nothing("data.prefetch_micro_batches=1", beside=["data.num_workers=1"]),
    "data.block_samples": pictures("data.block_samples=7"),
    "data.lanes": pictures("data.lanes=2"),
    "data.on_bad_sample": Shown("faults/test_bad_samples.py::test_a_bad_picture_is_void_and_the_rest_is_exact"),
    "data.bad_sample_budget": Shown("faults/test_bad_samples.py::test_beyond_the_budget_the_run_stops_and_may_go_on"),
    "model.name": start("model.name=test_convnext2"),
    "model.pretrained": Shown("test_pretrained.py::test_a_run_begins_with_them_and_goes_on_without"),
    "model.pretrained_file": Shown("test_pretrained.py::test_a_run_begins_with_them_and_goes_on_without"),
    "model.init_from": start(*BEGUN),
    "model.init_from_ema": start("model.init_from_ema=true", beside=BEGUN),
    "model.kwargs": losses("model.kwargs.drop_rate=0.5"),
    "model.freeze": update("model.freeze=[stem]"),
    "model.head_only_epochs": update("model.head_only_epochs=0.5"),
    "model.grad_checkpointing": Shown("test_execution.py::test_checkpointing_keeps_less_and_computes_the_same"),
    "model.channels_last": Shown("test_execution.py::test_channels_last_lays_weights_and_pictures_out"),
    "model.compile": Shown("test_execution.py::test_a_compiled_model_is_compiled_and_computes_the_same"),
    "model.sync_batchnorm": Shown("test_execution.py::test_sync_batchnorm_is_converted_under_the_same_names"),
    "optimizer.name": update("optimizer.name=lion"),
    "optimizer.peak_lr": rates("optimizer.peak_lr=0.002"),
    "optimizer.weight_decay": update("optimizer.weight_decay=0.5"),
    "optimizer.layer_decay": update("optimizer.layer_decay=0.5"),
    "optimizer.kwargs": update("optimizer.kwargs.eps=0.1"),
    "schedule.kind": rates("schedule.kind=linear"),
    "schedule.warmup_epochs": rates("schedule.warmup_epochs=0.5"),
    "schedule.final_lr": rates("schedule.final_lr=0.0001"),
    "schedule.decay_epochs": rates(
        "schedule.decay_epochs=0.8", beside=["schedule.kind=wsd", "schedule.decay_epochs=0.4"]
    ),
    "mixing.mixup_alpha": losses(*MIXED),
    "mixing.cutmix_alpha": losses("mixing.cutmix_alpha=1.0"),
    "mixing.probability": losses("mixing.probability=0.2", beside=MIXED),
    "mixing.switch_probability": losses("mixing.switch_probability=1.0", beside=[*MIXED, "mixing.cutmix_alpha=1.0"]),
    "mixing.last_epochs_off": Shown("test_mixing.py::test_the_history_names_the_dominant_label"),
    "loss.kind": losses("loss.kind=binary_cross_entropy"),
    "loss.label_smoothing": losses("loss.label_smoothing=0.2"),
    "loss.logit_adjustment": losses("loss.logit_adjustment=1.0"),
    "loss.class_weights": losses("loss.class_weights=effective_number"),
    "loss.effective_number_beta": losses(
        "loss.effective_number_beta=0.9", beside=["loss.class_weights=effective_number"]
    ),
    "loss.focal_gamma": losses("loss.focal_gamma=2.0"),
    "distillation.teachers": losses(*TAUGHT),
    "distillation.teacher_weights": losses(
        "distillation.teacher_weights=[1.0, 3.0]", beside=["distillation.teachers=[{teacher}, {colleague}]"]
    ),
    "distillation.teacher_ema": losses("distillation.teacher_ema=true", beside=TAUGHT),
    "distillation.temperature": losses("distillation.temperature=1.0", beside=TAUGHT),
    "distillation.soft_share": losses("distillation.soft_share=0.1", beside=TAUGHT),
    "distillation.label_share": losses("distillation.label_share=0.9", beside=TAUGHT),
    "soft_labels.files": losses(*STORED),
    "soft_labels.weights": losses("soft_labels.weights=[1.0, 3.0]", beside=["soft_labels.files=[{soft}, {softer}]"]),
    "soft_labels.soft_share": losses("soft_labels.soft_share=0.1", beside=STORED),
    "soft_labels.label_share": losses("soft_labels.label_share=0.9", beside=STORED),
    "soft_labels.missing_budget": Shown("test_soft_labels.py::test_a_missing_soft_label_is_an_error_or_counted"),
    "train.epochs": rates("train.epochs=3"),
    "train.global_batch_size": Acts(("train.global_batch_size=32",), (), ("rates", "pictures", "losses"), ("start",)),
    "train.micro_batch_size": Acts(("train.micro_batch_size=8",), (), ("update",), ("start", "rates", "pictures")),
    "train.precision": losses("train.precision=bf16"),
    "train.parallel": Shown("test_fsdp.py::test_each_rank_holds_a_part"),
    "train.clip_norm": update("train.clip_norm=0.01"),
    "train.on_nonfinite": Shown("test_nonfinite.py::test_a_skipped_step_is_void_in_its_row_and_changes_no_weight"),
    "train.nonfinite_budget": Shown(
        "test_nonfinite.py::test_a_resume_after_a_skipped_step_is_exact_and_keeps_the_budget"
    ),
    "train.clip_agc": update("train.clip_agc=0.001", beside=UNCLIPPED),
    "train.log_every_steps": nothing("train.log_every_steps=1"),
    "train.timeout_s": Shown("test_bad_input.py::test_one_rank_alone_meets_the_error"),
    "ema.decay": average("ema.decay=0.9"),
    "ema.warmup": average("ema.warmup=false", beside=["ema.decay=0.9"]),
    "evaluation.every_epochs": Shown("test_evaluation.py::test_a_row_holds_an_evaluation_where_one_is_due"),
    "evaluation.micro_batch_size": nothing("evaluation.micro_batch_size=3"),
    "stopping.patience_epochs": Shown("test_stopping.py::test_a_run_stops_on_all_ranks_and_stays_stopped"),
    "stopping.metric": Shown("test_stopping.py::test_any_number_of_a_row_is_a_metric_and_an_unknown_one_names_them"),
    "stopping.mode": Shown("test_stopping.py::test_stopping_fits_its_mode_and_its_evaluation"),
    "stopping.min_delta": Shown("test_stopping.py::test_a_run_stops_after_so_many_epochs_without_a_better_value"),
    "checkpoint.every_steps": nothing("checkpoint.every_steps=1"),
    "checkpoint.keep_last": Shown("test_resume.py::test_best_last_and_retention"),
    "checkpoint.best_metric": Shown("test_ema.py::test_best_goes_by_the_average_where_it_is_named"),
    "checkpoint.best_mode": Shown("test_ema.py::test_best_goes_by_the_average_where_it_is_named"),
    "report.wandb": Shown("test_wandb.py::test_offline_runs_show_the_rows_of_the_history"),
    "report.project": Shown("test_wandb.py::test_a_run_is_found_by_project_name_and_tags"),
    "report.name": Shown("test_wandb.py::test_a_run_is_found_by_project_name_and_tags"),
    "report.tags": Shown("test_wandb.py::test_a_run_is_found_by_project_name_and_tags"),
}
SWITCHES = {name: key for name, key in KEYS.items() if isinstance(key, Acts)}
"""Keys that a first step shows."""

Fill = Callable[[Sequence[str]], list[str]]


def test_every_key_of_the_config_stands_here() -> None:
    """A key that is added without saying where it acts fails here."""
    assert sorted(KEYS) == sorted(FIELDS)


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if isinstance(key, Shown)])
def test_what_is_shown_elsewhere_is(name: str) -> None:
    """The test is there, and its file speaks of the key."""
    key = KEYS[name]
    assert isinstance(key, Shown)
    file, _, test = key.by.partition("::")
    text = (TESTS / file).read_text()
    assert test in {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert name.rpartition(".")[2] in text


@pytest.fixture(scope="module")
def fill_in(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Fill:
    """Put what the overrides name in its place: two teachers, of which one keeps an EMA, what each says of train, another dataset."""
    folder = tmp_path_factory.mktemp("teachers")
    fill(folder / "pictures", dict.fromkeys(CLASSES, 15), first=5000)
    build(folder / "pictures", folder / "other")
    config = write_config(folder / "config.yaml", dataset_dir, epochs=1)
    train(1, config, folder / "teacher", "ema.decay=0.9")
    train(1, config, folder / "colleague", "seed=9")
    for run, file in (("teacher", "soft"), ("colleague", "softer")):
        told = ["--run", folder / run, "--data", dataset_dir, "--split", "train", "--out", folder / file]
        (finished,) = command_on_ranks(1, "aplantida_dist.soft_labels", told, folder)
        assert finished.code == 0, finished.stderr
    places = {name: folder / name for name in ("teacher", "colleague", "soft", "softer", "other", "cache")}
    return lambda overrides: [text.format(**places) for text in overrides]


def trace(config: Path, run_dir: Path, overrides: Sequence[str]) -> Trace:
    """Compose a run on this rank and take its first two steps."""
    job = compose(config, run_dir, overrides).job
    found: Trace = {"start": weights_of(job.model)}
    found["rates"] = [job.schedule.learning_rate(step) for step in range(job.schedule.total_steps)]
    stream = read_ahead(job, 0)
    batches = list(itertools.islice(stream, job.plan.slots_per_step))
    found["pictures"] = (
        torch.cat([batch.images for batch in batches]).numpy(),
        [key for batch in batches for key in batch.sample_keys],
    )
    job.freezing.set_modes(job.model, 0)
    running = Running(Totals(job.num_classes, job.world.device))
    run_step(job, iter(batches), running, 0)
    found["losses"] = running.totals.vector.numpy().copy()
    found["update"] = weights_of(job.model)
    run_step(job, stream, running, 1)
    found["average"] = None if job.ema is None else weights_of(job.ema.model)
    return found


@pytest.fixture(scope="module")
def trace_of(fill_in: Fill, dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trace]:
    """The trace of a run with these overrides; what many switches stand beside is traced once."""
    folder = tmp_path_factory.mktemp("traces")
    config = write_config(folder / "config.yaml", dataset_dir, epochs=2)

    @cache
    def traced(*overrides: str) -> Trace:
        (found,) = run_ranks(1, trace, config, Path(tempfile.mkdtemp(dir=folder)), fill_in(overrides))
        return found

    return traced


def weights_of(model: torch.nn.Module) -> dict[str, Any]:
    return {name: tensor.detach().clone().numpy() for name, tensor in model.state_dict().items()}


def same(ours: Any, theirs: Any) -> bool:
    """Bit for bit."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, tuple):
        return all(same(one, other) for one, other in zip(ours, theirs, strict=True))
    return np.array_equal(ours, theirs) if isinstance(ours, np.ndarray) else bool(ours == theirs)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_acts_where_it_should_and_nowhere_before(name: str, trace_of: Callable[..., Trace]) -> None:
    """Start, rates, pictures, losses, update, average: what must change does, what must not is the same to the last bit."""
    switch = SWITCHES[name]
    off, on = trace_of(*switch.beside), trace_of(*switch.beside, *switch.on)
    assert [part for part in switch.changes if same(off[part], on[part])] == []
    assert [part for part in switch.keeps if not same(off[part], on[part])] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, switch in SWITCHES.items() if switch.changes])
def test_the_laws_hold_with_a_switch_on(name: str, fill_in: Fill, dataset_dir: Path, tmp_path: Path) -> None:
    """Stopped in the first and in the second epoch, a run ends as the whole one; two ranks read and lose the same as one."""
    overrides = fill_in([*SWITCHES[name].beside, *SWITCHES[name].on])
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2)
    whole = run_whole(config, overrides)
    for stop in (2, 6) if name == "train.global_batch_size" else (3, 7):
        require_exact_resume(whole, config, overrides, stop=stop)
    # The gradients' last bit, which the order of their sum decides, turns a rounding of bf16 (2⁻⁹) here and there.
    require_same_on_two_ranks(whole, config, overrides, rel=1e-3 if name == "train.precision" else 1e-5)
