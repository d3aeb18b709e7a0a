"""Print which samples form which step: `python shards/plan.py DATASET --split train --epoch 0 ...`, one JSON line a slot."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from aplantida_dist.command import CommandParser, count, run_command, share
from aplantida_dist.config_sections import DataSection
from aplantida_dist.data.dataset import Split, open_dataset
from aplantida_dist.data.index import read_key
from aplantida_dist.data.plan import Coordinates, TrainPlan
from aplantida_dist.data.sampling import ClassSampling
from aplantida_dist.errors import UserError

EXAMPLE = """\
example: which samples were in step 1234 of a run, and on which of its 8 ranks?
  python shards/plan.py shards/global --split train --steps 1234:1235 --global-batch-size 256 --micro-batch-size 32 --world-size 8
"""


def main() -> None:
    """Print the plan's slots, rank by rank, step by step."""
    arguments = _parse_arguments()
    split = open_dataset(arguments.dataset).open_split(arguments.split)
    exponent = arguments.sampling_exponent
    plan = TrainPlan(
        shard_sizes=split.shard_sizes,
        seed=arguments.seed,
        global_batch_size=arguments.global_batch_size,
        micro_batch_size=arguments.micro_batch_size,
        block_samples=arguments.block_samples,
        sampling=None if exponent == 1.0 else ClassSampling(split.labels, exponent, arguments.seed),
        num_lanes=arguments.lanes,
    )
    keys = _Keys(split)
    for step in _steps(arguments, plan):
        epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
        for rank in range(arguments.world_size):
            for slot in plan.slots_of(rank, arguments.world_size):
                micro_batch = plan.micro_batch(Coordinates(epoch, step_in_epoch, slot))
                places = zip(micro_batch.shard_indices.tolist(), micro_batch.member_indices.tolist(), strict=True)
                line = {
                    "epoch": epoch,
                    "step": step,
                    "rank": rank,
                    "slot": slot,
                    "keys": [keys.at(shard_index, member_index) for shard_index, member_index in places],
                    "weights": micro_batch.weights.tolist(),
                }
                print(json.dumps(line))


def _steps(arguments: argparse.Namespace, plan: TrainPlan) -> range:
    """The run's steps to print, counted from 0: all of one epoch, or the stretch A:B, which may lie in any epoch."""
    epoch = arguments.epoch
    if arguments.steps is None:
        return range((epoch or 0) * plan.steps_per_epoch, ((epoch or 0) + 1) * plan.steps_per_epoch)
    steps = range(*arguments.steps)
    if epoch is not None and {step // plan.steps_per_epoch for step in steps} != {epoch}:
        first = epoch * plan.steps_per_epoch
        raise UserError(
            f"--steps {steps.start}:{steps.stop}: epoch {epoch} has the steps {first}:{first + plan.steps_per_epoch}; "
            "steps count through the whole run: leave --epoch out, or give steps of that epoch"
        )
    return steps


class _Keys:
    """Sample keys by their place, read from the tar headers."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._open: dict[int, tuple[int, Any]] = {}

    def at(self, shard_index: int, member_index: int) -> str:
        if shard_index not in self._open:
            self._open[shard_index] = (self._split.open_shard(shard_index), self._split.read_index(shard_index))
        descriptor, index = self._open[shard_index]
        return read_key(descriptor, index[member_index], shard_path=self._split.shard_path(shard_index))


def _stretch(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not A:B with A < B, such as 1234:1235 for step 1234 alone")
    return int(first), int(last)


def _parse_arguments() -> argparse.Namespace:
    parser = CommandParser(
        prog="shards/plan.py",
        description="Print which samples form which step, as training reads them: one JSON line a slot.",
        example=EXAMPLE,
    )
    parser.add_argument("dataset", type=Path, metavar="DATASET")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--epoch", type=int, help="an epoch, counted from 0 (default: 0, unless --steps says otherwise)"
    )
    parser.add_argument(
        "--steps", type=_stretch, metavar="A:B", help="the run's steps A to B - 1, counted from 0 through all epochs"
    )
    parser.add_argument("--global-batch-size", type=count, required=True)
    parser.add_argument("--micro-batch-size", type=count, required=True)
    parser.add_argument(
        "--world-size", type=count, default=1, metavar="N", help="how many ranks share the slots (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the config's seed (default: 0)")
    parser.add_argument(
        "--block-samples",
        type=count,
        default=DataSection.model_fields["block_samples"].default,
        help="the config's data.block_samples (default: the config's default)",
    )
    parser.add_argument(
        "--sampling-exponent",
        type=share,
        default=DataSection.model_fields["sampling_exponent"].default,
        metavar="Q",
        help="the config's data.sampling_exponent (default: the config's default, every sample once)",
    )
    parser.add_argument(
        "--lanes",
        type=count,
        default=DataSection.model_fields["lanes"].default,
        metavar="L",
        help="the config's data.lanes (default: the config's default, every slot may hold samples of every shard)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
