"""Training on real ranks: laws 2, 4 and 1, end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aplantida_dist.data.plan import Coordinates
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from aplantida_dist.job import Running
from aplantida_dist.metrics import Totals, compute
from aplantida_dist.objective import Targets
from aplantida_dist.record import Record
from aplantida_dist.schedule import Schedule
from aplantida_dist.step import run_step
from aplantida_dist.trainer import read_ahead
from tests.ranks import command_on_ranks, run_ranks
from tests.runs import compose, rows_of, write_config

STEPS = 20


def losses_of_steps(config: Path, run_dir: Path, overrides: Sequence[str], num_steps: int = STEPS) -> dict[str, Any]:
    """Train so many steps on this rank; the loss of each over all ranks, the keys read in order, the weights at the end."""
    job = compose(config, run_dir, overrides).job
    job.model.train()
    running = Running(Totals(job.num_classes, job.world.device))
    keys: list[Any] = []
    batches = ((keys.append((tuple(batch.at), batch.sample_keys)), batch)[1] for batch in read_ahead(job, 0))
    losses = []
    for step in range(num_steps):
        run_step(job, batches, running, step)
        losses.append(compute(job.world.sum_across_ranks(running.totals.vector)).loss)
        running.reset()
    weights = [parameter.detach().clone().numpy() for parameter in job.model.parameters()]
    return {"losses": losses, "keys": keys, "weights": weights, "slots": job.plan.slots_per_step}


@pytest.mark.parametrize("optimizer", ["adamw"])
def test_ranks_do_not_change_the_training(dataset_dir: Path, tmp_path: Path, optimizer: str) -> None:
    """1, 2 and 3 ranks: the same samples in the same slots, losses equal to 1e-5, weights close; ragged last batches included."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=4)
    outcomes = {}
    for world_size in (1, 2, 3):
        ranks = run_ranks(
            world_size, losses_of_steps, config, tmp_path / f"run_{world_size}", [f"optimizer.name={optimizer}"]
        )
        assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks)
        order = sorted(entry for rank in ranks for entry in rank["keys"] if entry[0][2] < ranks[0]["slots"])
        outcomes[world_size] = (ranks[0]["losses"], order[: STEPS * ranks[0]["slots"]], ranks[0]["weights"])
    losses, order, weights = outcomes[1]
    assert len(losses) == STEPS
    assert len(order) == STEPS * 4
    assert sum(losses[:5]) > sum(losses[-5:]), "the model must learn something for the comparison to mean anything"
    for world_size in (2, 3):
        other_losses, other_order, other_weights = outcomes[world_size]
        assert other_order == order
        assert other_losses == pytest.approx(losses, rel=1e-5)
        for ours, theirs in zip(weights, other_weights, strict=True):
            assert abs(ours - theirs).max() < 2e-4


class Probe(nn.Module):
    """A small network in float64 without BatchNorm, so that a gradient can be compared to 1e-12."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 8 * 8, 16, dtype=torch.float64)
        self.second = nn.Linear(16, num_classes, dtype=torch.float64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        small = nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)
        logits: torch.Tensor = self.second(torch.tanh(self.first(small)))
        return logits


class ToDouble(nn.Module):
    """uint8 → float64 in [−1, 1]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.double() / 127.5 - 1.0


def make_probe(num_classes: int) -> Probe:
    torch.manual_seed(11)
    return Probe(num_classes)


def gradient_of_step(
    config: Path, run_dir: Path, overrides: Sequence[str], step: int, with_scaler: bool = False
) -> list[Any]:
    """The gradient of one step over all ranks, read off a plain descent with learning rate 1."""
    job = compose(config, run_dir, overrides).job
    if with_scaler:
        # accelerate makes a scaler on GPUs alone; torch's own works anywhere, and the loop is the same.
        job.world.accelerator.scaler = torch.amp.GradScaler("cpu")
    model = make_probe(job.num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    prepared, prepared_optimizer = job.world.prepare(model, optimizer)
    job = replace(
        job,
        model=prepared,
        optimizer=prepared_optimizer,
        normalize=ToDouble(),
        schedule=Schedule("constant", 1.0, 1.0, 0, job.schedule.total_steps),
        clip_norm=None,
        record=Record(),
    )
    run_step(job, read_ahead(job, step), Running(Totals(job.num_classes, job.world.device)), step)
    return [(old - new.detach()).numpy() for old, new in zip(before, model.parameters(), strict=True)]


def reference_gradient(config: Path, run_dir: Path, overrides: Sequence[str], step: int) -> list[Any]:
    """The gradient of the mean loss over the step's samples, in one process, one batch, no accumulation."""
    job = compose(config, run_dir, overrides).job
    slots = [Coordinates(*divmod(step, job.plan.steps_per_epoch), slot) for slot in range(job.plan.slots_per_step)]
    micro_batches = MicroBatches(job.train_split, job.plan, job.train_transform, seed=job.seed)
    batches = list(stream(micro_batches, slots, reading=Reading(0, 1, pin_memory=False)))
    real = torch.cat([batch.weights for batch in batches]) > 0
    images = torch.cat([batch.images for batch in batches])[real]
    labels = torch.cat([batch.labels for batch in batches])[real]
    identities = torch.cat([batch.identities for batch in batches])[real]
    assert len(labels) == job.plan.samples_in_step(step % job.plan.steps_per_epoch)
    model = make_probe(job.num_classes)
    job.objective(model(ToDouble()(images)), Targets(labels, identities=identities)).mean().backward()
    return [parameter.grad.numpy() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("step", [1, 4], ids=["whole step", "ragged last step"])
@pytest.mark.parametrize("micro_batch_size", [16, 4, 2], ids=["no accumulation", "4 slots", "8 slots"])
def test_the_gradient_is_that_of_the_mean_over_the_global_batch(
    dataset_dir: Path, tmp_path: Path, micro_batch_size: int, step: int
) -> None:
    """Σ w·ℓ / Σ w to 1e-12, for 1 to 4 ranks, ragged last steps, idle ranks, with and without accumulation."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    overrides = [f"train.micro_batch_size={micro_batch_size}"]
    (expected,) = run_ranks(1, reference_gradient, config, tmp_path / "reference", overrides, step)
    for world_size in (1, 2, 3, 4):
        for found in run_ranks(world_size, gradient_of_step, config, tmp_path / f"run_{world_size}", overrides, step):
            for ours, theirs in zip(found, expected, strict=True):
                assert abs(ours - theirs).max() < 1e-12
    assert max(abs(part).max() for part in expected) > 1e-3, "a gradient of zero would prove nothing"


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_loss_scaler_of_fp16_leaves_the_gradient_exact(dataset_dir: Path, tmp_path: Path, world_size: int) -> None:
    """A scale that is a power of two cancels to the last bit, ragged last step and accumulation included."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    plain = run_ranks(world_size, gradient_of_step, config, tmp_path / "plain", [], 4)
    scaled = run_ranks(world_size, gradient_of_step, config, tmp_path / "scaled", [], 4, True)
    for ours, theirs in zip(plain[0], scaled[0], strict=True):
        assert abs(ours - theirs).max() < 1e-15


def test_bf16_acts(dataset_dir: Path, tmp_path: Path) -> None:
    """The same step in bf16 has another loss than in fp32, by about the precision of bf16."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=4)
    (exact,) = run_ranks(1, losses_of_steps, config, tmp_path / "fp32", [])
    (rounded,) = run_ranks(1, losses_of_steps, config, tmp_path / "bf16", ["train.precision=bf16"])
    assert 0 < abs(exact["losses"][0] - rounded["losses"][0]) < 0.05


@pytest.mark.parametrize("max_samples", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_fewer_samples_than_a_batch_or_than_ranks_train_correctly(
    dataset_dir: Path, tmp_path: Path, world_size: int, max_samples: int
) -> None:
    """The first trainer reported a loss of 0.0 here. Every sample is counted, and the loss is a loss."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2)
    arguments = ["--config", config, "--run-dir", tmp_path / "run", "--max-samples", str(max_samples)]
    finished = command_on_ranks(world_size, "aplantida_dist.train", arguments, tmp_path)
    assert [rank.code for rank in finished] == [0] * world_size, finished[0].stderr
    rows = rows_of(tmp_path / "run")
    assert [row["train"]["num_samples"] for row in rows] == [max_samples] * 2
    assert all(1.0 < row["train"]["loss"] < 5.0 for row in rows)


def test_bf16_and_batchnorm_and_dropout_train_on_two_ranks(dataset_dir: Path, tmp_path: Path) -> None:
    """Autocast, buffers that ranks must share before evaluating, and random layers: rows are whole and proven."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, model="test_resnet", precision="bf16", epochs=2)
    arguments = ["--config", config, "--run-dir", tmp_path / "run", "model.kwargs.drop_rate=0.2"]
    finished = command_on_ranks(2, "aplantida_dist.train", arguments, tmp_path)
    assert [rank.code for rank in finished] == [0, 0], finished[0].stderr
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == [1, 2]
