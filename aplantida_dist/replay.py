"""The replay of a run: the pictures of any of its steps once more, as the model saw them, without training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from aplantida_dist.checkpoint import Checkpoint, newest_sound_checkpoint
from aplantida_dist.config import Config, changes
from aplantida_dist.config_file import load_config
from aplantida_dist.data.batch import Batch
from aplantida_dist.data.classmap import ClassMap
from aplantida_dist.data.dataset import Split, open_dataset
from aplantida_dist.data.images import TrainTransform
from aplantida_dist.data.plan import Coordinates, TrainPlan
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from aplantida_dist.errors import UserError
from aplantida_dist.model import pixel_convention
from aplantida_dist.recipe import cache_of, dataset_of, model_of, plan_of, transforms_of
from aplantida_dist.run_folder import CONFIG_FILE, checkpoints_dir
from aplantida_dist.strict_yaml import show
from aplantida_dist.terminal import warn

LONGEST_KEY = 180
"""Characters of a key in a file name, of which the rest takes 30 at most, and a file system allows 255."""


class ReplayError(UserError):
    """A run cannot be replayed: its config or dataset is not the one that it trained with, or a picture cannot be written."""


@dataclass(frozen=True)
class Replay:
    """A run as it reads: its config, the split that it trains on, and the plan of that."""

    config: Config
    class_map: ClassMap
    split: Split
    plan: TrainPlan

    @cached_property
    def transform(self) -> TrainTransform:
        """What happened to each picture, of which the interpolation is the model's."""
        model = model_of(self.config, num_classes=self.class_map.num_classes, pretrained=False)
        return transforms_of(self.config, pixel_convention(model))[0]

    def batches(self, step: int) -> Iterator[Batch]:
        """The micro-batches of a step of the run, slot by slot, the same to the last bit. `mixing`, which is the device's, comes after them."""
        micro_batches = MicroBatches(
            self.split,
            self.plan,
            self.transform,
            seed=self.config.seed,
            voids_bad_samples=self.config.data.on_bad_sample == "void",
        )
        epoch, step_in_epoch = divmod(step, self.plan.steps_per_epoch)
        coordinates = [Coordinates(epoch, step_in_epoch, slot) for slot in range(self.plan.slots_per_step)]
        data = self.config.data
        reading = Reading(data.num_workers, data.prefetch_micro_batches if data.num_workers else 1, pin_memory=False)
        return stream(micro_batches, coordinates, reading=reading)


def open_replay(run_dir: Path, *, dataset_dir: Path | None = None) -> Replay:
    """Open a run for its replay, on the dataset that it names or on this copy of it.

    Config and dataset must be those that its newest checkpoint names; where it has none, that cannot be known, and stderr says so.
    """
    config = load_config(run_dir / CONFIG_FILE)
    checkpoint = newest_sound_checkpoint(checkpoints_dir(run_dir), warn=warn)
    dataset = dataset_of(config) if dataset_dir is None else open_dataset(dataset_dir, cache=cache_of(config))
    if checkpoint is None:
        warn(f"{run_dir}: has no checkpoint, which would say whether this config and dataset are those it trained with")
        split = dataset.open_split("train")
    else:
        # A split that --max-samples limits has the number in its digest, after a colon.
        recorded = checkpoint.position.digests["train_manifest"]
        limit = recorded.partition(":")[2]
        split = dataset.open_split("train", max_samples=int(limit) if limit else None)
        _require_same(checkpoint, config, run_dir=run_dir)
        if split.digest != recorded:
            raise ReplayError(
                f"{split.split_dir}: is not the split that {run_dir} trained on (the digests of their manifests differ); "
                "name the dataset, or a copy of it"
            )
    return Replay(config, dataset.class_map, split, plan_of(config, split))


def write_pictures(batch: Batch, folder: Path, *, step: int) -> list[str | None]:
    """Write the pictures of a micro-batch that weigh anything, without loss; the name of each file, None for the others.

    The name is step, slot, place in the slot and key. What of a key no file name should hold is percent-encoded, so that every file
    lies in the folder, which is made. What is there already is not overwritten: ReplayError.
    """
    names: list[str | None] = []
    pixels = batch.images.permute(0, 2, 3, 1).numpy()
    for place, (key, weight) in enumerate(zip(batch.sample_keys, batch.weights.tolist(), strict=True)):
        if weight == 0.0:
            names.append(None)
            continue
        escaped = quote(key, safe="", errors="surrogateescape")[:LONGEST_KEY]
        name = f"{step:08d}_{batch.at.slot:04d}_{place:04d}_{escaped}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("xb") as file:
                Image.fromarray(pixels[place]).save(file, "PNG")
        except OSError as error:
            raise ReplayError(f"{folder / name}: cannot be written: {error.strerror}; choose another folder") from error
        names.append(name)
    return names


def _require_same(checkpoint: Checkpoint, config: Config, *, run_dir: Path) -> None:
    """Raise ReplayError for a config that is not the one of the checkpoint, in what decides the numbers. A younger field has its default."""
    before = json.loads(json.dumps(config.law_defaults())) | dict(checkpoint.position.law_fields)
    changed = changes(before, json.loads(json.dumps(config.law_fields())))
    if changed:
        told = "; ".join(f"{change.name} was {show(change.old)}, is {show(change.new)}" for change in changed)
        raise ReplayError(
            f"{run_dir / CONFIG_FILE}: is not what {checkpoint.path.name} was trained with: {told}; restore the file"
        )
