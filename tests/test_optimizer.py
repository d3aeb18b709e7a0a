"""The optimizers that timm knows: each trains, decays what it should, and resumes exactly; adaptive clipping."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.optim import list_optimizers
from torch import Tensor, nn

from aplantida_dist.checkpoint import load_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer
from aplantida_dist.config import ConfigError
from aplantida_dist.config_file import load_config
from aplantida_dist.lineage import Lineage
from aplantida_dist.optimizer import OptimizerError, build_optimizer, clip_adaptively, set_learning_rate
from tests.laws import require_exact_resume, require_same_on_two_ranks, run_whole, weights_at
from tests.runs import compose, position_at, write_config

REFUSED = {"adahessian": "second derivatives", "kron": "rng_state", "kronc": "rng_state", "kronw": "rng_state"}
NAMES = [name for name in list_optimizers() if not name.startswith(("bnb", "fused")) and name not in REFUSED]
"""All but those of other libraries, which need a GPU, and those that cannot be resumed exactly."""


def small_model(*, channels_last: bool = False) -> nn.Module:
    """A convolution, a norm, matrices: what optimizers tell apart."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 5))
    return layers.to(memory_format=torch.channels_last) if channels_last else layers


def optimizer_of(model: nn.Module, name: str, layer_decay: float | None = None) -> torch.optim.Optimizer:
    return build_optimizer(model, name=name, peak_lr=0.01, weight_decay=0.05, layer_decay=layer_decay, kwargs={})


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: range) -> None:
    """Steps whose batches are functions of the step."""
    for step in steps:
        set_learning_rate(optimizer, 0.01 / (1 + step))
        images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def saved(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """A checkpoint as the record writes it."""
    tensors, facts = pack_optimizer(model, optimizer)
    return save_checkpoint(
        folder,
        position=position_at(3, optimizer=facts, lineage=Lineage(np.zeros(0, dtype=np.int64)).facts()),
        model_state=model.state_dict(),
        ema_state=None,
        optimizer_state=tensors,
        totals=torch.zeros(1, dtype=torch.int64),
        lineage=Lineage(np.zeros(0, dtype=np.int64)),
    )


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [*NAMES, "lookahead_adamw"])
def test_an_optimizer_moves_every_weight_and_resumes_exactly(tmp_path: Path, name: str, channels_last: bool) -> None:
    """Three steps, a checkpoint, three more: the same bits as without the checkpoint, and nothing stands where it began."""
    model = small_model(channels_last=channels_last)
    optimizer = optimizer_of(model, name)
    before = state_of(model)
    descend(model, optimizer, steps=range(3))
    assert [key for key, value in state_of(model).items() if torch.equal(value, before[key])] == []
    checkpoint = load_checkpoint(saved(tmp_path, model, optimizer))
    descend(model, optimizer, steps=range(3, 6))
    resumed = small_model(channels_last=channels_last)
    resumed.load_state_dict(checkpoint.model_state())
    fresh = optimizer_of(resumed, name)
    unpack_optimizer(resumed, fresh, checkpoint)
    descend(resumed, fresh, steps=range(3, 6))
    ours, theirs = state_of(model), state_of(resumed)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_cannot_be_resumed_is_refused(name: str) -> None:
    """One line that says why."""
    with pytest.raises(OptimizerError, match=f"optimizer '{name}' .*{REFUSED[name]}.*; choose another"):
        optimizer_of(small_model(), name)


def test_an_unknown_optimizer_is_one_line() -> None:
    """And so is a wrong argument."""
    with pytest.raises(OptimizerError, match=r"'adamv' cannot be made: .*; see timm\.optim\.list_optimizers\(\)"):
        optimizer_of(small_model(), "adamv")


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_nothing_of_one_dimension_is_decayed(name: str, layer_decay: float | None) -> None:
    """Biases, norms and what the model names (a ViT's position embedding and class token) have no decay, all else has."""
    model = timm.create_model("test_vit", num_classes=5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = optimizer_of(model, name, layer_decay)
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    spared = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    assert decayed | spared == shapes.keys()
    assert {name for name in spared if shapes[name] > 1} == {"pos_embed", "cls_token"} & shapes.keys()
    assert all(shapes[name] > 1 for name in decayed)


def test_layer_decay_slows_each_layer_below_the_head() -> None:
    """The head has the rate itself, each block of a ViT a factor less than the one above, the embedding the least."""
    model = timm.create_model("test_vit", num_classes=5)
    optimizer = optimizer_of(model, "adamw", 0.5)
    set_learning_rate(optimizer, 1.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rate_of = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    blocks = [rate_of[f"blocks.{i}.mlp.fc1.weight"] for i in range(len(model.blocks))]
    assert rate_of["head.weight"] == 1.0
    assert all(below == above / 2 for below, above in itertools.pairwise(blocks))
    assert rate_of["patch_embed.proj.weight"] == blocks[0] / 2


def test_layer_decay_that_cannot_act_is_refused() -> None:
    """Where timm sees a single layer, in a model of nobody's."""
    with pytest.raises(OptimizerError, match=r"optimizer\.layer_decay: found 0\.5, but timm sees a single layer"):
        optimizer_of(small_model(), "adamw", 0.5)


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.name=muon", "optimizer.layer_decay=0.7"),
        ("optimizer.name=lamb",),
        pytest.param(
            ("train.clip_norm=null", "train.clip_agc=0.01", "optimizer.name=lion", "optimizer.peak_lr=0.0005"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["muon, layer decay", "lamb", "lion, agc"],
)
def test_ranks_and_stops_do_not_matter(dataset_dir: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Two ranks agree with one, and a run that was stopped in mid-epoch is the unbroken one."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2)
    whole = run_whole(config, overrides)
    require_exact_resume(whole, config, overrides, stop=7)
    require_same_on_two_ranks(whole, config, overrides)


def test_layer_decay_acts_on_all_but_the_head_and_the_first_loss(dataset_dir: Path, tmp_path: Path) -> None:
    """After one step the head has moved as without it, and the stem less."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    moved = {}
    for name in ("null", "0.5"):
        overrides = [f"optimizer.layer_decay={name}", "schedule.warmup_epochs=0"]
        folder = tmp_path / name
        folder.mkdir()
        copy = folder / "config.yaml"
        copy.write_text(config.read_text())
        moved[name] = weights_at(run_whole(copy, overrides), 1)
    assert np.array_equal(moved["null"]["head.fc.weight"], moved["0.5"]["head.fc.weight"])
    assert not np.array_equal(moved["null"]["stem.0.weight"], moved["0.5"]["stem.0.weight"])


def test_adaptive_clipping_bounds_each_unit_by_its_weights() -> None:
    """Rows above the bound are scaled onto it, rows below it are left as they are, to the bit; no gradient, no touch."""
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    model.weight.grad = torch.randn(8, 16) * torch.logspace(-6, 2, 8)[:, None]
    before = model.weight.grad.clone()
    clip_adaptively(model.parameters(), 0.1)
    bound = 0.1 * model.weight.detach().norm(dim=1)
    after = model.weight.grad.norm(dim=1)
    is_above = before.norm(dim=1) > bound
    assert 0 < is_above.sum() < 8
    assert torch.allclose(after[is_above], bound[is_above])
    assert torch.equal(model.weight.grad[~is_above], before[~is_above])
    assert model.bias.grad is None


def test_adaptive_clipping_leaves_the_head_out_and_acts_on_the_rest(dataset_dir: Path, tmp_path: Path) -> None:
    """With plain descent the first step's update is the gradient: the head's is whole, the stem's is bounded."""
    moved = {}
    for name in ("null", "0.001"):
        folder = tmp_path / name
        folder.mkdir()
        config = write_config(folder / "config.yaml", dataset_dir, epochs=1)
        overrides = ["optimizer.name=sgd", "optimizer.weight_decay=0.0", "schedule.warmup_epochs=0"]
        moved[name] = weights_at(run_whole(config, [*overrides, "train.clip_norm=null", f"train.clip_agc={name}"]), 1)
    job = compose(tmp_path / "null" / "config.yaml", tmp_path / "fresh").job
    fresh = {name: tensor.numpy() for name, tensor in job.world.unwrap(job.model).state_dict().items()}
    assert np.array_equal(moved["null"]["head.fc.weight"], moved["0.001"]["head.fc.weight"])
    stem = [np.linalg.norm(moved[name]["stem.0.weight"] - fresh["stem.0.weight"]) for name in moved]
    assert stem[1] < stem[0]


def test_the_two_clippings_exclude_each_other(dataset_dir: Path, tmp_path: Path) -> None:
    """One line that says what to do."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    with pytest.raises(ConfigError, match=r"train\.clip_agc: found 0\.01, expected null beside train\.clip_norm"):
        load_config(config, ["train.clip_agc=0.01"])
