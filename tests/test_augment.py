"""Augmentations: the ops are timm's and torchvision's, what is drawn follows from the seed alone, and off is off."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from aplantida_dist.config_file import load_config
from aplantida_dist.data import augment_ops
from aplantida_dist.data.augment import (
    Augmentation,
    Blur,
    ColorJitter,
    RandAugment,
    Rotation,
    TrivialAugment,
    VerticalFlip,
)
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.images import TrainTransform
from aplantida_dist.data.plan import Coordinates, TrainPlan
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from aplantida_dist.recipe import augmentations_of
from aplantida_dist.seeds import derive
from tests.pictures import draw
from tests.ranks import command_on_ranks
from tests.runs import write_config

ALL: dict[str, Augmentation] = {
    "vertical_flip": VerticalFlip(0.5),
    "rotation": Rotation(20.0),
    "randaugment": RandAugment(2, 9.0, 0.5),
    "trivialaugment": TrivialAugment(),
    "color_jitter": ColorJitter(0.4),
    "blur": Blur(0.5),
}


def photograph(side: int = 64) -> Image.Image:
    """Smooth and coloured, so that an op by another amount is another picture."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def distance(ours: Image.Image, theirs: Image.Image) -> int:
    """The largest difference of two pictures in any value."""
    return int(np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max())


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("magnitude", [0.0, 5.0, 9.0])
def test_randaugment_has_the_ops_of_timm(magnitude: float, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of timm's fifteen at each magnitude is one of ours, to the bit where shifts are by whole pixels."""
    picture = photograph(200)  # of which 45 % at these magnitudes are whole pixels
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: sign * value)
    names = auto_augment._RAND_INCREASING_TRANSFORMS
    hparams = {"img_mean": augment_ops.FILL, "interpolation": Image.Resampling.BILINEAR}
    level = magnitude / 10.0
    ours = [op.act(picture, op.number_of(sign * level if op.is_signed else level)) for op in augment_ops.RANDAUGMENT]
    assert len(ours) == len(names) == 15
    for name in names:
        theirs = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)(picture)
        assert min(distance(mine, theirs) for mine in ours) == 0, name


def test_trivialaugment_has_the_numbers_of_torchvision() -> None:
    """Every op of its wide space at four levels and both signs is one of ours; its shifts count to the right, ours to the left."""
    picture, bilinear = photograph(224), InterpolationMode.BILINEAR
    space = transforms.TrivialAugmentWide()._augmentation_space(31)
    assert len(space) == len(augment_ops.TRIVIALAUGMENT) == 14
    for place in (0, 7, 16, 30):
        ours = [
            np.asarray(op.act(picture, op.number_of(sign * place / 30))).astype(int)
            for op in augment_ops.TRIVIALAUGMENT
            for sign in ((-1, 1) if op.is_signed else (1,))
        ]
        for name, (numbers, is_signed) in space.items():
            number = float(numbers[place]) if numbers.ndim else 0.0
            for sign in (-1, 1) if is_signed else (1,):
                theirs = transforms.autoaugment._apply_op(
                    picture, name, sign * number, interpolation=bilinear, fill=list(augment_ops.FILL)
                )
                assert min(np.abs(mine - np.asarray(theirs)).mean() for mine in ours) < 0.1, (name, place, sign)


@pytest.mark.parametrize("seed", range(20))
def test_what_has_no_levels_is_what_torchvision_and_timm_do(seed: int) -> None:
    """Jitter, rotation, flip and blur by the numbers that the seed draws are their functions, to the bit."""
    picture = photograph(96)
    jitter, rotation, blur = (random.Random(derive(seed, name)) for name in ("color_jitter", "rotation", "blur"))
    adjusted = picture
    acts = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for act in jitter.sample(acts, 3):
        adjusted = act(adjusted, jitter.uniform(0.6, 1.4))
    assert distance(ColorJitter(0.4)(picture, seed), adjusted) == 0
    turned = functional.rotate(
        picture, rotation.uniform(-20.0, 20.0), InterpolationMode.BILINEAR, fill=list(augment_ops.FILL)
    )
    assert distance(Rotation(20.0)(picture, seed), turned) == 0
    assert distance(VerticalFlip(1.0)(picture, seed), functional.vflip(picture)) == 0
    blur.random()
    blurred = auto_augment.gaussian_blur(picture, blur.uniform(0.1, 2.0))
    assert distance(Blur(1.0)(picture, seed), blurred) == 0


@pytest.mark.parametrize("name", ALL)
def test_what_is_drawn_follows_from_the_seed_alone(name: str) -> None:
    """The same again, whatever ran before; others for others; the picture that came in, and the global generators, untouched."""
    picture, act = photograph(), ALL[name]
    before, states = picture.tobytes(), (random.getstate(), torch.get_rng_state().tolist())
    first = act(picture, 3).tobytes()
    others = [act(picture, seed).tobytes() for seed in range(40)]
    assert act(picture, 3).tobytes() == first == others[3]
    assert len(set(others)) > (1 if name == "vertical_flip" else 10)
    assert picture.tobytes() == before
    assert (random.getstate(), torch.get_rng_state().tolist()) == states
    assert {act(picture, seed).size for seed in range(40)} == {picture.size}
    assert {act(picture, seed).mode for seed in range(40)} == {"RGB"}


def test_what_is_drawn_is_spread_as_stated() -> None:
    """Half of the flips, angles up to the bound either way, factors within the strength, two ops of which each is taken half the time."""
    picture = photograph(32)
    flipped = sum(VerticalFlip(0.25)(picture, seed) is not picture for seed in range(1000))
    assert 200 < flipped < 300
    assert 200 < sum(Blur(0.25)(picture, seed) is not picture for seed in range(1000)) < 300
    untouched = sum(RandAugment(2, 9.0, 0.5)(picture, seed) is picture for seed in range(1000))
    assert 200 < untouched < 300
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    levels = [ColorJitter(0.4)(grey, seed).getpixel((0, 0)) for seed in range(300)]
    values = [level[0] for level in levels if isinstance(level, tuple)]
    assert 60 <= min(values) < 70
    assert 130 < max(values) <= 140


@pytest.mark.parametrize("name", ALL)
def test_turning_one_on_moves_no_draw_of_another(name: str) -> None:
    """Crop, flip and erasing are those of the bare transform, and so is what the other augmentations do."""
    content, seeds = draw(5, width=90, height=70), range(30)
    whole = ((0.35, 1.0), (0.75, 1.3333))

    def transform(erasing: float, *augmentations: Augmentation) -> TrainTransform:
        return TrainTransform(48, *whole, 0.5, erasing, "bicubic", augmentations)

    for seed in seeds:
        bare, erased = transform(0.0)(content, seed), transform(1.0)(content, seed)
        expected = np.asarray(ALL[name](Image.fromarray(bare), seed))
        assert np.array_equal(transform(0.0, ALL[name])(content, seed), expected)
        both = transform(1.0, ALL[name])(content, seed)
        outside = (erased == bare).all(axis=2)
        assert np.array_equal(both[outside], expected[outside])
        assert np.array_equal(both[~outside], erased[~outside])


def test_workers_and_ranks_do_not_change_a_pixel(dataset_dir: Path) -> None:
    """All of them on: the epoch is bit-identical read by 0, 1 and 3 workers, and by 2 ranks."""
    split = open_dataset(dataset_dir).open_split("train")
    plan = TrainPlan(split.shard_sizes, 3, 16, 4, 2**18)
    transform = TrainTransform(32, (0.35, 1.0), (0.75, 1.3333), 0.5, 0.5, "bicubic", tuple(ALL.values()))

    def read(num_workers: int, rank: int = 0, world_size: int = 1) -> dict[Coordinates, bytes]:
        at = [Coordinates(0, step, slot) for step in range(3) for slot in plan.slots_of(rank, world_size)]
        reading = Reading(num_workers, 2, pin_memory=False)
        batches = stream(MicroBatches(split, plan, transform, seed=3), at, reading=reading)
        return {batch.at: batch.images.numpy().tobytes() for batch in batches}

    whole = read(0)
    assert read(1) == read(3) == whole
    assert {**read(0, 0, 2), **read(0, 1, 2)} == whole


def test_a_config_puts_together_what_it_says(tmp_path: Path, dataset_dir: Path) -> None:
    """In timm's order; off, there is nothing to run through."""
    path = write_config(tmp_path / "config.yaml", dataset_dir)
    assert augmentations_of(load_config(path)) == ()
    keys = [
        "data.blur=0.5",
        "data.color_jitter=0.4",
        "data.augment=randaugment",
        "data.rotation=20",
        "data.vertical_flip=0.5",
    ]
    found = augmentations_of(load_config(path, keys))
    assert found == tuple(ALL[name] for name in ALL if name != "trivialaugment")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.augment=autoaugment"], "expected 'randaugment' or 'trivialaugment' or null"),
        (["data.rotation=181"], "data.rotation: found 181, expected"),
        (["data.augment_magnitude=11", "data.augment=randaugment"], "data.augment_magnitude: found 11"),
        (["data.augment_ops=3"], "data.augment_ops: is set to 3, but nothing reads it under this config"),
        (
            ["data.augment=trivialaugment", "data.augment_magnitude=5"],
            "data.augment_magnitude: is set to 5.0, but nothing",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(overrides: list[str], said: str, tmp_path: Path, dataset_dir: Path) -> None:
    """Out of bounds, or a strength beside something that has none."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    (refused,) = command_on_ranks(
        1, "aplantida_dist.train", ["--config", config, "--run-dir", tmp_path / "run", *overrides], tmp_path
    )
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert said in refused.stderr
