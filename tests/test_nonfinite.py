"""Steps that are not finite: every rank learns of one at once, no weight is touched by it, and nothing is silent about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from aplantida_dist.job import Running
from aplantida_dist.metrics import Totals, compute
from aplantida_dist.nonfinite import NonFiniteError, NonFinitePolicy, StepEvidence, Watch, is_left_out_across_ranks
from aplantida_dist.objective import Objective, Targets
from aplantida_dist.record import Record
from aplantida_dist.step import run_step
from aplantida_dist.trainer import read_ahead, train
from tests.ranks import run_ranks
from tests.runs import compose, cut_back, rows_of, write_config

STEPS = 5
"""One epoch of the small dataset: four steps of 16 samples and one of 5."""


class Poisoned:
    """An objective whose loss of one sample, in one call on one rank, is a given number, whatever the model says."""

    def __init__(self, objective: Objective, *, calls: Sequence[int], loss: float) -> None:
        self.objective, self.calls, self.loss, self.num_calls = objective, calls, loss, 0

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        losses = self.objective(logits, targets)
        if self.num_calls in self.calls:
            losses = torch.where(torch.arange(len(losses)) == 1, losses + self.loss, losses)
        self.num_calls += 1
        return losses


def train_poisoned(
    config: Path,
    run_dir: Path,
    overrides: Sequence[str],
    *,
    steps: Sequence[int],
    loss: float = float("nan"),
    with_scaler: bool = False,
) -> dict[str, Any]:
    """Train with one loss of each of these steps (from 0) replaced, in the step's last slot but for padding: slot 3, or slot 1."""
    training = compose(config, run_dir, overrides)
    job = training.job
    slots = job.plan.slots_of(job.world.rank, job.world.world_size)
    calls = [
        (step - training.start_step) * len(slots) + slots.index(slot)
        for step in steps
        if (slot := 0 if step % STEPS == STEPS - 1 else 3) in slots
    ]
    if with_scaler:
        job.world.accelerator.scaler = torch.amp.GradScaler("cpu")
        model, optimizer = job.world.prepare(job.world.unwrap(job.model), job.optimizer.optimizer)
        job = replace(job, model=model, optimizer=optimizer)
    job = replace(job, objective=Poisoned(job.objective, calls=calls, loss=loss))
    error = ""
    try:
        train(job, start_step=training.start_step, running=training.running)
    except NonFiniteError as raised:
        error = str(raised)
    weights = [parameter.detach().clone().numpy() for parameter in job.model.parameters()]
    return {"error": error, "weights": weights, "finite": all(np.isfinite(weight).all() for weight in weights)}


def poisoned_on_ranks(world_size: int, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
    return run_ranks(world_size, lambda: train_poisoned(*arguments, **options))


@pytest.mark.parametrize("clip", ["1.0", "null"])
@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 2.0**31], ids=str)
def test_one_bad_loss_stops_every_rank_before_the_update(
    dataset_dir: Path, tmp_path: Path, loss: float, clip: str
) -> None:
    """A loss on the second of two ranks, also one whose gradient is finite: both stop at that step, and the weights are whole."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2, every_steps=1)
    run_dir = tmp_path / "run"
    ranks = poisoned_on_ranks(2, config, run_dir, [f"train.clip_norm={clip}"], steps=[2], loss=loss)
    for rank in ranks:
        assert rank["error"].startswith("step 3: 1 of 16 losses are NaN, infinite or beyond 2^30, first that of ")
        assert rank["finite"]
    account = json.loads((run_dir / "nonfinite_step_00000003.json").read_text())
    assert len({sample["sample_key"] for sample in account["samples"]}) == 16
    assert [(sample["rank"], sample["slot"]) for sample in account["samples"][::4]] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    (bad,) = [sample for sample in account["samples"] if not 0 < float(sample["loss"]) < 10]
    assert (bad["slot"], bad["sample_key"] in ranks[0]["error"]) == (3, True)
    assert str(float(bad["loss"])) == str(loss)
    assert json.loads((run_dir / "checkpoints" / "last.json").read_text())["step"] == 2
    assert not (run_dir / "history.jsonl").exists()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_skipped_step_is_void_in_its_row_and_changes_no_weight(
    dataset_dir: Path, tmp_path: Path, world_size: int
) -> None:
    """Coverage stays exact, the row counts the step, and the weights after it are those before it, BatchNorm's included."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, model="test_resnet", epochs=1, every_steps=1)
    overrides = ["train.on_nonfinite=skip", "checkpoint.keep_last=100"]
    ranks = poisoned_on_ranks(world_size, config, tmp_path / "run", overrides, steps=[2])
    assert [rank["error"] for rank in ranks] == [""] * world_size
    (row,) = rows_of(tmp_path / "run")
    train_block = row["train"]
    assert (train_block["num_samples"], train_block["void_samples"], train_block["nonfinite_steps"]) == (53, 16, 1)
    states = [load_model(tmp_path / "run", step) for step in (1, 2, 3, 4)]
    assert same(states[1], states[2])
    assert not same(states[0], states[1])
    assert not same(states[2], states[3])


def load_model(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    return load_file(run_dir / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_ranks_do_not_change_a_training_that_skips(dataset_dir: Path, tmp_path: Path) -> None:
    """1 against 2 ranks with two steps left out: the same rows, losses to 1e-5."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2)
    for world_size in (1, 2):
        poisoned_on_ranks(
            world_size, config, tmp_path / f"{world_size}", ["train.on_nonfinite=skip"], steps=[2, STEPS - 1]
        )
    for one, two in zip(rows_of(tmp_path / "1"), rows_of(tmp_path / "2"), strict=True):
        assert one["train"]["loss"] == pytest.approx(two["train"]["loss"], rel=1e-5)
        for name in ("identity_digest", "num_samples", "void_samples"):
            assert one["train"][name] == two["train"][name]
    assert rows_of(tmp_path / "1")[0]["train"]["void_samples"] == 16 + 5


def test_a_resume_after_a_skipped_step_is_exact_and_keeps_the_budget(dataset_dir: Path, tmp_path: Path) -> None:
    """Cut back to right after the skipped step: the same rows and weights; and the budget counts over the whole run."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2, every_steps=1)
    overrides = ["train.on_nonfinite=skip", "checkpoint.keep_last=100", "train.nonfinite_budget=2"]
    (whole,) = poisoned_on_ranks(1, config, tmp_path / "whole", overrides, steps=[2, 6])
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    cut_back(tmp_path / "broken", step=3)
    shutil.copytree(tmp_path / "broken", tmp_path / "spent")
    (again,) = poisoned_on_ranks(1, config, tmp_path / "broken", overrides, steps=[6])
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "broken")
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(whole["weights"], again["weights"], strict=True))
    (spent,) = poisoned_on_ranks(1, config, tmp_path / "spent", overrides, steps=[4, 6])
    assert spent["error"].startswith("step 7: ")
    assert "train.nonfinite_budget is 2" in spent["error"]


def test_a_run_that_stopped_may_go_on_by_skipping(dataset_dir: Path, tmp_path: Path) -> None:
    """Otherwise a deterministic run would stop at the same step for ever."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1, every_steps=1)
    (stopped,) = poisoned_on_ranks(1, config, tmp_path / "run", [], steps=[2])
    assert stopped["error"]
    (went_on,) = poisoned_on_ranks(1, config, tmp_path / "run", ["train.on_nonfinite=skip"], steps=[2])
    assert went_on["error"] == ""
    assert rows_of(tmp_path / "run")[0]["train"]["void_samples"] == 16


def test_off_changes_nothing(dataset_dir: Path, tmp_path: Path) -> None:
    """Without such a step `skip` and `stop` write the same rows and weights, apart from the config's digest."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    (stop,) = poisoned_on_ranks(1, config, tmp_path / "stop", [], steps=[])
    (skip,) = poisoned_on_ranks(1, config, tmp_path / "skip", ["train.on_nonfinite=skip"], steps=[])
    assert rows_of(tmp_path / "stop")[0]["train"] == rows_of(tmp_path / "skip")[0]["train"]
    assert "nonfinite_steps" not in rows_of(tmp_path / "stop")[0]["train"]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(stop["weights"], skip["weights"], strict=True))


class Overflowing:
    """An objective whose gradient, not its loss, overflows in one call: what fp16 does at too large a scale."""

    def __init__(self, objective: Objective, *, call: int) -> None:
        self.objective, self.call, self.num_calls = objective, call, 0

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        if self.num_calls == self.call:
            logits.register_hook(lambda gradient: gradient * float("inf"))
        self.num_calls += 1
        return self.objective(logits, targets)


def overflow_once(config: Path, run_dir: Path) -> tuple[dict[str, Any], list[int], float]:
    """Train an epoch with torch's scaler, which accelerate makes on GPUs alone; the third step overflows on the last rank."""
    job = compose(config, run_dir).job
    scaler = torch.amp.GradScaler("cpu")
    job.world.accelerator.scaler = scaler
    model, optimizer = job.world.prepare(job.world.unwrap(job.model), job.optimizer.optimizer)
    slots = job.plan.slots_of(job.world.rank, job.world.world_size)
    is_last = job.world.rank == job.world.world_size - 1
    told: list[int] = []
    schedule = job.schedule

    class Rates:
        """The schedule, and what it was asked."""

        total_steps = STEPS

        def learning_rate(self, step: int) -> float:
            told.append(step)
            return schedule.learning_rate(step)

    objective = Overflowing(job.objective, call=2 * len(slots) if is_last else -1)
    job = replace(job, model=model, optimizer=optimizer, objective=objective, schedule=Rates())  # type: ignore[arg-type]
    running = Running(Totals(job.num_classes, job.world.device))
    train(job, start_step=0, running=running)
    return rows_of(run_dir)[0]["train"], told, float(scaler.get_scale())


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_fp16_skips_is_counted_and_keeps_its_place(
    dataset_dir: Path, tmp_path: Path, world_size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its samples count, the row and the screen say so, the scale is halved, and the schedule goes by the step's number."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    ranks = run_ranks(world_size, overflow_once, config, tmp_path / "run")
    for block, rates_of_steps, scale in ranks:
        assert (block["skipped_steps"], block["num_samples"], block["void_samples"]) == (1, 69, 0)
        assert "nonfinite_steps" not in block
        assert rates_of_steps[:STEPS] == list(range(STEPS))
        assert scale == 2.0**15
    assert "1 steps skipped (fp16 overflow)" in capfd.readouterr().out


def test_a_bad_loss_under_fp16_is_no_overflow(dataset_dir: Path, tmp_path: Path) -> None:
    """The scaler would skip it for ever in silence: it stops the run, or is left out and void, as in fp32."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    ranks = poisoned_on_ranks(2, config, tmp_path / "stop", [], steps=[2], with_scaler=True)
    assert all(rank["error"].startswith("step 3: 1 of 16 losses") for rank in ranks)
    ranks = poisoned_on_ranks(2, config, tmp_path / "skip", ["train.on_nonfinite=skip"], steps=[2], with_scaler=True)
    assert [rank["error"] for rank in ranks] == ["", ""]
    block = rows_of(tmp_path / "skip")[0]["train"]
    assert (block["void_samples"], block["nonfinite_steps"], "skipped_steps" in block) == (16, 1, False)


def scale_until_it_stops(config: Path, run_dir: Path) -> tuple[int, str]:
    job = compose(config, run_dir).job
    job.world.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    watch, parameter = Watch(), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    for step in range(10):
        evidence = StepEvidence(step=step, norm=torch.tensor(float("inf")), slots=[])
        try:
            is_left_out_across_ranks(
                watch, evidence, policy=NonFinitePolicy("stop", 0), world=job.world, record=Record()
            )
        except NonFiniteError as error:
            return watch.skipped_steps, str(error)
        scaler.scale(parameter.sum() * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
    return watch.skipped_steps, ""


def test_a_gradient_that_overflows_at_every_scale_stops_the_run(dataset_dir: Path, tmp_path: Path) -> None:
    """Once the scaler is down to 1, it is the model."""
    ((skipped, error),) = run_ranks(
        1, scale_until_it_stops, write_config(tmp_path / "config.yaml", dataset_dir), tmp_path / "run"
    )
    assert skipped == 2
    assert "losses are finite, their gradient is not" in error


def test_void_since_keeps_the_identities_and_nothing_else() -> None:
    """Totals with a step taken back are those of the other samples, with the step's samples void."""
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    totals, others = Totals(7, device), Totals(7, device)
    for number in range(3):
        logits = torch.randn(8, 7, generator=generator)
        losses = torch.rand(8, generator=generator)
        told = {
            "labels": torch.randint(7, (8,), generator=generator),
            "weights": torch.tensor([1.0] * 6 + [0.0] * 2),
            "identities": torch.randint(2**62, (8,), generator=generator),
        }
        before = totals.vector.clone()
        totals.update(logits, losses, **told)
        if number == 1:
            totals.void_since(before)
            losses = torch.full((8,), torch.nan)
        others.update(logits, losses, **told)
    assert torch.equal(totals.vector, others.vector)
    assert compute(totals.vector).void_samples == 6


def steps_beyond_the_stop(config: Path, run_dir: Path) -> list[str]:
    """Run single steps without a record, the second one poisoned."""
    training = compose(config, run_dir)
    job = replace(training.job, record=Record(), objective=Poisoned(training.job.objective, calls=[5], loss=torch.inf))
    batches, outcomes = read_ahead(job, 0), []
    for step in range(2):
        before = [parameter.detach().clone() for parameter in job.model.parameters()]
        try:
            run_step(job, batches, training.running, step)
        except NonFiniteError:
            unchanged = zip(before, job.model.parameters(), strict=True)
            outcomes.append("same" if all(torch.equal(old, new) for old, new in unchanged) else "changed")
        else:
            outcomes.append("went on")
    return outcomes


def test_a_stop_leaves_the_weights_as_they_were(dataset_dir: Path, tmp_path: Path) -> None:
    """To the last bit, where the host need not wait for a device."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    assert run_ranks(1, steps_beyond_the_stop, config, tmp_path / "run") == [["went on", "same"]]
