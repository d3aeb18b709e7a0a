"""Pretrained weights by timm's own loading, without a network: a file, a folder, and what gives too little of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from aplantida_dist.model import ModelError, build_model
from tests.ranks import command_on_ranks
from tests.runs import compose, write_config


def save(model: nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return path


def teacher_of(name: str, num_classes: int) -> nn.Module:
    torch.manual_seed(77)
    model: nn.Module = timm.create_model(name, num_classes=num_classes)
    return model


def build(name: str, **how: Any) -> nn.Module:
    return build_model(name, num_classes=6, image_size=32, kwargs={}, seed=0, **how)


def names_that_differ(model: nn.Module, other: nn.Module) -> list[str]:
    theirs = other.state_dict()
    return [name for name, ours in model.state_dict().items() if not torch.equal(ours, theirs[name])]


@pytest.mark.parametrize("num_classes", [6, 17, 1000])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_gives_the_backbone_and_the_head_is_new(tmp_path: Path, suffix: str, num_classes: int) -> None:
    """Every tensor but the head's is the file's; the head is the one that the seed gives."""
    given = teacher_of("test_convnext", num_classes)
    file = save(given, tmp_path / f"weights{suffix}")
    model, fresh = (
        build("test_convnext", pretrained=True, pretrained_file=str(file)),
        build("test_convnext", pretrained=False),
    )
    head = ["head.fc.weight", "head.fc.bias"]
    assert [
        name
        for name in model.state_dict()
        if name not in head and not torch.equal(model.state_dict()[name], given.state_dict()[name])
    ] == []
    assert [name for name in head if not torch.equal(model.state_dict()[name], fresh.state_dict()[name])] == []


def test_a_folder_is_named_by_local_dir(tmp_path: Path) -> None:
    """timm's `save_for_hf` writes it; the same as through a file."""
    given = teacher_of("test_convnext", 17)
    save_for_hf(given, tmp_path / "hub")
    file = save(given, tmp_path / "weights.pth")
    by_folder = build(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    assert names_that_differ(by_folder, build("test_convnext", pretrained=True, pretrained_file=str(file))) == []


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda path: save(teacher_of("test_convnext", 6), path),
            "give 0.0 % of the backbone's parameters, expected at least 90 %",
        ),
        (lambda path: save(teacher_of("test_resnet", 6).conv1, path), "expected at least 90 %"),
        (lambda path: path.write_text("hello"), "must hold weights of this very model"),
        (lambda path: None, "no file is here"),
    ],
    ids=["of another model", "of a part", "no weights", "none"],
)
def test_what_timm_would_leave_out_in_silence_is_an_error(
    tmp_path: Path, make: Callable[[Path], Any], told: str
) -> None:
    """timm loads what fits and goes on: with random weights, had nobody looked."""
    make(tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=told) as error:
        build("test_resnet", pretrained=True, pretrained_file=str(tmp_path / "weights.pth"))
    assert len(str(error.value)) < 700
    assert "\n" not in str(error.value)


def test_a_run_begins_with_them_and_goes_on_without(dataset_dir: Path, tmp_path: Path) -> None:
    """The weights of the first step; a resumed run has its own, and the file may be gone; alone the key is read by nobody."""
    given = teacher_of("test_convnext", 6)
    file = save(given, tmp_path / "weights.safetensors")
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    overrides = ["model.pretrained=true", f"model.pretrained_file={file}"]
    model = compose(config, tmp_path / "begun", overrides).job.model
    assert names_that_differ(model, given) == ["head.fc.weight"]  # a new bias is 0, as the given one was
    arguments = ["--config", config, "--run-dir", tmp_path / "run", *overrides]
    for _ in range(2):
        (finished,) = command_on_ranks(1, "aplantida_dist.train", arguments, tmp_path)
        assert finished.code == 0, finished.stderr
        file.unlink(missing_ok=True)
    arguments = ["--config", config, "--run-dir", tmp_path / "other", f"model.pretrained_file={file}"]
    (refused,) = command_on_ranks(1, "aplantida_dist.train", arguments, tmp_path)
    assert refused.code == 2
    assert "model.pretrained_file: is set to" in refused.stderr
    assert "nothing reads it" in refused.stderr
