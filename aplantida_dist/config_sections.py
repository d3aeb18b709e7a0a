"""The sections of a config: every key with its type, its bounds, its default and where that comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the smaller bound first")
    return pair


def _argument(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    if not all(item is None or isinstance(item, bool | int | float | str) for item in items):
        raise ValueError("a number, text, true, false, null, or a list of them")
    return value


def _metric(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+", name):
        raise ValueError("names with points between, as a row of the history nests them, such as val.macro_top1")
    return name


def is_loss(metric: str) -> bool:
    """Whether a metric is better when it is smaller, as its name tells: `val.loss`, `ema.clean.loss`."""
    return metric.rpartition(".")[2].endswith("loss")


Share = Annotated[float, Field(ge=0.0, le=1.0)]
Area = Annotated[float, Field(gt=0.0, le=1.0)]
Ratio = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Metric = Annotated[str, AfterValidator(_metric)]
Arguments = Mapping[str, Annotated[Any, AfterValidator(_argument)]]


class Section(BaseModel):
    """Fields that belong together. It notes which of them were read, so that a key that nothing reads can be an error.

    A read is an attribute access (`config.data.image_size`). Validation, `to_dict`, comparison, printing and copying go
    past attribute access and are none. Equality is that of the values, whatever was read.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )
    _read: set[str] = PrivateAttr(default_factory=set)

    if not TYPE_CHECKING:  # a typed __getattribute__ would make every misspelt attribute pass the type checker

        def __getattribute__(self, name: str) -> Any:
            if name in type(self).__pydantic_fields__:
                super().__getattribute__("__pydantic_private__")["_read"].add(name)  # ten times as fast as self._read
            return super().__getattribute__(name)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def unread(self) -> list[str]:
        """Dotted names of the fields that were set to something else than their default and never read since, in order."""
        names: list[str] = []
        for name, field in type(self).__pydantic_fields__.items():
            value = vars(self)[name]
            if isinstance(value, Section):
                names += [f"{name}.{below}" for below in value.unread()]
            elif name in self.model_fields_set - self._read and value != field.default:
                names.append(name)
        return names


class DataSection(Section):
    """Which pictures, and what is done to them."""

    dataset: Text
    """Folder of a built dataset (`shards/README.md`), from where the command is run, or its address: s3://, gs://, http:// or https://.

    What is read does not depend on where it lies. Credentials come from the environment, never from here.
    """
    cache_dir: Text | None = None
    """Folder on this machine's own disk where whole shards are kept while they are read: for an address, or a slow network disk.

    null reads the dataset where it lies. All processes of a machine share it. Changes the speed and nothing else.
    """
    cache_bytes: Count = 64 * 2**30
    """Bytes that the shards in cache_dir take at most; at least those of the shards of a block and the next one, which is brought ahead.

    Default: 64 GiB, 250 shards of 256 MiB. Changes the speed and nothing else.
    """
    image_size: Count = 224
    """Side of the square that the model sees, in pixels. Source: ImageNet practice (AlexNet, VGG)."""
    crop_scale: Annotated[tuple[Area, Area], Field(strict=False), AfterValidator(_ordered)] = (0.35, 1.0)
    """Smallest and largest share of the picture's area that a training crop covers, each in (0, 1].

    Source: Inception's crop (Szegedy et al. 2015), with 0.35 for its 0.08: a leaf's outline must stay in the picture.
    """
    crop_ratio: Annotated[tuple[Ratio, Ratio], Field(strict=False), AfterValidator(_ordered)] = (0.75, 1.3333)
    """Smallest and largest width / height of a training crop, above 0. Source: Szegedy et al. 2015."""
    horizontal_flip: Share = 0.5
    """Probability that a training picture is mirrored, in [0, 1]. Source: ImageNet practice."""
    vertical_flip: Share = 0.0
    """Probability that a training picture is turned upside down, in [0, 1]. Source: timm's `--vflip`."""
    rotation: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    """Degrees up to which a training picture is turned either way, from 0 to 180. Source: torchvision's RandomRotation."""
    augment: Literal["randaugment", "trivialaugment"] | None = None
    """Which ops, drawn for each training picture: `randaugment` (Cubuk et al. 2020, as timm's `rand-m9-mstd0.5-inc1`) or `trivialaugment`
    (Müller and Hutter 2021, as torchvision's TrivialAugmentWide)."""
    augment_ops: Count = 2
    """Ops that randaugment draws for a picture, each taken with probability ½; at least 1. Source: timm's `n`."""
    augment_magnitude: Annotated[float, Field(ge=0.0, le=10.0)] = 9.0
    """How strong they are, from 0 to 10. Source: timm's `m`, 9 in its recipes."""
    augment_magnitude_std: Annotated[float, Field(ge=0.0)] = 0.5
    """Standard deviation with which that is drawn for each of them, at least 0. Source: timm's `mstd`."""
    color_jitter: Share = 0.0
    """How far the brightness, contrast and saturation of a training picture may be from their own, in [0, 1]: x is a factor from
    1 - x to 1 + x. It acts beside `augment` too, where timm's `--color-jitter` would not."""
    blur: Share = 0.0
    """Probability that a training picture is blurred, by a Gaussian of 0.1 to 2 pixels, in [0, 1]. Source: SimCLR (Chen et al. 2020)."""
    random_erasing: Share = 0.0
    """Probability that a rectangle of a training picture becomes random pixels, in [0, 1]. Source: Zhong et al. 2017."""
    sampling_exponent: Share = 1.0
    """q of n^q, by which the share of a class with n train samples in an epoch goes, in [0, 1]; an epoch stays as long as it was.

    1 shows every sample once; 0 every class alike (class-balanced), so that those of rare classes are repeated and of common
    ones a part is left to the next epochs; 0.5 lies between (square-root). Source: Kang et al. 2020; Mahajan et al. 2018.
    """
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Processes a rank that read and decode; 0 does it in the rank's own. Changes the speed and nothing else."""
    prefetch_micro_batches: Count = 4
    """Micro-batches that each worker keeps ready; at least 1. Changes the speed and nothing else."""
    block_samples: Count = 262144
    """Samples that are shuffled together; at least 1, and more than the split holds shuffles all of it (DESIGN §4)."""
    lanes: Count = 1
    """Ranges into which the shards of an epoch are cut, each the source of its own micro-batches of every step; a divisor of their number.

    1 lets every node read every shard. With one lane a node, or several, a node reads only its lanes' shards, other ones in each
    epoch: of 4 nodes with 4 lanes each reads a quarter. A step then mixes its samples from all lanes, a micro-batch from one.
    """
    on_bad_sample: Literal["stop", "void"] = "stop"
    """What happens at a sample whose picture has changed in its shard or does not decode: stop the run, or leave the sample out.

    What is left out weighs nothing in loss, accuracy and gradient, and is void in the row of its epoch; bad_samples.jsonl in the
    run folder names it. A shard that is missing, cut or replaced stops in any case. `void` costs an all-reduce of 8 bytes a step.
    """
    bad_sample_budget: Count = 10
    """Different samples, of all splits, that may be void for this in the whole run, at least 1; one more stops it. `stop` does not read it."""


class ModelSection(Section):
    """Which timm model."""

    name: Text
    """Name of the model in timm (`timm.list_models()`)."""
    pretrained: bool = False
    """Whether to begin with timm's pretrained weights; the head is new whenever the classes are. Not beside init_from.

    They come from timm's hub or, of a model named `local-dir:FOLDER`, from that folder."""
    pretrained_file: Text | None = None
    """A file of pretrained weights of this model, .safetensors or .pth, that timm reads instead of its hub's; beside pretrained alone."""
    init_from: Text | None = None
    """What to begin with instead: a run folder (its best checkpoint), a folder below its checkpoints/, or a .pt with `model_state_dict`.

    The head is carried over by class name. A resumed run has its own weights: it does not read this again, nor needs it to be there.
    """
    init_from_ema: bool = False
    """Whether the checkpoint's EMA is what to begin with; it is an error where its run kept none. Read beside init_from alone."""
    kwargs: Arguments = {}
    """Further arguments of `timm.create_model`, such as drop_path_rate. Image size and number of classes come by themselves."""
    freeze: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Modules or parameters by their names in the model, such as [patch_embed, blocks.0], that never change: neither gradient nor
    weight decay touches them, and a module that is frozen whole stays in evaluation mode, so its BatchNorm statistics and dropout too."""
    head_only_epochs: Annotated[float, Field(ge=0.0)] = 0.0
    """Epochs, also fractions of one, at the beginning in which the classifier alone trains and all else is as if frozen; from 0 to
    train.epochs. Source: linear probing before fine-tuning (Kumar et al. 2022)."""
    grad_checkpointing: bool = False
    """Whether activations are computed again in the backward pass instead of kept: less memory, about a third more time. Source: Chen et al. 2016."""
    channels_last: bool = False
    """Whether weights and pictures lie in memory with the channels innermost (NHWC), as convolutions on tensor cores want them."""
    compile: Literal["inductor", "aot_eager", "eager"] | None = None
    """Backend by which `torch.compile` compiles the model: inductor for speed, the others to find faults; null does not compile."""
    sync_batchnorm: bool = False
    """Whether BatchNorm takes its statistics over all ranks' micro-batches (SyncBN); GPUs only."""


class OptimizerSection(Section):
    """Which optimizer. Its rate at each step comes from the schedule."""

    name: Text = "adamw"
    """Name of the optimizer in timm (`timm.optim.list_optimizers()`). Source: Loshchilov & Hutter 2019."""
    peak_lr: Annotated[float, Field(gt=0.0)]
    """Learning rate at the end of the warm-up, above 0, for train.global_batch_size as written: it is never rescaled."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    """Decoupled weight decay, at least 0; biases and norms are left out. Source: ViT fine-tuning (MAE, DeiT)."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Factor of the learning rate from each layer to the one below, in (0, 1]; the head's is 1. null has one rate. Source: Clark et al. 2020 (ELECTRA), BEiT."""
    kwargs: Arguments = {}
    """Further arguments of the optimizer, such as betas."""


class ScheduleSection(Section):
    """How the learning rate moves with the step."""

    kind: Literal["cosine", "linear", "constant", "wsd"]
    """Its course from peak_lr, after the warm-up, to final_lr at the end; wsd (warm-up, stable, decay) stays at peak_lr and falls at the end.

    Source of cosine: Loshchilov & Hutter 2017; of wsd: Hu et al. 2024, Hägele et al. 2024.
    """
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.0
    """Epochs, also fractions of one, of linear rise to peak_lr; from 0 to train.epochs. Source: Goyal et al. 2017."""
    final_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate at the end, from 0 to peak_lr. A constant schedule does not read it."""
    decay_epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Epochs, also fractions of one, of linear fall to final_lr at the end of wsd; above 0, and with warmup_epochs at most train.epochs."""


class MixingSection(Section):
    """Whether the pictures of a micro-batch are mixed with each other, and their labels with them.

    One draw a micro-batch. Hits of training are then counted by the dominant label, and the history says so.
    """

    mixup_alpha: Annotated[float, Field(ge=0.0)] = 0.0
    """Shape of the Beta distribution of mixup's shares, at least 0; 0 is no mixup. Source: Zhang et al. 2018; DeiT takes 0.8."""
    cutmix_alpha: Annotated[float, Field(ge=0.0)] = 0.0
    """The same for CutMix, which puts a rectangle of one picture into another; 0 is no CutMix. Source: Yun et al. 2019; DeiT takes 1."""
    probability: Share = 1.0
    """Probability that a micro-batch is mixed at all, in [0, 1]. Source: DeiT (Touvron et al. 2021)."""
    switch_probability: Share = 0.5
    """Probability that it is CutMix, where both are on, in [0, 1]. Source: DeiT."""
    last_epochs_off: Annotated[int, Field(ge=0)] = 0
    """Epochs at the end that are not mixed, fewer than train.epochs. Source: YOLOX (Ge et al. 2021)."""


class LossSection(Section):
    """What is minimised. Evaluations report plain cross-entropy in any case, so that they compare."""

    kind: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    """binary_cross_entropy asks each class by itself and takes the mean over classes. Source: Wightman et al. 2021."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the target that is spread over all classes, in [0, 1). Source: Szegedy et al. 2016."""
    logit_adjustment: Annotated[float, Field(ge=0.0)] = 0.0
    """τ of τ · log prior, added to the logits in the training loss alone, at least 0; priors are the shares of the train samples.

    0 is off; 1 is balanced softmax (Ren et al. 2020). Source: Menon et al. 2021. Post hoc instead: `evaluate --logit-adjustment`.
    """
    class_weights: Literal["effective_number"] | None = None
    """Whether the loss of a sample is multiplied by a weight of its class, whose mean over the train samples is 1; null does not.

    effective_number: (1 − β) / (1 − β^n) for a class of n train samples. Source: Cui et al. 2019.
    """
    effective_number_beta: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """β of effective_number, in [0, 1): 0 weighs all alike, towards 1 by 1 / n. Source: Cui et al. 2019 (their iNaturalist)."""
    focal_gamma: Annotated[float, Field(ge=0.0)] = 0.0
    """γ of the factor (1 − p)^γ on the loss, p the label's probability, at least 0; 0 is off. Source: Lin et al. 2017 (theirs: 2)."""


class DistillationSection(Section):
    """Which frozen teachers a student learns from beside its labels (Hinton et al. 2015); without teachers none of it is read."""

    teachers: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Run folders (their best checkpoints) or folders below their checkpoints/; empty learns from the labels alone.

    Classes are matched by name. A resumed run reads them again: they may have moved, but must be the same checkpoints.
    """
    teacher_weights: Annotated[tuple[Ratio, ...], Field(strict=False)] = ()
    """How much each teacher counts beside the others, one number above 0 for each; empty counts them alike."""
    teacher_ema: bool = False
    """Whether the teachers are their checkpoints' EMA; it is an error where a teacher's run kept none."""
    temperature: Ratio = 3.0
    """What logits are divided by before the softmax of teacher and student, above 0. Source: the first trainer's T."""
    soft_share: Share = 0.7
    """Weight of T² · KL(teacher ‖ student), in [0, 1]. Source: the first trainer's alpha."""
    label_share: Share = 0.3
    """Weight of the label loss, in [0, 1]. Source: the first trainer's beta."""


class SoftLabelsSection(Section):
    """Stored soft labels to learn from, written by `aplantida_dist.soft_labels`; without files nothing here acts."""

    files: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Files of soft labels, one a teacher, from where the command is run; a sample must stand in each of them."""
    weights: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(strict=False)] | None = None
    """How much each file counts, above 0, one number a file; their sum does not matter. null counts all alike."""
    soft_share: Annotated[float, Field(ge=0.0)] = 0.7
    """Factor of T² · KL(teachers ‖ student at T), at least 0; T is the files'. Source: Hinton et al. 2015; 0.7 is the first trainer's alpha."""
    label_share: Annotated[float, Field(ge=0.0)] = 0.3
    """Factor of the label's own loss, at least 0. Source: the first trainer's beta. A sample without a soft label has this part alone."""
    missing_budget: Annotated[int, Field(ge=0)] = 0
    """Train samples that may have no soft label, at least 0; with more the run does not start, with fewer each row counts them."""


class TrainSection(Section):
    """How long, in which portions, how precisely."""

    epochs: Count
    """Passes over the train split; at least 1."""
    global_batch_size: Count
    """Samples a step, over all ranks; at least 1."""
    micro_batch_size: Count | Literal["auto"]
    """Samples that are forwarded at once; at least 1, and global_batch_size is a multiple of it.

    auto tries on the GPUs which is the largest that fits into their memory (`batch_size.py`). The run's config.yaml then holds
    the number, and a resumed run takes it from its checkpoint: it decides which samples are forwarded together.
    """
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward and backward pass; weights stay fp32, and fp16 scales its loss.

    A step whose gradient overflows in fp16 leaves the weights as they are. It is counted (skipped_steps in the row, and on the
    screen) and keeps its place in the schedule, which is a function of the step's number. Source: Micikevicius et al. 2018.
    """
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Whether every rank holds the whole model (DDP), or a part of each parameter, gradient and optimizer state, put together a block at a time (FSDP2).

    fsdp is for models that do not fit: slower, and of less memory a rank the more ranks there are. A run may change it when it goes
    on: its checkpoints are the same. On one process it is ddp. Source: Zhao et al. 2023; `torch.distributed.fsdp.fully_shard`.
    """
    clip_norm: Annotated[float, Field(gt=0.0)] | None = None
    """Largest norm of a step's gradient, above 0; null does not clip. Source: Pascanu et al. 2013."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens at a step with a loss or gradient that is NaN, infinite or too large: stop the run, or leave the step out.

    Either way nonfinite_step_N.json in the run folder names its samples. What is left out is its update; its samples are void
    in the row, which counts such steps as nonfinite_steps. `skip` waits for the device once a step, `stop` never does.
    """
    nonfinite_budget: Count = 3
    """Steps that `skip` may leave out in the whole run, at least 1; one more stops it. `stop` does not read it."""
    clip_agc: Annotated[float, Field(gt=0.0)] | None = None
    """Largest norm of a unit's gradient, as a multiple of the norm of its weights, above 0, such as 0.01; the head is left out. null does
    not clip; not beside clip_norm. Source: adaptive gradient clipping (Brock et al. 2021)."""
    log_every_steps: Count = 10
    """Steps between two lines of progress; at least 1."""
    timeout_s: Count = 600
    """Seconds that a rank may take for anything, from one note of its watchdog to the next, in every stage; at least 1.

    Then the run ends, on all ranks, with an error that names the rank that stands still, its stage and its last step.
    """


class EmaSection(Section):
    """An exponential moving average of the weights, evaluated beside them and kept in the checkpoint."""

    decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share that the average keeps of itself at each step, between 0 and 1; null keeps none. Source: Polyak & Juditsky 1992; timm."""
    warmup: bool = True
    """Whether update n keeps at most 1 − n^(−2/3): 0.99 after 1,000, 0.999 after 31,600. Source: timm.utils.ModelEmaV3."""


class EvaluationSection(Section):
    """When and how the val split is evaluated."""

    every_epochs: Annotated[int, Field(ge=0)] = 1
    """Epochs from one evaluation to the next, at most train.epochs; 0 never evaluates."""
    micro_batch_size: Count | Literal["auto"]
    """Samples that are forwarded at once; at least 1. Left out, or auto, it is train.micro_batch_size."""


class StoppingSection(Section):
    """Whether a run ends before train.epochs, because it no longer becomes better. Source: Prechelt 1998."""

    patience_epochs: Count | None = None
    """Epochs without a better value after which the run ends, at least 1, when their row and checkpoint are written; null never ends it."""
    metric: Metric = "val.top1"
    """Metric that is to become better: its dotted name in a row of the history, as for checkpoint.best_metric."""
    mode: Literal["max", "min"] = "max"
    """Whether a larger or a smaller value of stopping.metric is better."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """A value is better by more than this, at least 0, or it is not; in the metric's unit, so 0.001 is 0.1 % of top1."""


class CheckpointSection(Section):
    """What is kept of a run beside its history."""

    every_steps: Count | None = None
    """Steps between two checkpoints within an epoch, at least 1; null saves at the end of epochs only."""
    keep_last: Count = 2
    """Newest checkpoints that are kept, at least 1; the best one is kept besides."""
    best_metric: Metric = "val.top1"
    """Metric that chooses the best checkpoint: the dotted name of any number in a row of the history, such as train.loss.

    A name that the first row does not hold is an error that names those it does.
    """
    best_mode: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value of best_metric is best."""


class ReportSection(Section):
    """How W&B hears of the run."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    """offline writes into the run folder for `wandb sync`; online needs an account, and goes on offline where the server is not to be had."""
    project: Text = "aplantida"
    """W&B project."""
    name: Text | None = None
    """Name of the run in W&B; null takes the run folder's."""
    tags: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """W&B tags."""
