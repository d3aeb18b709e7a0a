"""Freezing: what does not train stays as it is to the last bit, and what is left trains as it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
from torch import nn

from aplantida_dist.errors import UserError
from aplantida_dist.freezing import FreezeError, freeze, make_freezing
from tests.laws import Weights, require_exact_resume, require_same_on_two_ranks, run_whole, weights_at
from tests.runs import compose, write_config

FROZEN = ("conv1", "bn1", "layer1", "layer2.0")
"""Of test_resnet: convolutions, which are decayed, and BatchNorms, which keep statistics."""


def changed(before: Weights, after: Weights) -> set[str]:
    """The tensors, running statistics among them, that are not the same bits."""
    return {name for name in before if not np.array_equal(before[name], after[name])}


def initial_weights(config: Path, folder: Path) -> Weights:
    job = compose(config, folder).job
    return {name: tensor.numpy().copy() for name, tensor in job.world.unwrap(job.model).state_dict().items()}


def test_the_frozen_are_bit_identical_and_all_else_trains(dataset_dir: Path, tmp_path: Path) -> None:
    """After ten steps under weight decay: weights and BatchNorm statistics; on two ranks, and stopped, as on one and unbroken."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, model="test_resnet", epochs=2)
    before = initial_weights(config, tmp_path / "fresh")
    overrides = (f"model.freeze=[{','.join(FROZEN)}]", "model.kwargs.drop_path_rate=0.1")
    whole = run_whole(config, overrides)
    frozen = {name for name in before if f"{name}.".startswith(tuple(f"{part}." for part in FROZEN))}
    assert any(name.endswith("running_mean") for name in frozen)
    assert changed(before, weights_at(whole, 10)) == before.keys() - frozen
    require_exact_resume(whole, config, overrides, stop=8)
    require_same_on_two_ranks(whole, config, overrides)


def test_the_head_alone_trains_at_first(dataset_dir: Path, tmp_path: Path) -> None:
    """Six of ten steps change the classifier and no other bit, the others change all; stopped in either part, or on two ranks, alike."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, model="test_resnet", epochs=2)
    before = initial_weights(config, tmp_path / "fresh")
    overrides = ("model.head_only_epochs=1.2", "optimizer.name=lamb")
    whole = run_whole(config, overrides)
    assert changed(before, weights_at(whole, 6)) == {"fc.weight", "fc.bias"}
    assert changed(weights_at(whole, 6), weights_at(whole, 10)) == before.keys()
    for stop in (3, 6, 8):
        require_exact_resume(whole, config, overrides, stop=stop)
    require_same_on_two_ranks(whole, config, overrides)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_modes_follow_what_trains(name: str) -> None:
    """Modules whose parameters all rest are in evaluation mode, those with one that trains in training mode."""
    model = timm.create_model(name, num_classes=5)
    first = next(child for child, module in model.named_children() if list(module.parameters()))
    freeze(model, [first])
    freezing = make_freezing(model, head_only_steps=3)
    for step, resting in ((0, "all but the head"), (2, "all but the head"), (3, first)):
        freezing.set_modes(model, step)
        assert not model.get_submodule(first).training, resting
        assert model.get_classifier().training
        others = [m for child, m in model.named_children() if child != first and isinstance(m, nn.Sequential)]
        assert all(module.training == (step == 3) for module in others if list(module.parameters()))


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("model.freeze=[stage.0]", "model.freeze: 'stage.0' is no module or parameter .*; did you mean stages.0"),
        ("model.freeze=[stages.0.block]", "did you mean stages.0.blocks"),
        ("model.freeze=[xyz]", "'xyz' is no .*; its parts are stem, stages, head"),
        ("model.freeze=[stem,stages,head]", "model.freeze: nothing is left to train; take a name out"),
        ("model.freeze=[head]", None),
    ],
)
def test_a_name_that_freezes_nothing_is_an_error(
    dataset_dir: Path, tmp_path: Path, override: str, fault: str | None
) -> None:
    """It names near ones; and something must be left to train."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    if fault is None:
        compose(config, tmp_path / "run", [override])
        with pytest.raises(UserError, match=r"model\.head_only_epochs: the head is frozen"):
            compose(config, tmp_path / "other", [override, "model.head_only_epochs=1"])
        return
    with pytest.raises(UserError, match=fault):
        compose(config, tmp_path / "run", [override])


def test_names_end_at_points() -> None:
    """blocks.1 is not blocks.10, and an unknown name freezes nothing at all."""
    model = nn.ModuleDict({f"block{i}": nn.Linear(2, 2) for i in (1, 10)})
    freeze(model, ["block1"])
    assert {name for name, each in model.named_parameters() if not each.requires_grad} == {
        "block1.weight",
        "block1.bias",
    }
    with pytest.raises(FreezeError):
        freeze(model, ["block10", "block100"])
    assert model["block10"].weight.requires_grad
