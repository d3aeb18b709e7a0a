"""The ground that a run stands on: what every rank finds alone, before the processes do anything together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from aplantida_dist.ancestor import open_ancestor
from aplantida_dist.checkpoint import Checkpoint, Weights, load_model_state
from aplantida_dist.config import Config
from aplantida_dist.data.ahead import require_room_for_blocks
from aplantida_dist.data.classmap import ClassMap
from aplantida_dist.data.dataset import Split
from aplantida_dist.data.plan import TrainPlan
from aplantida_dist.execution import synchronize_batchnorm
from aplantida_dist.freezing import freeze
from aplantida_dist.init_from import Beginning, begin_with
from aplantida_dist.recipe import dataset_of, model_of, plan_of, soft_targets_of, teachers_of
from aplantida_dist.run_folder import find_checkpoint, require_same_run
from aplantida_dist.soft_targets import SoftTargets
from aplantida_dist.spreading import name_blocks
from aplantida_dist.teachers import Teacher, digest_of
from aplantida_dist.terminal import warn
from aplantida_dist.world import World


@dataclass(frozen=True)
class Request:
    """What the command line asks for beside the config."""

    run_dir: Path
    resume: str
    max_samples: int | None
    extra_checks: bool
    allow_leak: bool


@dataclass(frozen=True)
class Ground:
    """Dataset, plan, model and checkpoint of a run, with the digests that tell whether it is the same run."""

    class_map: ClassMap
    train_split: Split
    val_split: Split | None
    plan: TrainPlan
    model: nn.Module
    checkpoint: Checkpoint | None
    beginning: Beginning | None
    teachers: tuple[Teacher, ...]
    soft_targets: SoftTargets | None
    digests: dict[str, str]
    train_counts: tuple[int, ...]

    @property
    def start_step(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.position.step

    @property
    def recorded_step(self) -> int:
        """The last step that a row may tell of: with the totals of its epoch a checkpoint was saved before the epoch's row."""
        is_before_row = self.checkpoint is not None and bool(self.checkpoint.totals().any())
        return self.start_step - 1 if is_before_row else self.start_step


def lay_ground(config: Config, *, world: World, request: Request) -> Ground:
    """Open the dataset, find the checkpoint, make the model and give it the weights that it begins or goes on with."""
    dataset = dataset_of(config)
    train_split = dataset.open_split("train", max_samples=request.max_samples)
    val_split = dataset.open_split("val", max_samples=request.max_samples) if config.evaluation.every_epochs else None
    soft_targets = soft_targets_of(config, dataset.class_map)
    digests = {
        "config": config.digest,
        "class_map": dataset.class_map.digest,
        "train_manifest": train_split.digest,
        **({} if val_split is None else {"val_manifest": val_split.digest}),
        **({} if soft_targets is None else {"soft_labels": soft_targets.digest}),
    }
    teachers = teachers_of(config, dataset.class_map, train_split)
    if teachers:
        digests["teachers"] = digest_of(teachers)
    checkpoint = find_checkpoint(request.run_dir, request.resume, warn=warn if world.is_main else _keep_silent)
    if checkpoint is not None:
        require_same_run(
            checkpoint,
            run_dir=request.run_dir,
            class_map=dataset.class_map,
            digests=digests,
            law_fields=config.law_fields(),
            law_defaults=config.law_defaults(),
        )
    # A checkpoint brings all weights, so those of timm's hub are not fetched a second time.
    pretrained, beginning = config.model.pretrained and checkpoint is None, None
    init_from = config.model.init_from
    init_weights: Weights = "ema" if init_from is not None and config.model.init_from_ema else "raw"
    model = model_of(config, num_classes=dataset.class_map.num_classes, pretrained=pretrained)
    if checkpoint is not None:
        load_model_state(model, checkpoint)
        digests |= {name: told for name, told in checkpoint.position.digests.items() if name == "init_from"}
    elif init_from is not None:
        beginning = begin_with(model, open_ancestor(Path(init_from), weights=init_weights), class_map=dataset.class_map)
        digests["init_from"] = beginning.descent.digest
    if config.model.sync_batchnorm:
        model = synchronize_batchnorm(model, device=world.device)
    freeze(model, config.model.freeze)
    if world.spreads_parameters:
        name_blocks(model)
    plan = plan_of(config, train_split)
    slots_here = [plan.slots_of(rank, world.world_size) for rank in world.ranks_here]
    require_room_for_blocks(
        train_split, plan, num_epochs=config.train.epochs, slots=range(slots_here[0].start, slots_here[-1].stop)
    )
    train_counts = tuple(train_split.counts_of_classes(dataset.class_map.num_classes))
    return Ground(
        class_map=dataset.class_map,
        train_split=train_split,
        val_split=val_split,
        plan=plan,
        model=model,
        checkpoint=checkpoint,
        beginning=beginning,
        teachers=teachers,
        soft_targets=soft_targets,
        digests=digests,
        train_counts=train_counts,
    )


def _keep_silent(text: str) -> None:
    """The other ranks see the same and leave it to the main process to say it."""
