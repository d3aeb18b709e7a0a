"""The long tail: losses against their formulas, on ranks and through a resume; many, medium and few against plain counting."""

from __future__ import annotations

import json
import math
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aplantida_dist.checkpoint import point_to
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.frequency import frequency_of
from aplantida_dist.history import columns_of, make_row
from aplantida_dist.job import Running
from aplantida_dist.long_tail import (
    ClassWeighted,
    Focal,
    LogitAdjusted,
    ShiftedLogits,
    effective_number_weights,
    log_prior,
)
from aplantida_dist.metrics import Totals, compute, top1_of_frequencies
from aplantida_dist.objective import CrossEntropy, Objective, Targets
from aplantida_dist.record import classes_text
from aplantida_dist.step import run_step
from aplantida_dist.trainer import read_ahead
from tests.ranks import Finished, command_on_ranks, run_ranks
from tests.runs import compose, cut_back, rows_of, write_config
from tests.test_history import values
from tests.test_resume import assert_same_run, train
from tests.test_training import gradient_of_step, reference_gradient

COUNTS = (340, 101, 100, 20, 19, 1, 0)
PLAIN = CrossEntropy(label_smoothing=0.0)
ADJUSTED, WEIGHTED, FOCAL = "loss.logit_adjustment=1.0", "loss.class_weights=effective_number", "loss.focal_gamma=2.0"
ALL = [ADJUSTED, WEIGHTED, "loss.effective_number_beta=0.9", FOCAL]


def make_logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(50, len(COUNTS), generator=generator) * 4.0
    return logits.to(dtype), torch.randint(len(COUNTS), (50,), generator=generator)


def probabilities(row: Sequence[float]) -> list[float]:
    largest = max(row)
    powers = [math.exp(value - largest) for value in row]
    return [power / math.fsum(powers) for power in powers]


def assert_losses(objective: Objective, expected: Any, dtype: torch.dtype = torch.float32) -> None:
    """Each sample's loss is `expected(its logits, its label)`, float32, to the last digits of float32."""
    logits, labels = make_logits(dtype)
    losses = objective(logits, Targets(labels))
    assert losses.dtype == torch.float32
    for loss, row, label in zip(losses.tolist(), logits.double().tolist(), labels.tolist(), strict=True):
        assert loss == pytest.approx(expected(row, label), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_logit_adjustment_is_the_formula(tau: float, dtype: torch.dtype) -> None:
    """−log of e^(z + τ log π) over their sum, π the share of the train samples; no train sample counts as one."""
    at_least_one = [max(count, 1) for count in COUNTS]
    prior = [count / sum(at_least_one) for count in at_least_one]

    def expected(row: list[float], label: int) -> float:
        return -math.log(probabilities([z + tau * math.log(p) for z, p in zip(row, prior, strict=True)])[label])

    assert_losses(LogitAdjusted(PLAIN, tau * log_prior(COUNTS)), expected, dtype)


def test_tau_of_one_is_balanced_softmax() -> None:
    """−log of n·e^z over Σ n·e^z (Ren et al. 2020, eq. 3), so that there is one key for both."""

    def expected(row: list[float], label: int) -> float:
        scaled = [max(count, 1) * math.exp(z) for count, z in zip(COUNTS, row, strict=True)]
        return -math.log(scaled[label] / math.fsum(scaled))

    assert_losses(LogitAdjusted(PLAIN, log_prior(COUNTS)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_is_the_formula(gamma: float, dtype: torch.dtype) -> None:
    """−(1 − p)^γ log p."""

    def expected(row: list[float], label: int) -> float:
        p = probabilities(row)[label]
        rest = math.fsum(q for i, q in enumerate(probabilities(row)) if i != label)
        return -(rest**gamma) * math.log(p)

    assert_losses(Focal(PLAIN, gamma), expected, dtype)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
def test_focal_of_a_certain_sample_has_a_finite_gradient(gamma: float) -> None:
    """Where p is 1 to the last bit, and where it is 0."""
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    Focal(PLAIN, gamma)(logits, Targets(torch.tensor([0, 0]))).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[1].abs().min() > 0.5


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.999999])
def test_effective_number_weights_are_the_formula_with_a_mean_of_one_over_the_samples(beta: float) -> None:
    """(1 − β) / (1 − β^n) up to one factor, which makes Σ n·weight / Σ n = 1."""
    weights = effective_number_weights(COUNTS, beta=beta).tolist()
    plain = [(1.0 - beta) / (1.0 - beta ** max(count, 1)) for count in COUNTS]
    assert math.fsum(n * weight for n, weight in zip(COUNTS, weights, strict=True)) / sum(COUNTS) == pytest.approx(1.0)
    assert weights == pytest.approx([weight * weights[0] / plain[0] for weight in plain], rel=1e-6)
    assert weights == sorted(weights)

    def expected(row: list[float], label: int) -> float:
        return -weights[label] * math.log(probabilities(row)[label])

    assert_losses(ClassWeighted(PLAIN, torch.tensor(weights)), expected)


def test_what_is_off_changes_no_bit(dataset_dir: Path, tmp_path: Path) -> None:
    """By default the objective is cross-entropy itself; and a prior that is even, or β = 0, is cross-entropy too."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    (objective,) = run_ranks(
        1, objective_of, config, tmp_path / "run", ["loss.logit_adjustment=0.0", "loss.focal_gamma=0.0"]
    )
    assert objective == "CrossEntropy(label_smoothing=0.1)"
    logits, labels = make_logits()
    plain = PLAIN(logits, Targets(labels))
    assert torch.equal(LogitAdjusted(PLAIN, 0.0 * log_prior(COUNTS))(logits, Targets(labels)), plain)
    assert torch.equal(ClassWeighted(PLAIN, effective_number_weights(COUNTS, beta=0.0))(logits, Targets(labels)), plain)


def objective_of(config: Path, run_dir: Path, overrides: Sequence[str]) -> str:
    return repr(compose(config, run_dir, overrides).job.objective)


def losses_of_steps(config: Path, run_dir: Path, variants: Sequence[Sequence[str]]) -> list[list[float]]:
    """For each set of overrides, the loss of each of six steps over all ranks: an epoch with its ragged last step, and one more."""
    losses: list[list[float]] = []
    for number, overrides in enumerate(variants):
        job = compose(config, run_dir / str(number), overrides).job
        job.model.train()
        running = Running(Totals(job.num_classes, job.world.device))
        batches = read_ahead(job, 0)
        losses.append([])
        for step in range(6):
            run_step(job, batches, running, step)
            losses[-1].append(compute(job.world.sum_across_ranks(running.totals.vector)).loss)
            running.reset()
    return losses


def test_each_switch_acts_and_two_ranks_agree(dataset_dir: Path, tmp_path: Path) -> None:
    """Another first loss than plain cross-entropy and than each other; the same losses on one rank and on two, to 1e-5."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    variants = [[], [ADJUSTED], [WEIGHTED], [FOCAL], ALL]
    (alone,) = run_ranks(1, losses_of_steps, config, tmp_path / "one", variants)
    together = run_ranks(2, losses_of_steps, config, tmp_path / "two", variants)
    assert together[0] == together[1]
    for ours, theirs in zip(together[0], alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert len({losses[0] for losses in alone}) == len(variants)


@pytest.mark.parametrize("step", [1, 4], ids=["whole step", "ragged last step"])
def test_the_gradient_with_everything_on_is_that_of_the_global_batch(
    dataset_dir: Path, tmp_path: Path, step: int
) -> None:
    """Class weights are part of ℓ: the divisor is the number of samples, to 1e-12, on one rank and on two."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    (expected,) = run_ranks(1, reference_gradient, config, tmp_path / "reference", ALL, step)
    (plain,) = run_ranks(1, reference_gradient, config, tmp_path / "plain", [], step)
    assert max(abs(one - other).max() for one, other in zip(expected, plain, strict=True)) > 1e-3
    for world_size in (1, 2):
        for found in run_ranks(world_size, gradient_of_step, config, tmp_path / f"run_{world_size}", ALL, step):
            for ours, theirs in zip(found, expected, strict=True):
                assert abs(ours - theirs).max() < 1e-12


def test_a_resume_in_mid_epoch_with_everything_on_is_the_unbroken_run(dataset_dir: Path, tmp_path: Path) -> None:
    """Weights, history and columns to the last bit."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2, every_steps=1)
    overrides = (*ALL, "checkpoint.keep_last=100")
    train(1, config, tmp_path / "whole", tmp_path, *overrides)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    cut_back(tmp_path / "broken", step=7)
    assert "going on from step 7" in train(1, config, tmp_path / "broken", tmp_path, *overrides)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_beta_without_its_weights_is_refused(dataset_dir: Path, tmp_path: Path) -> None:
    """A key that nothing reads."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    arguments = ["--config", config, "--run-dir", tmp_path / "run", "loss.effective_number_beta=0.9"]
    (finished,) = command_on_ranks(1, "aplantida_dist.train", arguments, tmp_path)
    assert finished.code == 2
    assert "loss.effective_number_beta: is set to 0.9, but nothing reads it" in finished.stderr


@pytest.mark.parametrize("seed", range(20))
def test_many_medium_few_are_a_plain_count(seed: int) -> None:
    """Hits over samples of each class, averaged over the classes of a frequency that the evaluated split holds at all."""
    draw = random.Random(seed)
    num_classes = draw.randint(2, 40)
    train_counts = [draw.choice((0, 1, 19, 20, 21, 100, 101, 500)) for _ in range(num_classes)]
    labels = [draw.choice(range(0, num_classes, draw.randint(1, 3))) for _ in range(draw.randint(1, 200))]
    logits = torch.randn(len(labels), num_classes, generator=torch.Generator().manual_seed(seed))
    totals = Totals(num_classes, torch.device("cpu"))
    ones = torch.ones(len(labels))
    totals.update(logits, ones, labels=torch.tensor(labels), weights=ones, identities=torch.zeros(len(labels)).long())
    samples, hits = Counter(labels), Counter()
    hits.update(label for row, label in zip(logits.tolist(), labels, strict=True) if row.index(max(row)) == label)
    expected: dict[str, float] = {}
    for frequency, low, high in (("many", 101, 10**9), ("medium", 20, 100), ("few", 0, 19)):
        recalls = [hits[label] / samples[label] for label in samples if low <= train_counts[label] <= high]
        if recalls:
            expected[frequency] = sum(recalls) / len(recalls)
    assert top1_of_frequencies(compute(totals.vector), train_counts) == pytest.approx(expected, abs=1e-12)


@pytest.fixture(scope="module")
def run(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long_tail")
    config = write_config(folder / "config.yaml", dataset_dir, model="test_resnet", epochs=1)
    train(1, config, folder / "run", folder)
    return folder / "run"


def evaluate(run: Path, data: Path, folder: Path, *arguments: str, world_size: int = 1) -> list[Finished]:
    told = ["--run", run, "--data", data, "--split", "train", "--allow-leak", "--json", folder / "metrics.json"]
    told += ["--predictions", folder / "predictions.jsonl", "data.num_workers=0", *arguments]
    return command_on_ranks(world_size, "aplantida_dist.evaluate", told, folder)


def found_in(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return json.loads((folder / "metrics.json").read_text())["train"], [json.loads(line) for line in lines]


def test_an_evaluation_tells_the_frequencies_by_the_counts_in_the_checkpoint(
    run: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    """Counted from the predictions file; no train split is at hand; a frequency without a class is absent everywhere."""
    counts = json.loads((dataset_dir / "train" / "manifest.json").read_text())["class_counts"]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(dataset_dir, elsewhere)
    shutil.rmtree(elsewhere / "train")
    (finished,) = evaluate(run, elsewhere, tmp_path, "--split", "test")
    assert finished.code == 0, finished.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())["test"]
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    for frequency in ("medium", "few"):
        recalls = []
        for label in {line["label"] for line in lines}:
            if frequency_of(counts[str(label)]) == frequency:
                of_class = [line["top5"][0] == label for line in lines if line["label"] == label]
                recalls.append(sum(of_class) / len(of_class))
        assert metrics[f"{frequency}_top1"] == pytest.approx(sum(recalls) / len(recalls), abs=1e-12)
    assert "many_top1" not in metrics
    (row,) = rows_of(run)
    for block in (row["train"], row["val"]):
        assert {name for name in block if name.endswith("_top1")} == {"macro_top1", "medium_top1", "few_top1"}
    columns = json.loads((run / "training_history.json").read_text())
    assert columns["val_few_top1_acc"] == [100.0 * row["val"]["few_top1"]]
    assert "val_many_top1_acc" not in columns


@pytest.mark.parametrize("tau", [0.5, 1.5])
def test_post_hoc_adjustment_divides_by_the_prior(run: Path, dataset_dir: Path, tmp_path: Path, tau: float) -> None:
    """p' is p / π^τ up to one factor; the JSON says τ; two ranks find the same bits as one."""
    counts = json.loads((dataset_dir / "train" / "manifest.json").read_text())["class_counts"]
    evaluate(run, dataset_dir, tmp_path)
    plain, plain_lines = found_in(tmp_path)
    evaluate(run, dataset_dir, tmp_path, "--logit-adjustment", str(tau))
    adjusted, adjusted_lines = found_in(tmp_path)
    finished = evaluate(run, dataset_dir, tmp_path, "--logit-adjustment", str(tau), world_size=2)
    assert found_in(tmp_path) == (adjusted, adjusted_lines)
    assert f"logits less {tau:g} log prior" in finished[0].stdout
    assert "logit_adjustment" not in plain
    assert adjusted["logit_adjustment"] == tau
    assert adjusted["loss"] != plain["loss"]
    for before, after in zip(plain_lines, adjusted_lines, strict=True):
        old, new = (dict(zip(line["top5"], line["top5_probabilities"], strict=True)) for line in (before, after))
        shared = sorted(old.keys() & new.keys())
        ratios = [new[label] / old[label] * counts[str(label)] ** tau for label in shared]
        assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-4)


def test_a_checkpoint_without_counts_is_evaluated_without_frequencies(
    run: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    """One from before still evaluates, and says so; what needs the counts is refused in one line."""
    old = tmp_path / "old"
    shutil.copytree(run, old)
    (position,) = old.glob("checkpoints/step_*/position.json")
    content = json.loads(position.read_text())
    assert content.pop("train_counts") == open_dataset(dataset_dir).open_split("train").counts_of_classes(6)
    del content["history"], content["digest"]
    position.write_text(json.dumps({**content, "format": 2}))
    point_to(old / "checkpoints", "best", position.parent)
    (finished,) = evaluate(old, dataset_dir, tmp_path)
    assert (finished.code, "does not tell its train counts" in finished.stdout) == (0, True)
    metrics, _ = found_in(tmp_path)
    assert {name for name in metrics if name.endswith("_top1")} == {"macro_top1"}
    for world_size in (1, 2):
        refused = evaluate(old, dataset_dir, tmp_path, "--logit-adjustment", "1", world_size=world_size)
        assert [rank.code for rank in refused] == [2] * world_size
        assert refused[0].stderr.count("\n") == 1
        assert "which --logit-adjustment needs" in refused[0].stderr


@pytest.mark.parametrize("tau", ["0", "-1", "nan", "inf", "much"])
def test_a_tau_that_is_no_positive_number_is_refused(run: Path, dataset_dir: Path, tmp_path: Path, tau: str) -> None:
    """In one line, before anything is opened."""
    (refused,) = evaluate(run, dataset_dir, tmp_path, f"--logit-adjustment={tau}")
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert f"found '{tau}', expected a number above 0" in refused.stderr


@pytest.mark.parametrize("max_samples", [1, 13, 30, 69, 1000])
def test_the_counts_of_a_limited_split_are_those_of_its_samples(dataset_dir: Path, max_samples: int) -> None:
    """Counted in the tars by other means; shards that are read in part count in part."""
    labels = []
    for shard in sorted((dataset_dir / "train").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None and member.name.endswith(".cls"):
                    labels.append(int(content.read()))
    split = open_dataset(dataset_dir).open_split("train", max_samples=max_samples)
    counted = Counter(labels[:max_samples])
    assert split.counts_of_classes(6) == [counted[label] for label in range(6)]


def test_classes_without_train_samples_cost_no_infinity(dataset_dir: Path, tmp_path: Path) -> None:
    """Five samples of a class or two, everything on: the losses are numbers."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    said = train(1, config, tmp_path / "run", tmp_path, "--max-samples", "5", *ALL)
    (row,) = rows_of(tmp_path / "run")
    assert 0.0 < row["train"]["loss"] < 20.0
    assert "macro" in said


def test_the_columns_hold_a_frequency_once_any_row_does() -> None:
    """Percent where a row has it, null where not, no column where none has."""
    rows = [make_row(**values(epoch)) for epoch in (1, 2)]
    assert not any("few" in name for name in columns_of(rows))
    told = values(3)
    told["val"] |= {"few_top1": 0.125, "many_top1": 0.5}
    columns = columns_of([*rows, make_row(**told)])
    assert columns["val_few_top1_acc"] == [None, None, 12.5]
    assert columns["val_many_top1_acc"] == [None, None, 50.0]
    assert "val_medium_top1_acc" not in columns
    metrics = make_row(**told).val
    assert metrics is not None
    assert classes_text(metrics) == "macro 20.00 % (many 50.00, few 12.50)"


def test_shifted_logits_leave_half_precision() -> None:
    """bf16 has 3 digits; the shift is added in float32."""
    model = ShiftedLogits(nn.Identity(), torch.tensor([0.001, 0.0]))
    (shifted,) = model(torch.tensor([[8.0, 8.0]], dtype=torch.bfloat16)).tolist()
    assert shifted == pytest.approx([8.001, 8.0], rel=1e-6)
