"""Print which samples form which step, and write their pictures: `python shards/plan.py DATASET --epoch 0 ...`, one JSON line a slot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aplantida_dist.command import CommandParser, count, run_command, share
from aplantida_dist.config import Config
from aplantida_dist.config_sections import DataSection
from aplantida_dist.data.dataset import Split, open_dataset
from aplantida_dist.data.index import read_key
from aplantida_dist.data.plan import Coordinates, TrainPlan
from aplantida_dist.data.sampling import ClassSampling
from aplantida_dist.errors import UserError

EXAMPLE = """\
example: which samples were in step 1234 of a run, and on which of its 8 ranks? What did the model see there?
  python shards/plan.py shards/global --split train --steps 1234:1235 --global-batch-size 256 --micro-batch-size 32 --world-size 8
  python shards/plan.py --run runs/teacher_global --steps 1234:1235 --extract step_1234
"""

STATED = ("seed", "global_batch_size", "micro_batch_size", "block_samples", "sampling_exponent", "lanes")
"""What the options say of the plan, or the config of a run."""


def main() -> None:
    """Print the plan's slots, rank by rank, step by step; with --extract also write their pictures."""
    arguments = _parse_arguments()
    split, plan, write_pictures = _open(arguments)
    samples = _Samples(split)
    for step in _steps(arguments, plan):
        epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
        files = write_pictures(step)
        for rank in range(arguments.world_size):
            for slot in plan.slots_of(rank, arguments.world_size):
                micro_batch = plan.micro_batch(Coordinates(epoch, step_in_epoch, slot))
                places = list(zip(micro_batch.shard_indices.tolist(), micro_batch.member_indices.tolist(), strict=True))
                line = {
                    "epoch": epoch,
                    "step": step,
                    "rank": rank,
                    "slot": slot,
                    "keys": [samples.key(*place) for place in places],
                    "weights": micro_batch.weights.tolist(),
                    "labels": [samples.label(*place) for place in places],
                    "shards": [samples.shard(*place) for place in places],
                }
                print(json.dumps(line | ({"files": files[slot]} if slot in files else {})), flush=True)


Files = dict[int, list[str | None]]
"""The names of the files of a step's pictures, by slot; None for what has no weight."""


def _open(arguments: argparse.Namespace) -> tuple[Split, TrainPlan, Callable[[int], Files]]:
    """The split, its plan, and what writes the pictures of a step: as the options say, or as a run trained."""
    if arguments.run is None:
        split = open_dataset(arguments.dataset).open_split(arguments.split)
        return split, _plan_of(arguments, split), lambda step: {}
    # Not above: with torch and timm it takes seconds, which the plan alone does not need.
    from aplantida_dist.replay import open_replay, write_pictures

    replay = open_replay(arguments.run, dataset_dir=arguments.dataset)
    folder: Path | None = arguments.extract
    if folder is None:
        return replay.split, replay.plan, lambda step: {}
    return (
        replay.split,
        replay.plan,
        lambda step: {batch.at.slot: write_pictures(batch, folder, step=step) for batch in replay.batches(step)},
    )


def _plan_of(arguments: argparse.Namespace, split: Split) -> TrainPlan:
    """The plan that the options describe. What they leave out is the config's default."""
    stated = {name: value for name in STATED if (value := getattr(arguments, name)) is not None}
    defaults = {
        name: DataSection.model_fields[name].default for name in ("block_samples", "sampling_exponent", "lanes")
    }
    stated = {"seed": Config.model_fields["seed"].default, **defaults, **stated}
    exponent = stated.pop("sampling_exponent")
    sampling = None if exponent == 1.0 else ClassSampling(split.labels, exponent, stated["seed"])
    num_lanes = stated.pop("lanes")
    return TrainPlan(shard_sizes=split.shard_sizes, sampling=sampling, num_lanes=num_lanes, **stated)


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


class _Samples:
    """What a sample is, by its place: its key, read from the tar header, its label from the index, the shard that holds it."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._open: dict[int, tuple[int, Any]] = {}

    def key(self, shard_index: int, member_index: int) -> str:
        descriptor, index = self._shard(shard_index)
        return read_key(descriptor, index[member_index], shard_path=self._split.shard_path(shard_index))

    def label(self, shard_index: int, member_index: int) -> int:
        return int(self._shard(shard_index)[1]["label"][member_index])

    def shard(self, shard_index: int, member_index: int) -> str:
        return self._split.shard_path(shard_index).name

    def _shard(self, shard_index: int) -> tuple[int, Any]:
        if shard_index not in self._open:
            self._open[shard_index] = (self._split.open_shard(shard_index), self._split.read_index(shard_index))
        return self._open[shard_index]


def _stretch(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not A:B with A < B, such as 1234:1235 for step 1234 alone")
    return int(first), int(last)


def _parse_arguments() -> argparse.Namespace:
    arguments = _parser().parse_args()
    if arguments.run is None:
        for name in ("dataset", "global_batch_size", "micro_batch_size"):
            if getattr(arguments, name) is None:
                raise UserError(f"{_option(name)} is missing; give it, or --run, whose config says it")
        if arguments.extract is not None:
            raise UserError(
                "--extract needs --run: the config of a run says how its pictures were cropped and augmented"
            )
        return arguments
    for name in STATED:
        if getattr(arguments, name) is not None:
            raise UserError(f"{_option(name)} does not go with --run, whose config says it; leave it out")
    if arguments.split != "train":
        raise UserError(f"--split {arguments.split} does not go with --run: runs train on train; leave it out")
    if arguments.extract is not None and arguments.steps is None:
        raise UserError("--extract needs --steps, such as 1234:1235: it writes a file for each picture of them")
    return arguments


def _option(name: str) -> str:
    return "DATASET" if name == "dataset" else f"--{name.replace('_', '-')}"


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="shards/plan.py",
        description="Print which samples form which step, as training reads them: one JSON line a slot.",
        example=EXAMPLE,
    )
    parser.add_argument(
        "dataset", type=Path, nargs="?", metavar="DATASET", help="with --run a copy of its dataset, or left out"
    )
    parser.add_argument("--split", default="train", help="(default: train)")
    parser.add_argument(
        "--epoch", type=int, help="an epoch, counted from 0 (default: 0, unless --steps says otherwise)"
    )
    parser.add_argument(
        "--steps", type=_stretch, metavar="A:B", help="the run's steps A to B - 1, counted from 0 through all epochs"
    )
    parser.add_argument(
        "--run", type=Path, metavar="RUN_DIR", help="take seed, batch sizes and sampling from the config of this run"
    )
    parser.add_argument(
        "--extract",
        type=Path,
        metavar="DIR",
        help="with --run and --steps: write the pictures there as PNG, decoded, cropped, mirrored, augmented and erased as the model "
        "saw them, before mixing and normalization; the lines then name the `files`, STEP_SLOT_PLACE_KEY.png",
    )
    parser.add_argument("--global-batch-size", type=count)
    parser.add_argument("--micro-batch-size", type=count)
    parser.add_argument(
        "--world-size", type=count, default=1, metavar="N", help="how many ranks share the slots (default: 1)"
    )
    parser.add_argument("--seed", type=int, help="the config's seed (default: the config's default, 0)")
    parser.add_argument("--block-samples", type=count, help="the config's data.block_samples (default: the config's)")
    parser.add_argument(
        "--sampling-exponent",
        type=share,
        metavar="Q",
        help="the config's data.sampling_exponent (default: the config's default, every sample once)",
    )
    parser.add_argument(
        "--lanes",
        type=count,
        metavar="L",
        help="the config's data.lanes (default: the config's default, every slot may hold samples of every shard)",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
