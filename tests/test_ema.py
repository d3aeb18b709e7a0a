"""The EMA: the average that it says it is, on any number of ranks, through any resume, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from aplantida_dist.analysis.panels import panels_of
from aplantida_dist.analysis.sources import read_sources
from aplantida_dist.analysis.table import epoch_table
from aplantida_dist.checkpoint import CheckpointError, load_checkpoint
from aplantida_dist.config import ConfigError
from aplantida_dist.config_file import load_config
from aplantida_dist.history import HistoryError, columns_of, make_row, read_history
from aplantida_dist.job import Running
from aplantida_dist.metrics import Totals
from aplantida_dist.record import EpochSoFar, summary_line
from aplantida_dist.state import take_state_across_ranks
from aplantida_dist.step import run_step
from aplantida_dist.trainer import read_ahead
from tests.ranks import command_on_ranks, run_ranks
from tests.runs import compose, cut_back, rows_of, write_config

EPOCHS = 3
OFF = ("checkpoint.keep_last=100",)
ON = (*OFF, "ema.decay=0.9", "checkpoint.best_metric=val_ema.loss", "checkpoint.best_mode=min")


def command(module: str, world_size: int, folder: Path, *arguments: str | Path) -> str:
    """Run a command on ranks that all end well; what its main process printed."""
    finished = command_on_ranks(world_size, f"aplantida_dist.{module}", arguments, folder)
    assert [rank.code for rank in finished] == [0] * world_size, "\n".join(rank.stderr for rank in finished)
    return finished[0].stdout


def make_config(folder: Path, dataset_dir: Path, model: str = "test_resnet") -> Path:
    """test_resnet by default: BatchNorm has buffers, some of them integers. A checkpoint after every step."""
    return write_config(folder / "config.yaml", dataset_dir, model=model, epochs=EPOCHS, every_steps=1)


@pytest.fixture(scope="module")
def grounds(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and its runs `on` and `off`, with an EMA and without."""
    folder = tmp_path_factory.mktemp("ema")
    config = make_config(folder, dataset_dir)
    command("train", 1, folder, "--config", config, "--run-dir", folder / "on", *ON)
    command("train", 1, folder, "--config", config, "--run-dir", folder / "off", *OFF)
    return folder


def state_of(run_dir: Path, step: int, name: str) -> dict[str, np.ndarray]:
    """The tensors of one file of a checkpoint."""
    return load_file(run_dir / "checkpoints" / f"step_{step:08d}" / name)


def copies(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.clone().numpy() for name, tensor in state.items()}


def states_of_steps(config: Path, run_dir: Path, overrides: Sequence[str], num_steps: int) -> tuple[list[Any], Any]:
    """Train on this rank; the weights and buffers after each step, and those of the EMA at the end."""
    job = compose(config, run_dir, overrides).job
    assert job.ema is not None
    job.model.train()
    batches, running = read_ahead(job, 0), Running(Totals(job.num_classes, job.world.device))
    states = []
    for step in range(num_steps):
        run_step(job, batches, running, step)
        states.append(copies(job.world.unwrap(job.model).state_dict()))
    return states, copies(job.ema.model.state_dict())


@pytest.mark.parametrize(("decay", "warmup"), [(0.7, True), (0.7, False), (0.9999, True)])
def test_it_is_the_recurrence(dataset_dir: Path, tmp_path: Path, decay: float, warmup: bool) -> None:
    """In float64: it begins with the first update's weights; n updates decay by min(decay, 1 − n^(−2/3)), without warm-up by decay."""
    overrides = [f"ema.decay={decay}", f"ema.warmup={str(warmup).lower()}"]
    config = make_config(tmp_path, dataset_dir)
    ((states, found),) = run_ranks(1, states_of_steps, config, tmp_path / "run", overrides, 9)
    expected = {name: value.astype(np.float64) for name, value in states[0].items()}
    for n, state in enumerate(states[1:], start=2):
        keep = min(decay, 1.0 - n ** (-2 / 3)) if warmup else decay
        expected = {name: keep * value + (1.0 - keep) * state[name] for name, value in expected.items()}
    assert found.keys() == states[0].keys()
    for name, value in found.items():
        if value.dtype == np.int64:
            assert value == states[-1][name] == 9 * 4, "batches counted by BatchNorm are copied"
        else:
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
    assert any(abs(value - states[-1][name]).max() > 1e-3 for name, value in found.items())


def test_ranks_do_not_change_it(dataset_dir: Path, tmp_path: Path) -> None:
    """1 and 2 ranks end with the same average, and all ranks of a world with the same bits."""
    config = make_config(tmp_path, dataset_dir, model="test_convnext")
    (_, alone), *_ = run_ranks(1, states_of_steps, config, tmp_path / "one", ["ema.decay=0.9"], 6)
    (_, first), (_, second) = run_ranks(2, states_of_steps, config, tmp_path / "two", ["ema.decay=0.9"], 6)
    for name, value in alone.items():
        assert np.array_equal(first[name], second[name])
        assert abs(first[name] - value).max() < 2e-4


def test_a_run_stopped_twice_ends_with_the_same_average(grounds: Path, tmp_path: Path) -> None:
    """Cut back to a checkpoint in mid-epoch, resumed, cut back again: history, weights and EMA equal bit for bit."""
    shutil.copytree(grounds / "on", tmp_path / "broken")
    for stop in (3, 12):
        cut_back(tmp_path / "broken", step=stop)
        said = command("train", 1, tmp_path, "--config", grounds / "config.yaml", "--run-dir", tmp_path / "broken", *ON)
        assert f"going on from step {stop}" in said
        assert json.dumps(rows_of(tmp_path / "broken")) == json.dumps(rows_of(grounds / "on"))
        for name in ("model.safetensors", "ema.safetensors"):
            ours, theirs = (state_of(run, 5 * EPOCHS, name) for run in (tmp_path / "broken", grounds / "on"))
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_a_run_goes_on_with_its_average_on_another_number_of_ranks(dataset_dir: Path, tmp_path: Path) -> None:
    """Stopped in mid-epoch on one rank, finished on two; without BatchNorm, whose statistics are the main process's."""
    config = make_config(tmp_path, dataset_dir, model="test_convnext")
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    on = (*ON, "train.epochs=2")
    command("train", 1, tmp_path, "--config", config, "--run-dir", whole, *on)
    shutil.copytree(whole, moved)
    cut_back(moved, step=8)
    command("train", 2, tmp_path, "--config", config, "--run-dir", moved, *on)
    ours, theirs = (state_of(run, 10, "ema.safetensors") for run in (whole, moved))
    assert max(abs(ours[name] - theirs[name]).max() for name in ours) < 2e-4
    for row, other in zip(rows_of(whole), rows_of(moved), strict=True):
        assert row["val_ema"]["loss"] == pytest.approx(other["val_ema"]["loss"], rel=1e-3)


def test_on_adds_a_block_and_a_file_and_changes_nothing_else(grounds: Path) -> None:
    """The raw weights, the optimizer and all else in the history are those of the run without; without, there is no trace."""
    on, off = rows_of(grounds / "on"), rows_of(grounds / "off")
    for with_ema, without in zip(on, off, strict=True):
        assert with_ema.pop("val_ema")["loss"] != with_ema["val"]["loss"]
        assert with_ema["digests"].pop("config") != without["digests"].pop("config")
    assert json.dumps(on) == json.dumps(off)
    columns = [json.loads((grounds / run / "training_history.json").read_text()) for run in ("on", "off")]
    added = {f"val_ema_{name}" for name in ("loss", "top1_acc", "top5_acc", "macro_top1_acc", "num_samples")}
    added |= {f"val_ema_{frequency}_top1_acc" for frequency in ("medium", "few")}
    assert columns[0].keys() - columns[1].keys() == added
    assert columns[1].keys() <= columns[0].keys()
    files = [{path.name for path in (grounds / run / "checkpoints/step_00000015").iterdir()} for run in ("on", "off")]
    assert files[0] - files[1] == {"ema.safetensors"}
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (state_of(grounds / run, 15, name) for run in ("on", "off"))
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_command_evaluates_what_the_row_holds(
    grounds: Path, dataset_dir: Path, tmp_path: Path, world_size: int
) -> None:
    """Either set of weights, read back from its file, gives its block of the row to the last bit; the command says which."""
    row = rows_of(grounds / "on")[-1]
    for weights, block in (("raw", "val"), ("ema", "val_ema")):
        chosen = ("--run", grounds / "on", "--checkpoint", "last", "--data", dataset_dir, "--split", "val")
        said = command(
            "evaluate", world_size, tmp_path, *chosen, "--weights", weights, "--json", tmp_path / "found.json"
        )
        assert json.loads((tmp_path / "found.json").read_text()) == {"val": row[block]}
        assert said.startswith(f"{weights} weights of ")


def test_what_is_not_there_is_refused(grounds: Path, dataset_dir: Path, tmp_path: Path) -> None:
    """An EMA asked of a run without one; an EMA switched on or off, or changed, on resume."""
    asked = ("--run", grounds / "off", "--checkpoint", "last", "--data", dataset_dir, "--split", "val")
    (finished,) = command_on_ranks(1, "aplantida_dist.evaluate", [*asked, "--weights", "ema"], tmp_path)
    assert finished.code == 2
    assert "holds no EMA: its run had ema.decay null; take the raw weights" in finished.stderr
    for run, overrides, told in (
        ("on", OFF, "ema.decay was 0.9, is null"),
        ("off", ON, "ema.decay was null, is 0.9"),
        ("on", (*ON, "ema.decay=0.99"), "ema.decay was 0.9, is 0.99"),
        ("on", (*ON, "ema.warmup=false"), "ema.warmup was true, is false"),
    ):
        arguments = ["--config", grounds / "config.yaml", "--run-dir", grounds / run, *overrides]
        (finished,) = command_on_ranks(1, "aplantida_dist.train", arguments, tmp_path)
        assert finished.code == 2
        assert told in finished.stderr


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["checkpoint.best_metric=val_ema.top1"], "expected a metric of train or val where ema.decay is null"),
        (["ema.decay=1.0"], "ema.decay: found 1.0"),
        (["ema.decay=0"], "ema.decay: found 0"),
        (
            ["ema.decay=0.9", "evaluation.every_epochs=0", "checkpoint.best_metric=val_ema.top1"],
            "expected a metric of train",
        ),
    ],
)
def test_a_config_that_cannot_be_meant(grounds: Path, overrides: list[str], told: str) -> None:
    """A best metric that no row would hold, and decays that average nothing or forget everything."""
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        load_config(grounds / "config.yaml", overrides)


def test_a_warm_up_of_nothing_is_an_error(grounds: Path, tmp_path: Path) -> None:
    """Nothing reads it where no EMA is kept."""
    arguments = ["--config", grounds / "config.yaml", "--run-dir", tmp_path / "run", "ema.warmup=false"]
    (finished,) = command_on_ranks(1, "aplantida_dist.train", arguments, tmp_path)
    assert finished.code == 2
    assert "ema.warmup: is set to false, but nothing reads it" in finished.stderr


def test_best_goes_by_the_average_where_it_is_named(grounds: Path) -> None:
    """checkpoint.best_metric val_ema.loss points to the row with the smallest."""
    best = min(rows_of(grounds / "on"), key=lambda row: float(row["val_ema"]["loss"]))
    pointed = json.loads((grounds / "on/checkpoints/best.json").read_text())
    found = (pointed["metric"], pointed["step"], pointed["value"])
    assert found == ("val_ema.loss", best["step"], best["val_ema"]["loss"])


def moves_and_faults(config: Path, run_dir: Path) -> tuple[list[bool], str]:
    """Whether the EMA moved in a step that the scaler skips and in one that it takes; what is said of one with a NaN."""
    job = compose(config, run_dir, ["ema.decay=0.9"]).job
    assert job.ema is not None
    # accelerate makes a scaler on GPUs alone; torch's own works anywhere.
    job.world.accelerator.scaler = torch.amp.GradScaler("cpu")
    job = replace(job, optimizer=job.world.accelerator.prepare_optimizer(job.optimizer.optimizer), clip_norm=None)
    batches, running, moved = read_ahead(job, 0), Running(Totals(job.num_classes, job.world.device)), []
    for step in range(2):
        before = copies(job.ema.model.state_dict())
        if step == 0:
            weights = next(job.model.parameters())
            weights.grad = torch.full_like(weights, float("inf"))
        run_step(job, batches, running, step)
        after = job.ema.model.state_dict()
        moved.append(any(not np.array_equal(before[name], tensor.numpy()) for name, tensor in after.items()))
    assert running.watch.skipped_steps == 1
    next(job.ema.model.parameters()).data.fill_(float("nan"))
    so_far = EpochSoFar(running.totals.vector, 0.0, 0, 0, 0, 0, 0)
    bare = job.world.unwrap(job.model)
    state = take_state_across_ranks(bare, job.optimizer.optimizer, ema=job.ema.model, is_main=True)
    with pytest.raises(CheckpointError) as error:
        job.record.save(state, step=2, epoch=0, so_far=so_far, scaler={})
    return moved, str(error.value)


def test_a_skipped_step_does_not_move_it_and_a_broken_one_is_not_saved(dataset_dir: Path, tmp_path: Path) -> None:
    """A step that updates no weight is none for the average; NaN is refused in it as in the weights."""
    ((moved, told),) = run_ranks(1, moves_and_faults, make_config(tmp_path, dataset_dir), tmp_path / "run")
    assert moved == [False, True]
    assert "1 weights hold NaN or Inf, first EMA of " in told


def test_its_file_is_under_the_checkpoints_digests(grounds: Path, tmp_path: Path) -> None:
    """One flipped byte is found; a file that was put beside is not taken for the run's."""
    for run in ("on", "off"):
        shutil.copytree(grounds / run / "checkpoints/step_00000015", tmp_path / run)
    content = bytearray((tmp_path / "on/ema.safetensors").read_bytes())
    content[-50] ^= 1
    for run in ("on", "off"):
        (tmp_path / run / "ema.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors has changed"):
        load_checkpoint(tmp_path / "on")
    with pytest.raises(CheckpointError, match="holds no EMA"):
        load_checkpoint(tmp_path / "off").model_state("ema")


def test_the_views_show_it(grounds: Path) -> None:
    """Console line, table and plots, from the record and from the columns; not where there is none."""
    (record, columns, off) = (
        read_sources([source])[0] for source in (grounds / "on", grounds / "on/training_history.json", grounds / "off")
    )
    rows = read_history(grounds / "on/history.jsonl")
    assert columns.ema.loss == record.ema.loss == tuple(row.val_ema and row.val_ema.loss for row in rows)
    assert columns.ema.top1 == pytest.approx(record.ema.top1)
    assert rows[0].val_ema is not None
    assert f"EMA loss {rows[0].val_ema.loss:.4f}" in summary_line(rows[0], is_best=False)
    for curves, is_shown in ((record, True), (columns, True), (off, False)):
        assert ("EMA val top-1" in epoch_table(curves).heads) == is_shown
        assert ("EMA val" in {line.label for line in panels_of([curves])[0].lines}) == is_shown


def test_a_leak_has_its_clean_part_too(grounds: Path) -> None:
    """Where val leaks, the EMA is told and judged by the clean part; a block without a val beside it is refused."""
    (row, *_) = read_history(grounds / "on/history.jsonl")
    content = row.to_json()
    clean = {**content["val_ema"], "loss": 3.0, "num_samples": 5, "expected_samples": 5}
    for block in ("val", "val_ema"):
        content[block] |= {"leaked_samples": 4, "clean": clean}
    leaking = make_row(**content)
    assert leaking.metric(leaking.clean_name("val_ema.loss")) == 3.0
    assert columns_of([leaking])["val_ema_clean_loss"] == [3.0]
    assert "EMA on the clean part loss 3.0000" in summary_line(leaking, is_best=False)
    del content["val"]
    with pytest.raises(HistoryError, match="val_ema does not stand beside a val of the same samples"):
        make_row(**content)


def first_state(config: Path, run_dir: Path, *overrides: str) -> dict[str, Any]:
    """The weights with which a run begins."""
    return copies(compose(config, run_dir, overrides).job.model.state_dict())


def test_a_run_begins_with_the_average_of_another_where_it_says_so(
    grounds: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    """The tensors of ema.safetensors, bit for bit; without the key those of model.safetensors; none is refused, and so is a .pt."""
    config, ancestor = make_config(tmp_path, dataset_dir), f"model.init_from={grounds / 'on'}"
    step = int(json.loads((grounds / "on/checkpoints/best.json").read_text())["checkpoint"].removeprefix("step_"))
    for name, overrides in (("ema", ["model.init_from_ema=true"]), ("model", [])):
        begun = first_state(config, tmp_path / name, ancestor, *overrides)
        stored = state_of(grounds / "on", step, f"{name}.safetensors")
        assert [key for key in stored if not np.array_equal(stored[key], begun[key])] == []
    torch.save({"model_state_dict": {"w": torch.zeros(1)}}, tmp_path / "old.pt")
    for overrides, told in (
        ([f"model.init_from={grounds / 'off'}", "model.init_from_ema=true"], "holds no EMA"),
        ([f"model.init_from={tmp_path / 'old.pt'}", "model.init_from_ema=true"], "a .pt holds one set of weights"),
        (["model.init_from_ema=true"], "model.init_from_ema: is set to true, but nothing reads it"),
    ):
        arguments = ["--config", config, "--run-dir", tmp_path / "none", *overrides]
        (refused,) = command_on_ranks(1, "aplantida_dist.train", arguments, tmp_path)
        assert (refused.code, refused.stderr.count("\n")) == (2, 1)
        assert told in refused.stderr


def test_a_teacher_is_its_average_where_the_student_says_so(grounds: Path, dataset_dir: Path, tmp_path: Path) -> None:
    """Its logits of a picture are those of the EMA's weights; a teacher without one is refused."""
    config = make_config(tmp_path, dataset_dir)
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    checkpoints = grounds / "on/checkpoints"
    best = load_checkpoint(checkpoints / json.loads((checkpoints / "best.json").read_text())["checkpoint"])
    taught = f"distillation.teachers=[{grounds / 'on'}]"
    for weights, overrides in (("ema", ["distillation.teacher_ema=true"]), ("raw", [])):
        job = compose(config, tmp_path / weights, [taught, *overrides]).job
        (logits,) = job.teachers.look_at(pictures)
        model = job.world.unwrap(job.model)
        model.load_state_dict(best.model_state(weights))
        with torch.no_grad():
            assert torch.equal(logits, model.eval()(job.normalize(pictures)))
    arguments = ["--config", config, "--run-dir", tmp_path / "none", f"distillation.teachers=[{grounds / 'off'}]"]
    (refused,) = command_on_ranks(1, "aplantida_dist.train", [*arguments, "distillation.teacher_ema=true"], tmp_path)
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert "holds no EMA" in refused.stderr
