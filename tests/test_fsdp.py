"""FSDP2: parameters lie in parts on the ranks, and nothing but the memory and the order of sums tells."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aplantida_dist.checkpoint import load_checkpoint, pack_optimizer, unpack_optimizer
from aplantida_dist.config import ConfigError
from aplantida_dist.config_faults import FSDP_OPTIMIZERS
from aplantida_dist.config_file import load_config
from aplantida_dist.job import Running
from aplantida_dist.metrics import Totals
from aplantida_dist.spreading import SpreadingError, laid_out_like, name_blocks, whole_across_ranks
from aplantida_dist.state import take_state_across_ranks
from aplantida_dist.step import run_step
from aplantida_dist.trainer import read_ahead
from aplantida_dist.world import WorldError, open_world
from tests.laws import last_step, train
from tests.ranks import command_on_ranks, run_ranks
from tests.runs import compose, cut_back, rows_of, write_config
from tests.test_optimizer import optimizer_of, saved

FSDP = "train.parallel=fsdp"
SETTINGS = ("ema.decay=0.9", "model.kwargs.drop_path_rate=0.2", "checkpoint.every_steps=2", "checkpoint.keep_last=100")
FILES = ("model", "ema", "optimizer")


def file_of(run_dir: Path, name: str, step: int | None = None) -> dict[str, np.ndarray]:
    """The tensors of one file of a checkpoint, the newest by default."""
    step = last_step(run_dir) if step is None else step
    return load_file(run_dir / "checkpoints" / f"step_{step:08d}" / f"{name}.safetensors")


def assert_same_to_1e_5(one: Path, other: Path) -> None:
    """Two runs read the same samples and lose the same, in training and on val, with the EMA too; their weights are close."""
    for ours, theirs in zip(rows_of(one), rows_of(other), strict=True):
        for block in ours.keys() & {"train", "val", "val_ema"}:
            assert ours[block]["identity_digest"] == theirs[block]["identity_digest"]
            assert ours[block]["loss"] == pytest.approx(theirs[block]["loss"], rel=1e-5)
    for name in ("model", "ema"):
        ours, theirs = file_of(one, name), file_of(other, name)
        assert ours.keys() == theirs.keys()
        assert max(abs(ours[key] - theirs[key]).max() for key in ours) < 2e-4


@pytest.fixture(scope="module")
def grounds(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config of 10 steps and its runs: `whole` on one process, `spread` on two ranks under FSDP2."""
    folder = tmp_path_factory.mktemp("fsdp")
    config = write_config(folder / "config.yaml", dataset_dir, model="test_vit", epochs=2)
    train(1, config, folder / "whole", *SETTINGS)
    train(2, config, folder / "spread", *SETTINGS, FSDP)
    return folder


def parts_held(config: Path, run_dir: Path, overrides: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Of each tensor of this rank, after a step and a forward without gradient: how many numbers of how many it holds."""
    job = compose(config, run_dir, overrides).job
    assert job.ema is not None
    run_step(job, read_ahead(job, 0), Running(Totals(job.num_classes, job.world.device)), 0)
    with torch.no_grad():
        job.model(torch.zeros(2, 3, 32, 32))
    moments = [value for state in job.optimizer.optimizer.state.values() for value in state.values() if value.ndim]
    kinds = {"model": list(job.model.parameters()), "moments": moments, "ema": list(job.ema.model.parameters())}
    return {name: [(_here(tensor).numel(), tensor.numel()) for tensor in kind] for name, kind in kinds.items()}


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_each_rank_holds_a_part(grounds: Path, tmp_path: Path) -> None:
    """Of weights, moments and EMA every rank has about half, and both together have each number once; under DDP each has all."""
    ours, theirs = run_ranks(2, parts_held, grounds / "config.yaml", tmp_path / "a", [*SETTINGS, FSDP])
    for name, parts in ours.items():
        assert len(parts) > 50
        assert all(here + there == whole for (here, whole), (there, _) in zip(parts, theirs[name], strict=True))
        held, all_numbers = (sum(numbers) for numbers in zip(*parts, strict=True))
        assert 0.4 < held / all_numbers < 0.6
    ddp, _ = run_ranks(2, parts_held, grounds / "config.yaml", tmp_path / "b", SETTINGS)
    assert all(here == whole for parts in ddp.values() for here, whole in parts)


def test_it_trains_as_one_process_does(grounds: Path) -> None:
    """Laws 3 and 4: the same samples, losses to 1e-5, and a checkpoint of the same tensors under the same names."""
    assert_same_to_1e_5(grounds / "whole", grounds / "spread")
    for name in FILES:
        whole, spread = file_of(grounds / "whole", name), file_of(grounds / "spread", name)
        assert {key: value.shape for key, value in whole.items()} == {key: value.shape for key, value in spread.items()}


def train_until_killed(config: Path, run_dir: Path, overrides: Sequence[str], step: int) -> None:
    """Run the command on this rank, and SIGKILL it when a checkpoint of this step is on disk."""

    def strike() -> None:
        while not (run_dir / "checkpoints" / f"step_{step:08d}").exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=strike, daemon=True).start()
    sys.argv = ["aplantida_dist.train", "--config", str(config), "--run-dir", str(run_dir), *overrides]
    runpy.run_module("aplantida_dist.train", run_name="__main__")


@pytest.mark.slow
def test_kill_9_in_mid_epoch_loses_nothing(grounds: Path, tmp_path: Path) -> None:
    """Law 5, with weights, moments and EMA in parts: the same command again writes the unbroken run's history and files, bit for bit."""
    broken, config = tmp_path / "broken", grounds / "config.yaml"
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(2, train_until_killed, config, broken, [*SETTINGS, FSDP], 2)
    assert 2 <= last_step(broken) < 10, "killed too late to prove anything"
    said = train(2, config, broken, *SETTINGS, FSDP)
    assert "going on from step" in said
    assert json.dumps(rows_of(broken)) == json.dumps(rows_of(grounds / "spread"))
    for name in FILES:
        ours, theirs = file_of(broken, name), file_of(grounds / "spread", name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not np.array_equal(ours[key], theirs[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("written_by", "world_size", "how"),
    [("spread", 2, "ddp"), ("spread", 1, "fsdp"), ("whole", 3, "fsdp")],
)
def test_a_run_goes_on_elsewhere(grounds: Path, tmp_path: Path, written_by: str, world_size: int, how: str) -> None:
    """How ranks share a model may change when a run goes on, as their number may: the checkpoint knows of neither."""
    moved = tmp_path / "moved"
    shutil.copytree(grounds / written_by, moved)
    cut_back(moved, step=6)
    said = train(world_size, grounds / "config.yaml", moved, *SETTINGS, f"train.parallel={how}")
    assert "going on from step 6" in said
    assert_same_to_1e_5(grounds / "whole", moved)


def test_its_checkpoint_is_plain_timm(grounds: Path, dataset_dir: Path, tmp_path: Path) -> None:
    """One process loads the file into a timm model, strictly, and `evaluate` there finds the row's numbers, raw and EMA."""
    spread, checkpoint = grounds / "spread", grounds / "spread/checkpoints/step_00000010"
    for name in ("model", "ema"):
        state = load_tensors(checkpoint / f"{name}.safetensors")
        assert {type(tensor) for tensor in state.values()} == {Tensor}
        model = timm.create_model("test_vit", num_classes=6, img_size=32)
        assert str(model.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    row = rows_of(spread)[-1]
    for weights, block in (("raw", "val"), ("ema", "val_ema")):
        told = tmp_path / f"{weights}.json"
        command = ["--run", spread, "--data", dataset_dir, "--split", "val", "--checkpoint", checkpoint]
        (finished,) = command_on_ranks(
            1, "aplantida_dist.evaluate", [*command, "--weights", weights, "--json", told], tmp_path
        )
        assert finished.code == 0, finished.stderr
        assert json.loads(told.read_text())["val"] == row[block]


SWITCHES = {
    "teacher": (
        "train.precision=bf16",
        "model.grad_checkpointing=true",
        "optimizer.layer_decay=0.7",
        "model.freeze=[patch_embed,blocks.0]",
        "model.head_only_epochs=0.5",
        "train.on_nonfinite=skip",
        "mixing.mixup_alpha=0.8",
    ),
    "batchnorm": ("model.name=test_efficientnet", "optimizer.name=lion", "train.clip_norm=null"),
}


@pytest.mark.slow
@pytest.mark.parametrize("overrides", SWITCHES.values(), ids=SWITCHES)
def test_it_goes_with_the_other_switches(dataset_dir: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """What a large teacher is trained with, and buffers beside parts: as on one process."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, model="test_vit", epochs=1)
    overrides = (*overrides, "ema.decay=0.9")
    train(1, config, tmp_path / "whole", *overrides)
    train(2, config, tmp_path / "spread", *overrides, FSDP)
    (ours,), (theirs,) = rows_of(tmp_path / "whole"), rows_of(tmp_path / "spread")
    assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=1e-5)


class Blocks(nn.Module):
    """Two blocks whose rows two ranks cannot share evenly, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Bilinear(3, 2, 5), nn.Bilinear(5, 2, 1)])
        self.head = nn.Linear(1, 7)


def distances(names: Sequence[str], folder: Path) -> dict[str, tuple[float, float]]:
    """Of each optimizer, after 6 given gradients: how far weights in parts are from whole ones, and those from where they began."""
    world = open_world(precision="fp32", timeout_s=60, spreads_parameters=True)
    found = {}
    for name in names:
        whole, spread = Blocks(), Blocks()
        optimizer, parted = optimizer_of(whole, name), optimizer_of(spread, name)
        name_blocks(spread)
        world.prepare(spread, parted)
        generator = torch.Generator().manual_seed(1)
        for step in range(6):
            for ours, theirs in zip(whole.parameters(), spread.parameters(), strict=True):
                ours.grad = torch.randn(ours.shape, generator=generator)
                theirs.grad = laid_out_like(theirs, ours.grad.clone())
            optimizer.step()
            parted.step()
            if step == 2:
                exchange_across_ranks((whole, optimizer), (spread, parted), folder / name, is_main=world.is_main)
        found[name] = distance_across_ranks(whole, spread), distance_across_ranks(whole, Blocks())
    world.close()
    return found


def exchange_across_ranks(whole: tuple[Any, Any], spread: tuple[Any, Any], folder: Path, *, is_main: bool) -> None:
    """Both optimizers give the same for a checkpoint; the one in parts gets that of the whole one in exchange for zeros."""
    state = take_state_across_ranks(*spread, ema=None, is_main=is_main)
    if is_main:
        tensors, facts = pack_optimizer(*whole)
        assert state.optimizer_facts == facts
        assert state.optimizer.keys() == tensors.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(state.optimizer[key], tensor, rtol=1e-5, atol=1e-6)
        saved(folder, *whole)
    torch.distributed.barrier()
    for entries in spread[1].state.values():
        for value in entries.values():
            if isinstance(value, Tensor):
                value.zero_()
    unpack_optimizer(*spread, load_checkpoint(folder / "step_00000003"))


def distance_across_ranks(one: nn.Module, other: nn.Module) -> float:
    """The largest difference between two weights."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - whole_across_ranks(b)).detach().abs().max()) for a, b in pairs)


@pytest.mark.slow
def test_optimizers_move_parts_as_the_whole(tmp_path: Path) -> None:
    """Each that the config lets through, uneven and empty parts included, a checkpoint of the whole one loaded into parts on the way."""
    ours, theirs = run_ranks(2, distances, FSDP_OPTIMIZERS, tmp_path)
    assert ours == theirs
    assert [name for name, (_, moved) in ours.items() if moved < 1e-4] == []
    by_norms = {"lamb", "lars"}
    assert {name: apart for name, (apart, _) in ours.items() if apart > (1e-6 if name in by_norms else 0.0)} == {}


def scaled_steps(config: Path, run_dir: Path, overrides: Sequence[str]) -> list[Any]:
    """Two steps under an fp16 scaler, the second with an overflow in a part that rank 0 alone holds."""
    job = compose(config, run_dir, overrides).job
    accelerator = job.world.accelerator
    # accelerate makes a scaler on GPUs alone; torch's own works anywhere.
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    job = replace(job, optimizer=accelerator.prepare_optimizer(job.optimizer.optimizer))
    batches, running, told = read_ahead(job, 0), Running(Totals(job.num_classes, job.world.device)), []
    for step in range(2):
        if step == 1:
            first = next(iter(job.model.parameters()))  # one row, which rank 0 holds
            first.grad = laid_out_like(first, torch.full(first.shape, float("inf")))
        before = [whole_across_ranks(p).detach().clone() for p in job.model.parameters()]
        run_step(job, batches, running, step)
        after = [whole_across_ranks(p).detach() for p in job.model.parameters()]
        are_moved = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
        told.append((job.optimizer.step_was_skipped, any(are_moved)))
    job.world.close()  # or a rank that is through cuts the other off in its last collective
    return [told, running.watch.skipped_steps, [tensor.numpy() for tensor in after]]


def test_an_overflow_in_one_part_skips_the_step_on_every_rank(grounds: Path, tmp_path: Path) -> None:
    """fp16: the scaler's finding is shared, and scaled gradients give the weights of one process."""
    (alone,) = run_ranks(1, scaled_steps, grounds / "config.yaml", tmp_path / "a", ["optimizer.name=sgd"])
    for rank in run_ranks(2, scaled_steps, grounds / "config.yaml", tmp_path / "b", ["optimizer.name=sgd", FSDP]):
        assert rank[:2] == alone[:2] == [[(False, True), (True, False)], 1]
        assert max(abs(ours - theirs).max() for ours, theirs in zip(alone[2], rank[2], strict=True)) < 1e-6


REFUSED = {
    "model.channels_last=true": "model.channels_last: found true, expected false where train.parallel is fsdp",
    "model.compile=inductor": 'model.compile: found "inductor", expected null where',
    "model.sync_batchnorm=true": "model.sync_batchnorm: found true, expected false where",
    "train.clip_agc=0.01": "train.clip_agc: found 0.01, expected null where",
    "train.micro_batch_size=auto": 'train.micro_batch_size: found "auto", expected a number where',
    "optimizer.name=muon": 'optimizer.name: found "muon", expected one of adam, adamax, adamw, ',
    "optimizer.kwargs.caution=true": "optimizer.kwargs: found .* expected no caution where",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_needs_whole_weights_is_refused(dataset_dir: Path, tmp_path: Path, override: str) -> None:
    """Before anything runs, in one line that says what to set; under DDP the same config is none."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    overrides = ["train.clip_norm=null", override]
    with pytest.raises(ConfigError, match=REFUSED[override]):
        load_config(config, [*overrides, FSDP])
    load_config(config, overrides)


def test_a_model_without_blocks_is_refused(dataset_dir: Path, tmp_path: Path) -> None:
    """It would be whole at once: one line, on every rank, told once."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, model="test_resnet")
    command = ["--config", config, "--run-dir", tmp_path / "run", FSDP]
    finished = command_on_ranks(2, "aplantida_dist.train", command, tmp_path)
    assert [rank.code for rank in finished] == [2, 2]
    assert [rank.stderr.count("\n") for rank in finished] == [1, 0]
    assert "train.parallel: found fsdp, but ResNet has no `blocks`" in finished[0].stderr
    with pytest.raises(SpreadingError):
        name_blocks(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "name", ["vit_large_patch14_224", "eva02_large_patch14_224", "swin_large_patch4_window7_224", "convnext_xlarge"]
)
def test_large_teachers_have_blocks(name: str) -> None:
    """Models that do not fit come apart into many blocks, of which the largest is at most a fifth of the whole."""
    with torch.device("meta"):
        model = timm.create_model(name)
    name_blocks(model)
    sizes = [
        sum(p.numel() for p in module.parameters())
        for module in model.modules()
        if type(module).__name__ in model._no_split_modules
    ]
    assert len(sizes) >= 20
    assert max(sizes) < 0.2 * sum(p.numel() for p in model.parameters())
    assert sum(sizes) > 0.9 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("option", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_launcher_that_says_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """What accelerate's own settings ask for would be ignored, so that they are a mistake under either value of the key."""
    monkeypatch.setenv(f"ACCELERATE_USE_{option}", "true")
    for is_spread in (False, True):
        with pytest.raises(WorldError, match=f"launched with {option} .*set train.parallel to ddp or fsdp"):
            open_world(precision="fp32", timeout_s=60, spreads_parameters=is_spread)
