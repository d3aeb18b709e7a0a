"""The recipe: each part of a training as a config describes it. What is switched off is not read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from aplantida_dist.config import Config
from aplantida_dist.data.address import place_of
from aplantida_dist.data.augment import (
    Augmentation,
    Blur,
    ColorJitter,
    RandAugment,
    Rotation,
    TrivialAugment,
    VerticalFlip,
)
from aplantida_dist.data.cache import Cache
from aplantida_dist.data.classmap import ClassMap
from aplantida_dist.data.dataset import Dataset, Split, open_dataset
from aplantida_dist.data.images import EvaluationTransform, TrainTransform
from aplantida_dist.data.plan import TrainPlan
from aplantida_dist.data.sampling import ClassSampling
from aplantida_dist.data.stream import Reading
from aplantida_dist.distillation import Distillation, share_classes
from aplantida_dist.errors import UserError
from aplantida_dist.execution import arrange
from aplantida_dist.long_tail import ClassWeighted, Focal, LogitAdjusted, effective_number_weights, log_prior
from aplantida_dist.mixing import Mixing, MixupCutmix, Unmixed
from aplantida_dist.model import Normalize, PixelConvention, build_model
from aplantida_dist.nonfinite import NonFinitePolicy
from aplantida_dist.objective import BinaryCrossEntropy, CrossEntropy, Objective
from aplantida_dist.optimizer import build_optimizer
from aplantida_dist.schedule import Schedule
from aplantida_dist.soft_objective import soft_label_loss
from aplantida_dist.soft_targets import SoftTargets, open_soft_targets
from aplantida_dist.stopping import Stopping
from aplantida_dist.teachers import Teacher, open_teacher
from aplantida_dist.world import World


def dataset_of(config: Config) -> Dataset:
    """The dataset that a config names, by way of its cache, if any."""
    return open_dataset(place_of(config.data.dataset), cache=cache_of(config))


def cache_of(config: Config) -> Cache | None:
    """The cache that a config asks for. A reader who waits behind another one's tries makes his own, within the watchdog's time."""
    if config.data.cache_dir is None:
        return None
    return Cache(
        Path(config.data.cache_dir).absolute(),
        max_bytes=config.data.cache_bytes,
        patience_s=config.train.timeout_s / 3,
    )


def plan_of(config: Config, split: Split) -> TrainPlan:
    """The plan of training on a split. Where every sample is drawn once, no labels are read."""
    exponent = config.data.sampling_exponent
    return TrainPlan(
        shard_sizes=split.shard_sizes,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=decided(config.train.micro_batch_size),
        block_samples=config.data.block_samples,
        sampling=ClassSampling(split.labels, exponent, config.seed) if exponent < 1.0 else None,
        num_lanes=config.data.lanes,
    )


def decided(micro_batch_size: int | Literal["auto"]) -> int:
    """A micro-batch size as the plan needs it: `auto` has become a number before anything is put together."""
    if micro_batch_size == "auto":
        raise UserError("micro_batch_size is auto, which `aplantida_dist.train` alone decides; write a number")
    return micro_batch_size


def reading_of(config: Config, world: World) -> Reading:
    """How this machine reads: the config's workers, and pinned memory where there is a GPU to copy to."""
    return Reading(config.data.num_workers, config.data.prefetch_micro_batches, pin_memory=world.device.type == "cuda")


def model_of(config: Config, *, num_classes: int, pretrained: bool) -> nn.Module:
    """The model that a config describes, arranged to compute as it says."""
    settings = config.model
    pretrained_file = settings.pretrained_file if settings.pretrained else None
    model = build_model(
        config.model.name,
        num_classes=num_classes,
        image_size=config.data.image_size,
        pretrained=pretrained,
        pretrained_file=pretrained_file if pretrained else None,
        kwargs=config.model.kwargs,
        seed=config.seed,
    )
    arrange(
        model,
        grad_checkpointing=settings.grad_checkpointing,
        channels_last=settings.channels_last,
        compile_with=settings.compile,
    )
    return model


def normalize_of(config: Config, pixels: PixelConvention, world: World) -> Normalize:
    """How pictures come to the model: in its pixel convention and memory format."""
    return Normalize(pixels, world.device, is_channels_last=config.model.channels_last)


def optimizer_of(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that a config describes."""
    settings = config.optimizer
    return build_optimizer(
        model,
        name=settings.name,
        peak_lr=settings.peak_lr,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
        kwargs=settings.kwargs,
    )


def schedule_of(config: Config, plan: TrainPlan) -> Schedule:
    """The schedule in steps. A constant rate has no end to fall to, so `final_lr` is not read for it; `decay_epochs` is read for wsd alone."""
    settings = config.schedule
    warmup_steps = math.ceil(settings.warmup_epochs * plan.steps_per_epoch)
    total_steps = config.train.epochs * plan.steps_per_epoch
    decay_epochs = settings.decay_epochs if settings.kind == "wsd" else None
    return Schedule(
        kind=settings.kind,
        peak_lr=config.optimizer.peak_lr,
        final_lr=config.optimizer.peak_lr if settings.kind == "constant" else settings.final_lr,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        # Rounding both up may make them overlap by a step, which is the warm-up's.
        decay_steps=min(math.ceil((decay_epochs or 0.0) * plan.steps_per_epoch), total_steps - warmup_steps),
    )


def transforms_of(config: Config, pixels: PixelConvention) -> tuple[TrainTransform, EvaluationTransform]:
    """What happens to pictures in training and in evaluation."""
    data = config.data
    train_transform = TrainTransform(
        image_size=data.image_size,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        horizontal_flip=data.horizontal_flip,
        random_erasing=data.random_erasing,
        interpolation=pixels.interpolation,
        augmentations=augmentations_of(config),
    )
    return train_transform, evaluation_transform_of(config, pixels)


def augmentations_of(config: Config) -> tuple[Augmentation, ...]:
    """What else is done to a training picture, in timm's order; what is off is not there. RandAugment alone reads the keys of its strength."""
    data = config.data
    augmentations: list[Augmentation] = []
    if data.vertical_flip:
        augmentations.append(VerticalFlip(data.vertical_flip))
    if data.rotation:
        augmentations.append(Rotation(data.rotation))
    match data.augment:
        case "randaugment":
            augmentations.append(RandAugment(data.augment_ops, data.augment_magnitude, data.augment_magnitude_std))
        case "trivialaugment":
            augmentations.append(TrivialAugment())
    if data.color_jitter:
        augmentations.append(ColorJitter(data.color_jitter))
    if data.blur:
        augmentations.append(Blur(data.blur))
    return tuple(augmentations)


def evaluation_transform_of(config: Config, pixels: PixelConvention) -> EvaluationTransform:
    """The evaluation transform: the config's size, the model's crop fraction and interpolation."""
    return EvaluationTransform(config.data.image_size, pixels.crop_fraction, pixels.interpolation)


def mixing_of(config: Config, plan: TrainPlan) -> Mixing:
    """How pictures are mixed. The rest of the section is not read where both alphas are 0, nor the switch where one is."""
    settings = config.mixing
    mixup, cutmix = settings.mixup_alpha, settings.cutmix_alpha
    if not (mixup or cutmix):
        return Unmixed()
    if decided(config.train.micro_batch_size) == 1:
        raise UserError(
            "micro_batch_size auto found that only 1 fits, and mixing needs 2; lower data.image_size, or set mixing off"
        )
    return MixupCutmix(
        seed=config.seed,
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        probability=settings.probability,
        cutmix_probability=settings.switch_probability if mixup and cutmix else float(cutmix > 0.0),
        end_step=(config.train.epochs - settings.last_epochs_off) * plan.steps_per_epoch,
    )


def label_objective_of(config: Config, train_counts: tuple[int, ...], device: torch.device) -> Objective:
    """The label loss. The shift is outermost: everything within sees the shifted logits."""
    loss = config.loss
    is_binary = loss.kind == "binary_cross_entropy"
    objective: Objective = (BinaryCrossEntropy if is_binary else CrossEntropy)(label_smoothing=loss.label_smoothing)
    if loss.focal_gamma:
        objective = Focal(objective, loss.focal_gamma)
    if loss.class_weights == "effective_number":
        weights = effective_number_weights(train_counts, beta=loss.effective_number_beta)
        objective = ClassWeighted(objective, weights.to(device))
    if loss.logit_adjustment:
        objective = LogitAdjusted(objective, (loss.logit_adjustment * log_prior(train_counts)).to(device))
    return objective


def objective_of(
    config: Config,
    *,
    class_map: ClassMap,
    train_counts: tuple[int, ...],
    teachers: Sequence[Teacher],
    soft_targets: SoftTargets | None,
    device: torch.device,
) -> Objective:
    """What is minimised: the label loss, alone or beside what teachers say, now or in what was stored of them."""
    label_objective = label_objective_of(config, train_counts, device)
    if soft_targets is not None:
        return soft_label_loss(
            soft_targets,
            label_objective=label_objective,
            soft_share=config.soft_labels.soft_share,
            label_share=config.soft_labels.label_share,
            device=device,
        )
    if not teachers:
        return label_objective
    return Distillation(
        label_objective=label_objective,
        teachers=tuple(share_classes(teacher.class_map, class_map, device=device) for teacher in teachers),
        weights=tuple(teacher.weight for teacher in teachers),
        temperature=config.distillation.temperature,
        soft_share=config.distillation.soft_share,
        label_share=config.distillation.label_share,
    )


def teachers_of(config: Config, class_map: ClassMap, train_split: Split) -> tuple[Teacher, ...]:
    """The teachers that the config names, with their weights; these, and all else of distillation, are read only where there are some."""
    paths = config.distillation.teachers
    if not paths:
        return ()
    weights = config.distillation.teacher_weights or (1.0,) * len(paths)
    return tuple(
        open_teacher(
            Path(path),
            weights="ema" if config.distillation.teacher_ema else "raw",
            weight=weight / sum(weights),
            class_map=class_map,
            train_split=train_split,
            build=lambda own, num_classes: model_of(own, num_classes=num_classes, pretrained=False),
        )
        for path, weight in zip(paths, weights, strict=True)
    )


def soft_targets_of(config: Config, class_map: ClassMap) -> SoftTargets | None:
    """The soft labels that the config names; None where it names none, and then no other key of theirs is read."""
    settings = config.soft_labels
    if not settings.files:
        return None
    return open_soft_targets([Path(name) for name in settings.files], weights=settings.weights, class_map=class_map)


def nonfinite_policy_of(config: Config) -> NonFinitePolicy:
    """What to do about a step that is not finite. Where it stops the run there is no budget, and none is read."""
    action = config.train.on_nonfinite
    return NonFinitePolicy(action, config.train.nonfinite_budget if action == "skip" else 0)


def bad_sample_budget_of(config: Config) -> int:
    """How many different samples may be void because they are bad. Where the first one stops the run there is no budget, and none is read."""
    return config.data.bad_sample_budget if config.data.on_bad_sample == "void" else 0


def stopping_of(config: Config) -> Stopping | None:
    """When to stop early; None where no patience is given, and then nothing else of the section is read."""
    patience_epochs = config.stopping.patience_epochs
    if patience_epochs is None:
        return None
    settings = config.stopping
    return Stopping(settings.metric, settings.mode, patience_epochs, settings.min_delta)
