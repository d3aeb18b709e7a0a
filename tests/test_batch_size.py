"""`train.micro_batch_size: auto`: the largest that fits, agreed, written down, and never searched for again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from aplantida_dist.batch_size import BatchSizeError, fits_in_memory, largest_that_fits, sizes_to_try
from aplantida_dist.config import ConfigError
from aplantida_dist.config_file import load_config
from aplantida_dist.debug import load_debug_config
from aplantida_dist.strict_yaml import load_yaml
from tests.ranks import command_on_ranks
from tests.runs import rows_of, write_config

AUTO = "train.micro_batch_size=auto"


class Greedy(nn.Module):
    """A network whose forward pass needs more memory than there is, above a number of samples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.weight = most, nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return images.sum() * self.weight


def trial_of(most: int) -> Callable[[], Callable[[int], None]]:
    """How a trial of a greedy network is made: forward and backward."""
    return lambda: lambda size: Greedy(most)(torch.zeros(size, 3)).backward()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("global_batch_size", [1, 2, 7, 16, 96, 256, 1000])
def test_the_largest_divisor_that_fits_is_found(global_batch_size: int, world_size: int) -> None:
    """Whatever the memory: the brute-force answer, with a number of trials that grows like a logarithm."""
    sizes = sizes_to_try(global_batch_size, world_size)
    assert all(
        global_batch_size % size == 0 and (size == 1 or size * world_size <= global_batch_size) for size in sizes
    )
    for most in range(1, 1 + max(sizes)):
        tried: list[int] = []

        def fits(size: int, most: int = most, tried: list[int] = tried) -> bool:
            tried.append(size)
            return size <= most

        assert largest_that_fits(sizes, fits) == max(size for size in sizes if size <= most)
        assert len(tried) == len(set(tried)) <= 2 * len(sizes).bit_length() + 1


def test_too_small_a_memory_is_an_error() -> None:
    """Not even one sample fits: the text says what to do."""
    with pytest.raises(BatchSizeError, match="not even 1 fits into the memory; choose a smaller model"):
        largest_that_fits([1, 2, 4], lambda size: fits_in_memory(size, make_trial=trial_of(0)))


def test_other_errors_of_a_trial_are_not_taken_for_a_full_memory() -> None:
    """A full memory does not fit; a model that is broken at every size must not look like one that does not fit."""

    def broken(size: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fits_in_memory(1, make_trial=lambda: broken)
    assert not fits_in_memory(2, make_trial=trial_of(1))


def test_auto_becomes_a_number_and_nothing_else_changes(tmp_path: Path) -> None:
    """The resolved config is that of a user who wrote the number; evaluation follows, unless it has its own."""
    path = write_config(tmp_path / "config.yaml", tmp_path)
    assert load_config(path, [AUTO]).with_micro_batch_size(8) == load_config(path, ["train.micro_batch_size=8"])
    text = path.read_text().replace("evaluation:\n  micro_batch_size: 4\n", "")
    path.write_text(text)
    config = load_config(path, [AUTO])
    assert config.evaluation.micro_batch_size == "auto"
    assert config.with_micro_batch_size(8) == load_config(path, ["train.micro_batch_size=8"])
    with pytest.raises(ConfigError, match=r"evaluation\.micro_batch_size"):
        load_config(path, ["evaluation.micro_batch_size=auto"])
    assert load_debug_config(path, [AUTO.replace("auto", "2")])[0].train.micro_batch_size == 2
    path.write_text(path.read_text().replace("micro_batch_size: 4", "micro_batch_size: auto"))
    assert load_debug_config(path)[0].train.micro_batch_size == 8


def test_there_is_no_auto_without_a_gpu(dataset_dir: Path, tmp_path: Path) -> None:
    """One line that says why, and a number to write."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    finished = command_on_ranks(
        2, "aplantida_dist.train", ["--config", config, "--run-dir", tmp_path / "run", AUTO], tmp_path
    )
    assert [rank.code for rank in finished] == [2, 2]
    (line,) = [line for rank in finished for line in rank.stderr.splitlines()]
    assert "this process runs on cpu; write a number, a divisor of 16 such as 4" in line


def test_a_resumed_run_takes_the_number_of_its_checkpoint(dataset_dir: Path, tmp_path: Path) -> None:
    """`auto` goes on with what was found, here on another machine: no search, the same run, config.yaml with the number."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=2)
    for arguments in (["train.epochs=1", "schedule.kind=constant"], [AUTO, "schedule.kind=constant"]):
        (finished,) = command_on_ranks(
            1, "aplantida_dist.train", ["--config", config, "--run-dir", tmp_path / "run", *arguments], tmp_path
        )
        assert finished.code == 0, finished.stderr
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [5, 10]
    resolved = load_yaml((tmp_path / "run" / "config.yaml").read_text(), source="config.yaml")
    assert resolved["train"]["micro_batch_size"] == 4
    position = json.loads((tmp_path / "run" / "checkpoints" / "step_00000010" / "position.json").read_text())
    assert position["law_fields"]["train.micro_batch_size"] == 4
