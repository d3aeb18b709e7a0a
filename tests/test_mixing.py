"""Mixing: pictures and targets agree, the slot alone decides, and every law holds with it switched on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy as TimmBinaryCrossEntropy
from timm.loss import SoftTargetCrossEntropy

from aplantida_dist.config import ConfigError
from aplantida_dist.config_file import load_config
from aplantida_dist.data.images import TrainTransform
from aplantida_dist.data.manifest import identity_digest
from aplantida_dist.data.plan import Coordinates
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from aplantida_dist.debug import load_debug_config
from aplantida_dist.job import Running
from aplantida_dist.metrics import Metrics, Totals, compute
from aplantida_dist.mixing import Mix, MixupCutmix
from aplantida_dist.objective import BinaryCrossEntropy, CrossEntropy, Objective, Targets
from aplantida_dist.step import run_step
from aplantida_dist.trainer import read_ahead
from tests.pictures import draw
from tests.ranks import command_on_ranks, run_ranks
from tests.runs import compose, cut_back, rows_of, write_config
from tests.test_resume import assert_same_run, train
from tests.test_training import ToDouble, gradient_of_step, losses_of_steps, make_probe

MIXUP, CUTMIX = "mixing.mixup_alpha=0.8", "mixing.cutmix_alpha=1.0"
KINDS = ["cross_entropy", "binary_cross_entropy"]


def mixing(*, cutmix_probability: float, probability: float = 1.0, end_step: int = 1000) -> MixupCutmix:
    return MixupCutmix(
        seed=5,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        probability=probability,
        cutmix_probability=cutmix_probability,
        end_step=end_step,
    )


def mixes(one: MixupCutmix, *, num_samples: int = 8, side: int = 32, count: int = 400) -> list[Mix]:
    """What many slots draw, all of them mixed."""
    drawn = [one.draw(num_samples, height=side, width=side, step=i // 4, slot=i % 4) for i in range(count)]
    assert None not in drawn
    return [mix for mix in drawn if mix is not None]


@pytest.mark.parametrize("cutmix_probability", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("num_samples", [2, 3, 7])
def test_a_picture_holds_of_each_label_what_its_target_says(num_samples: int, cutmix_probability: float) -> None:
    """Pictures whose every pixel is a power of 7 of their label: the mean pixel tells label, partner and share apart."""
    pictures = (7.0 ** torch.arange(num_samples, dtype=torch.float64)).view(-1, 1, 1, 1).expand(-1, 3, 10, 14)
    one = mixing(cutmix_probability=cutmix_probability)
    for slot in range(200):
        images, targets = one(pictures.clone(), torch.arange(num_samples), step=0, slot=slot)
        assert targets.partners is not None
        assert 0.5 <= targets.share <= 1.0
        assert not (targets.labels == targets.partners).any()
        of_labels, of_partners = 7.0 ** targets.labels.double(), 7.0 ** targets.partners.double()
        wanted = targets.share * of_labels + (1 - targets.share) * of_partners
        torch.testing.assert_close(images.mean((1, 2, 3)), wanted, rtol=1e-12, atol=0)
        assert sorted(targets.labels.tolist()) == sorted(targets.partners.tolist()) == list(range(num_samples))


def test_cutmix_keeps_every_pixel_and_mixup_blends_every_pixel() -> None:
    """A pixel of CutMix is one picture's or the other's, in one rectangle; one of mixup is neither's."""
    pictures = torch.arange(4.0).view(-1, 1, 1, 1).expand(-1, 3, 20, 20)
    cut, _ = mixing(cutmix_probability=1.0)(pictures.clone(), torch.arange(4), step=0, slot=2)
    assert cut.unique().tolist() == [0.0, 1.0, 2.0, 3.0]
    foreign = cut[0, 0] != 0
    rows, columns = foreign.any(1).sum(), foreign.any(0).sum()
    assert 0 < foreign.sum() == rows * columns < 400
    blended, targets = mixing(cutmix_probability=0.0)(pictures.clone(), torch.arange(4), step=0, slot=2)
    assert 0.5 <= targets.share < 1.0
    assert all(len(image.unique()) == 1 for image in blended)


def test_the_slot_alone_decides() -> None:
    """Equal coordinates give equal mixes in any order, other slots, steps and seeds others; the global generators stay."""
    one = mixing(cutmix_probability=0.5)
    before = (torch.get_rng_state(), str(np.random.get_state()))
    forth = mixes(one)
    assert forth == mixes(one)
    assert len(set(forth)) > 0.98 * len(forth), "apart from boxes that are empty"
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == str(np.random.get_state())
    assert forth[3] == one.draw(8, height=32, width=32, step=0, slot=3)


def test_shares_follow_beta_and_switch_and_probability_their_number() -> None:
    """Means and spreads of 2,000 slots: Beta(α, α) has variance 1 / (8 α + 4)."""
    blends = mixes(mixing(cutmix_probability=0.0), count=2000)
    shares = torch.tensor([mix.share for mix in blends])
    assert abs(shares.mean() - 0.5) < 0.03
    assert abs(shares.var() - 1 / (8 * 0.8 + 4)) < 0.01
    assert {mix.shift for mix in blends} == set(range(1, 8))
    both = mixes(mixing(cutmix_probability=0.3), count=2000)
    assert abs(sum(mix.box is not None for mix in both) / 2000 - 0.3) < 0.04
    some = mixing(cutmix_probability=0.5, probability=0.25, end_step=1000)
    drawn = [some.draw(8, height=32, width=32, step=step, slot=0) for step in range(2000)]
    assert abs(sum(mix is not None for mix in drawn[:1000]) - 250) < 45
    assert not any(drawn[1000:]), "from end_step on nothing is mixed"


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [1.0, 0.7, 0.5])
def test_losses_of_mixed_targets_are_those_of_timm(share: float, label_smoothing: float) -> None:
    """Both kinds equal timm's over its dense soft targets, sample by sample; timm's partner is the mirrored one."""
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 10, 3, 3, 7, 1])
    targets = Targets(labels, labels.flip(0), share)
    dense = mixup_target(labels, 11, share, label_smoothing)
    soft, binary = SoftTargetCrossEntropy(), TimmBinaryCrossEntropy()
    ours: list[tuple[Objective, Any]] = [
        (CrossEntropy(label_smoothing=label_smoothing), soft),
        (BinaryCrossEntropy(label_smoothing=label_smoothing), binary),
    ]
    for objective, theirs in ours:
        losses = objective(logits, targets)
        wanted = torch.stack([theirs(logits[i : i + 1], dense[i : i + 1]) for i in range(6)])
        torch.testing.assert_close(losses, wanted)
        assert objective(logits.bfloat16(), targets).dtype == torch.float32


def reference_gradient(config: Path, run_dir: Path, overrides: Sequence[str], step: int) -> list[Any]:
    """The gradient of the mean loss over the step's mixed samples, in one batch, against dense targets that are made here."""
    job = compose(config, run_dir, overrides).job
    assert isinstance(job.mixing, MixupCutmix)
    slots = [Coordinates(*divmod(step, job.plan.steps_per_epoch), slot) for slot in range(job.plan.slots_per_step)]
    micro_batches = MicroBatches(job.train_split, job.plan, job.train_transform, seed=job.seed)
    pictures, targets, kinds = [], [], set()
    for batch in stream(micro_batches, slots, reading=Reading(0, 1, pin_memory=False)):
        plain = ToDouble()(batch.images)
        one_hot = torch.nn.functional.one_hot(batch.labels, job.num_classes).double()
        num_samples = len(plain)
        mix = job.mixing.draw(num_samples, height=32, width=32, step=step, slot=batch.at.slot)
        assert mix is not None
        kinds.add(mix.box is None)
        for i in range(num_samples):
            partner, kept = (i - mix.shift) % num_samples, torch.full((32, 32), mix.share, dtype=torch.float64)
            if mix.box is not None:
                kept[:] = 1.0
                kept[mix.box.upper : mix.box.lower, mix.box.left : mix.box.right] = 0.0
            if batch.weights[i] > 0:
                pictures.append(kept * plain[i] + (1 - kept) * plain[partner])
                targets.append(mix.share * one_hot[i] + (1 - mix.share) * one_hot[partner])
    assert len(pictures) == job.plan.samples_in_step(step % job.plan.steps_per_epoch)
    assert len(kinds) == 2 or job.plan.slots_per_step < 8, "the test is to see both kinds"
    smooth = 0.9 * torch.stack(targets) + 0.1 / job.num_classes
    model = make_probe(job.num_classes)
    logits = model(torch.stack(pictures))
    if isinstance(job.objective, CrossEntropy):
        loss = -(smooth * logits.log_softmax(1)).sum(1).mean()
    else:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, smooth)
    loss.backward()
    return [parameter.grad.numpy() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("step", [1, 4], ids=["whole step", "ragged last step"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batch_size", [16, 2], ids=["no accumulation", "8 slots"])
def test_the_gradient_is_that_of_the_mixed_loss(
    dataset_dir: Path, tmp_path: Path, micro_batch_size: int, kind: str, step: int
) -> None:
    """Law 4 with mixing, on 1 to 3 ranks: to 1e-8, since pictures are blended in float32 and the reference in float64; with padding among the partners in the ragged step."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    overrides = [f"train.micro_batch_size={micro_batch_size}", f"loss.kind={kind}", MIXUP, CUTMIX]
    (expected,) = run_ranks(1, reference_gradient, config, tmp_path / "reference", overrides, step)
    for world_size in (1, 2, 3):
        for found in run_ranks(world_size, gradient_of_step, config, tmp_path / f"run_{world_size}", overrides, step):
            for ours, theirs in zip(found, expected, strict=True):
                assert abs(ours - theirs).max() < 1e-8
    assert max(abs(part).max() for part in expected) > 1e-4, "a gradient of zero would prove nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_do_not_change_a_mixed_training(dataset_dir: Path, tmp_path: Path, kind: str) -> None:
    """Law 2 with mixing and erasing: 1, 2 and 3 ranks, losses of 6 steps to 1e-5, the ragged one included."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=4)
    overrides = [MIXUP, CUTMIX, "data.random_erasing=0.5", f"loss.kind={kind}"]
    (alone,) = run_ranks(1, losses_of_steps, config, tmp_path / "run_1", overrides, 6)
    for world_size in (2, 3):
        for rank in run_ranks(world_size, losses_of_steps, config, tmp_path / f"run_{world_size}", overrides, 6):
            assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.slow
def test_a_mixed_run_stopped_twice_is_the_unbroken_run(dataset_dir: Path, tmp_path: Path) -> None:
    """Law 5 with mixing, erasing, BCE and dropout, cut back in mid-epoch: history and weights to the last bit."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2, every_steps=1)
    overrides = (MIXUP, CUTMIX, "mixing.last_epochs_off=1", "data.random_erasing=0.5", "loss.kind=binary_cross_entropy")
    overrides += ("model.kwargs.drop_rate=0.1", "checkpoint.keep_last=100")
    train(1, config, tmp_path / "whole", tmp_path, *overrides)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for stop in (3, 7):
        cut_back(tmp_path / "broken", step=stop)
        assert f"going on from step {stop}" in train(1, config, tmp_path / "broken", tmp_path, *overrides)
        assert_same_run(tmp_path / "whole", tmp_path / "broken")


def losses_of_settings(config: Path, run_dir: Path, settings: Sequence[Sequence[str]], num_steps: int) -> list[Any]:
    """The losses of the first steps under each of the settings, on this rank."""
    return [losses_of_steps(config, run_dir, overrides, num_steps)["losses"] for overrides in settings]


def test_every_key_changes_the_first_loss(dataset_dir: Path, tmp_path: Path) -> None:
    """Each key acts, and each by itself."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    settings = [
        [],
        [MIXUP],
        ["mixing.mixup_alpha=0.2"],
        [CUTMIX],
        ["mixing.cutmix_alpha=0.5"],
        [MIXUP, CUTMIX],
        [MIXUP, CUTMIX, "mixing.switch_probability=0.2"],
        [MIXUP, "mixing.probability=0.5"],
        ["data.random_erasing=0.5"],
        ["loss.kind=binary_cross_entropy"],
    ]
    in_8_slots = [[*overrides, "train.micro_batch_size=2"] for overrides in settings]
    (losses,) = run_ranks(1, losses_of_settings, config, tmp_path / "run", in_8_slots, 1)
    assert len({loss for (loss,) in losses}) == len(settings)


def test_what_is_not_mixed_is_untouched_by_mixing(dataset_dir: Path, tmp_path: Path) -> None:
    """With probability 0, losses are those of a run without mixing, bit for bit, dropout included; so is all before the end."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2)
    settings = [[], [MIXUP, CUTMIX, "mixing.probability=0.0"], [MIXUP], [MIXUP, "mixing.last_epochs_off=1"]]
    with_dropout = [[*overrides, "model.kwargs.drop_rate=0.2"] for overrides in settings]
    (losses,) = run_ranks(1, losses_of_settings, config, tmp_path / "run", with_dropout, 6)
    plain, never, always, early = losses
    assert never == plain
    assert early[:5] == always[:5]
    assert early[5] != always[5], "the second of two epochs is not mixed"


def test_the_history_names_the_dominant_label(dataset_dir: Path, tmp_path: Path) -> None:
    """Rows of mixed epochs say by which label hits were counted, on disk and on the screen; those of unmixed ones do not."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2)
    said = train(1, config, tmp_path / "run", tmp_path, MIXUP, CUTMIX, "mixing.last_epochs_off=1")
    assert [row["train"].get("top1_label") for row in rows_of(tmp_path / "run")] == ["dominant", None]
    columns = json.loads((tmp_path / "run" / "training_history.json").read_text())
    assert columns["train_top1_label"] == ["dominant", None]
    epochs = [line for line in said.splitlines() if "train loss" in line]
    assert ["top-1 (dominant) " in line for line in epochs] == [True, False]
    assert "top-1 (dominant) " in next(line for line in said.splitlines() if "· step" in line)
    train(1, config, tmp_path / "plain", tmp_path, "train.epochs=1")
    assert "top1_label" not in (tmp_path / "plain" / "history.jsonl").read_text()
    assert "top1_label" not in (tmp_path / "plain" / "training_history.json").read_text()


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            [MIXUP, "train.micro_batch_size=1"],
            "train.micro_batch_size: found 1, expected at least 2 where mixing.mixup",
        ),
        ([MIXUP, "mixing.last_epochs_off=3"], "mixing.last_epochs_off: found 3, expected fewer than train.epochs, 3"),
        (["mixing.mixup_alpha=-1"], "mixing.mixup_alpha: found -1"),
        (["data.random_erasing=1.5"], "data.random_erasing: found 1.5"),
    ],
)
def test_a_mixing_that_could_not_act_is_refused(
    dataset_dir: Path, tmp_path: Path, overrides: list[str], fault: str
) -> None:
    """A micro-batch of one has no partner, and an epoch must be left to mix."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides)
    assert fault in str(caught.value)


def test_keys_beside_mixing_that_is_off_are_told(dataset_dir: Path, tmp_path: Path) -> None:
    """Nothing reads them, so nothing happens, so the command refuses; the switch is read where there are two kinds alone."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    for overrides in (
        ["mixing.probability=0.5"],
        ["mixing.last_epochs_off=1"],
        [CUTMIX, "mixing.switch_probability=0.9"],
    ):
        arguments = ["--config", config, "--run-dir", tmp_path / "run", *overrides]
        (finished,) = command_on_ranks(1, "aplantida_dist.train", arguments, tmp_path)
        assert finished.code == 2
        assert f"{overrides[-1].split('=')[0]}: is set to" in finished.stderr
        assert "nothing reads it" in finished.stderr


def test_debug_keeps_an_epoch_to_mix(dataset_dir: Path, tmp_path: Path) -> None:
    """--debug shortens the unmixed end with the run."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=20)
    config.write_text(config.read_text() + "mixing: {mixup_alpha: 0.8, last_epochs_off: 15}\n")
    small, _ = load_debug_config(config)
    assert (small.train.epochs, small.mixing.last_epochs_off) == (2, 1)


def test_erasing_changes_one_rectangle_and_neither_crop_nor_flip() -> None:
    """Zhong et al. 2017: by the sample's own seed, 2 to 33 % of the picture, as often as asked."""
    content = draw(1, width=90, height=70)

    def pixels(probability: float, seed: int) -> Any:
        return TrainTransform(48, (0.35, 1.0), (0.75, 1.3333), 0.5, probability, "bicubic")(content, seed).astype(int)

    erased = 0
    for seed in range(200):
        plain, whole = pixels(0.0, seed), pixels(1.0, seed)
        assert np.array_equal(whole, pixels(1.0, seed))
        changed = (plain != whole).any(2)
        rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert 0.015 < height * width / 48**2 < 0.35
        assert changed.sum() > 0.99 * height * width
        erased += not np.array_equal(plain, pixels(0.25, seed))
    assert 30 < erased < 70


def counted_and_expected(config: Path, run_dir: Path, overrides: Sequence[str]) -> tuple[Metrics, list[int], str]:
    """What a step counts whose partners have the larger share; its hits by dominant and by own labels; what was read."""
    job = compose(config, run_dir, overrides).job
    assert isinstance(job.mixing, MixupCutmix)
    drawn = [job.mixing.draw(16, height=32, width=32, step=step, slot=0) for step in range(4)]
    step = next(step for step, mix in enumerate(drawn) if mix is not None and mix.share < 0.5)
    batch = next(read_ahead(job, step))
    images, targets = job.mixing(job.normalize(batch.images), batch.labels, step=step, slot=0)
    with torch.no_grad():
        guesses = job.model(images).argmax(1)
    hits = [int((guesses == labels).sum()) for labels in (targets.labels, batch.labels)]
    running = Running(Totals(job.num_classes, job.world.device))
    run_step(job, iter([batch]), running, step)
    return compute(running.totals.vector), hits, identity_digest(int(batch.identities.sum()))


def test_hits_are_counted_by_the_dominant_label_and_identities_are_those_read(
    dataset_dir: Path, tmp_path: Path
) -> None:
    """Where the partner has the larger share, its class is what the picture is to be taken for."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    overrides = ["train.micro_batch_size=16", MIXUP, CUTMIX]
    ((metrics, (dominant, own), digest),) = run_ranks(1, counted_and_expected, config, tmp_path / "run", overrides)
    assert round(16 * metrics.top1) == sum(metrics.class_hits) == dominant
    assert dominant != own, "counting by either label must differ, or the test proves nothing"
    assert metrics.identity_digest == digest
