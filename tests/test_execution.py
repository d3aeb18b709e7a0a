"""How a model computes: each switch acts, and what is computed stays the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from aplantida_dist.errors import UserError
from aplantida_dist.execution import ExecutionError, arrange, convert_batchnorm
from aplantida_dist.job import Running
from aplantida_dist.metrics import Totals
from aplantida_dist.step import run_step
from aplantida_dist.trainer import read_ahead
from tests.laws import require_exact_resume, require_same_on_two_ranks, run_whole, weights_at
from tests.runs import compose, rows_of, write_config


def model_of(name: str, **switches: object) -> nn.Module:
    """A timm model with drop path, with the switches that are given."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=5, drop_path_rate=0.5)
    arrange(model, **{"grad_checkpointing": False, "channels_last": False, "compile_with": None} | switches)  # type: ignore[arg-type]
    return model.train()


def loss_and_gradients(model: nn.Module, *, seed: int = 1) -> tuple[Tensor, dict[str, Tensor], int]:
    """Of one batch; and how many values the graph kept for the backward pass."""
    images = torch.randn(8, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        loss = nn.functional.cross_entropy(model(images), torch.arange(8) % 5)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(kept)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_checkpointing_keeps_less_and_computes_the_same(name: str) -> None:
    """The same loss and gradients to the bit, drop path included, from less memory."""
    loss, gradients, kept = loss_and_gradients(model_of(name))
    again, again_gradients, again_kept = loss_and_gradients(model_of(name, grad_checkpointing=True))
    assert again_kept < kept / 2
    assert torch.equal(loss, again)
    assert [key for key in gradients if not torch.equal(gradients[key], again_gradients[key])] == []
    _, other, _ = loss_and_gradients(model_of(name), seed=2)
    assert any(not torch.equal(gradients[key], other[key]) for key in gradients), "drop path must act here"


def test_checkpointing_that_cannot_be_exact_or_be_done_is_refused() -> None:
    """BatchNorm would count each batch twice, and some models have none."""
    with pytest.raises(ExecutionError, match=r"model\.grad_checkpointing: this model has BatchNorm"):
        model_of("test_resnet", grad_checkpointing=True)
    with pytest.raises(ExecutionError, match=r"model\.grad_checkpointing: timm cannot do it for this model"):
        arrange(nn.Linear(2, 2), grad_checkpointing=True, channels_last=False, compile_with=None)


def test_channels_last_lays_weights_and_pictures_out(dataset_dir: Path, tmp_path: Path) -> None:
    """Convolutions' weights, their gradients, and what comes to the model have their channels innermost; without it they have not."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    for is_on in (False, True):
        job = compose(config, tmp_path / str(is_on), [f"model.channels_last={str(is_on).lower()}"]).job
        seen: list[Tensor] = []
        job.model.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        run_step(job, read_ahead(job, 0), Running(Totals(job.num_classes, job.world.device)), 0)
        wide = [p for p in job.model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
        assert wide
        for tensor in [*seen, *wide]:
            assert tensor.is_contiguous(memory_format=torch.channels_last) == is_on
            assert tensor.is_contiguous() != is_on


WITHOUT_EVALUATION = ("evaluation.every_epochs=0", "checkpoint.best_metric=train.loss", "checkpoint.best_mode=min")
SWITCHES = {
    "channels_last": ("model.channels_last=true", "optimizer.name=lamb"),
    "grad_checkpointing": ("model.grad_checkpointing=true", "model.kwargs.drop_path_rate=0.3"),
    "compile": ("model.compile=eager", "model.kwargs.drop_path_rate=0.3", "model.name=test_vit", *WITHOUT_EVALUATION),
}


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("switch", SWITCHES)
def test_ranks_and_stops_do_not_matter(dataset_dir: Path, tmp_path: Path, switch: str) -> None:
    """Two ranks agree with one, a run stopped in mid-epoch is the unbroken one, and weights have timm's names."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    overrides = (*SWITCHES[switch], "schedule.warmup_epochs=0.4")
    whole = run_whole(config, overrides)
    name = "test_vit" if switch == "compile" else "test_convnext"
    assert weights_at(whole, 5).keys() == timm.create_model(name, num_classes=6).state_dict().keys()
    require_exact_resume(whole, config, overrides, stop=3)
    require_same_on_two_ranks(whole, config, overrides)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_compiled_and_computes_the_same() -> None:
    """The backend ran, once for each shape, and loss and gradients are those of the plain model."""
    from torch._dynamo.utils import counters

    counters.clear()
    loss, gradients, _ = loss_and_gradients(model_of("test_vit"))
    assert not counters["stats"]
    compiled, compiled_gradients, _ = loss_and_gradients(model_of("test_vit", compile_with="eager"))
    assert counters["stats"]["unique_graphs"] >= 1
    assert torch.allclose(loss, compiled)
    assert all(torch.allclose(gradients[key], compiled_gradients[key], atol=1e-6) for key in gradients)


def test_sync_batchnorm_is_converted_under_the_same_names() -> None:
    """Every BatchNorm is torch's SyncBatchNorm, with its weights and statistics, and evaluates to the same logits."""
    for name in ("test_resnet", "test_efficientnet"):
        plain = timm.create_model(name, num_classes=5).eval()
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits = plain(images)
        state = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
        shared = convert_batchnorm(plain).eval()
        norms = [m for m in shared.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
        assert {key: (value == state[key]).all().item() for key, value in shared.state_dict().items()} == dict.fromkeys(
            state, True
        )
        with torch.no_grad():
            assert torch.equal(shared(images), logits)


@pytest.mark.parametrize(
    ("model", "fault"),
    [("test_resnet", "torch's SyncBatchNorm needs GPUs, this process runs on cpu"), ("test_vit", "has no BatchNorm")],
)
def test_sync_batchnorm_that_cannot_be_had_is_one_line(
    dataset_dir: Path, tmp_path: Path, model: str, fault: str
) -> None:
    """On CPUs, where torch has none, and where there is nothing to convert."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, model=model)
    with pytest.raises(UserError, match=rf"model\.sync_batchnorm: .*{fault}.*; set it to false"):
        compose(config, tmp_path / "run", ["model.sync_batchnorm=true"])


def test_drop_path_acts_by_the_slot_and_resumes(dataset_dir: Path, tmp_path: Path) -> None:
    """Another rate or another seed has another first loss; the same again, on two ranks, or stopped, has the same."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2)
    overrides = ("model.kwargs.drop_path_rate=0.4",)
    whole = run_whole(config, overrides)
    require_exact_resume(whole, config, overrides, stop=7)
    require_same_on_two_ranks(whole, config, overrides)
    (tmp_path / "off").mkdir()
    plain = run_whole(write_config(tmp_path / "off" / "config.yaml", dataset_dir, epochs=2))
    assert json.dumps(rows_of(plain)[0]["train"]) != json.dumps(rows_of(whole)[0]["train"])
