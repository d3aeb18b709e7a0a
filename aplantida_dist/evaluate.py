"""The command that evaluates: `accelerate launch [...] -m aplantida_dist.evaluate --run RUN_DIR --data DATASET --split test`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from aplantida_dist.bad_samples import budget_error, counts_text
from aplantida_dist.checkpoint import Checkpoint, CheckpointError, load_model_state
from aplantida_dist.command import CommandParser, positive, run_command
from aplantida_dist.config import Config
from aplantida_dist.config_file import load_config
from aplantida_dist.data.address import place_of
from aplantida_dist.data.classmap import CLASSES_FILE, ClassMap, load_class_map
from aplantida_dist.data.dataset import Split, open_dataset
from aplantida_dist.errors import UserError
from aplantida_dist.evaluation import Evaluation, as_evaluation_metrics, evaluate_across_ranks
from aplantida_dist.files import replacing, write_json
from aplantida_dist.history import EvaluationMetrics
from aplantida_dist.lineage import Identities
from aplantida_dist.long_tail import ShiftedLogits, log_prior
from aplantida_dist.model import pixel_convention
from aplantida_dist.origin import leak_error, leak_text, unknown_lines
from aplantida_dist.other_classes import CHOICES, labels_in_run, without_others
from aplantida_dist.recipe import (
    bad_sample_budget_of,
    cache_of,
    decided,
    evaluation_transform_of,
    model_of,
    normalize_of,
    reading_of,
)
from aplantida_dist.record import classes_text, clean_text
from aplantida_dist.run_folder import CONFIG_FILE, resolve_checkpoint
from aplantida_dist.signals import end_like_ctrl_c
from aplantida_dist.world import World, open_world, told_once_a_node

EXAMPLE = """\
example:
  accelerate launch -m aplantida_dist.evaluate --run runs/demo --data shards/demo --split test --predictions test.jsonl
"""


def main() -> None:
    """Evaluate a checkpoint on a split and print, or write, its metrics."""
    end_like_ctrl_c()
    with told_once_a_node():
        arguments = _parse_arguments()
        config = load_config(arguments.run / CONFIG_FILE, arguments.overrides)
    world = open_world(precision=config.train.precision, timeout_s=config.train.timeout_s)
    with world.watched():
        _evaluate(arguments, config, world)
        world.close()


def _evaluate(arguments: argparse.Namespace, config: Config, world: World) -> None:
    """Collective. Evaluate as the command line asks, and tell."""
    opened = world.agree_across_ranks(lambda: _open(arguments, config))
    model, checkpoint, split = opened.model, opened.checkpoint, opened.split
    world.require_equal_across_ranks("the split to evaluate", split.digest)
    leaked = world.learn_from_main_across_ranks(lambda: _find_leak(split, checkpoint, allow_leak=arguments.allow_leak))
    pixels = pixel_convention(model)
    tau, train_counts = arguments.logit_adjustment, checkpoint.position.train_counts
    if train_counts is None and world.is_main:
        print(f"{checkpoint.path}: does not tell its train counts, so no class is many, medium or few", flush=True)
    if tau is not None:
        model = ShiftedLogits(model, world.agree_across_ranks(lambda: _post_hoc_shift(tau, checkpoint, config)))
    other_classes = arguments.other_classes if len(opened.labels) < opened.num_classes else None
    if other_classes == "leave-out":
        model = ShiftedLogits(model, without_others(opened.labels, num_classes=opened.num_classes))
    world.watchdog.at("evaluating", step=checkpoint.position.step)
    with ExitStack() as files:
        evaluation = evaluate_across_ranks(
            world.prepare_for_evaluation(model),
            world=world,
            split=split,
            num_classes=opened.num_classes,
            transform=evaluation_transform_of(config, pixels),
            micro_batch_size=decided(config.evaluation.micro_batch_size),
            normalize=normalize_of(config, pixels, world),
            reading=reading_of(config, world),
            leaked=leaked,
            between_rounds=lambda: None,
            voids_bad_samples=config.data.on_bad_sample == "void",
            write_predictions=_writer(arguments.predictions, world, files) if arguments.predictions else None,
        )
        _require_within_budget(evaluation, config, class_map=opened.class_map, world=world)
    metrics = as_evaluation_metrics(
        evaluation,
        expected_samples=split.num_samples,
        train_counts=train_counts,
        logit_adjustment=tau,
        other_classes=other_classes,
    )
    if world.is_main:
        if checkpoint.has_ema:
            print(f"{arguments.weights} weights of {checkpoint.path}, which holds raw and ema (--weights)", flush=True)
        if arguments.json:
            write_json(arguments.json, {split.name: metrics.model_dump(mode="json", exclude_none=True)})
        _print_metrics(split.name, metrics, arguments)
        if evaluation.bad:
            counts = counts_text(evaluation.bad, class_names=opened.class_map.class_names)
            print(f"{split.name} · {len(evaluation.bad)} bad samples are void: {counts}", flush=True)


@dataclass(frozen=True)
class _Opened:
    """What is evaluated on what. All labels are the run's, of which `labels` are those of the dataset's classes, in its order."""

    model: nn.Module
    checkpoint: Checkpoint
    split: Split
    class_map: ClassMap
    labels: tuple[int, ...]

    @property
    def num_classes(self) -> int:
        return self.class_map.num_classes


def _open(arguments: argparse.Namespace, config: Config) -> _Opened:
    """The checkpoint's model and the split; unless --other-classes is given, their class maps must be the same."""
    checkpoint = resolve_checkpoint(arguments.run, arguments.checkpoint)
    class_map = load_class_map(arguments.run / CLASSES_FILE)
    dataset = open_dataset(arguments.data, cache=cache_of(config))
    labels = labels_in_run(
        dataset.class_map,
        class_map,
        other_classes=arguments.other_classes,
        ours=str(arguments.run),
        theirs=str(arguments.data),
    )
    split = dataset.open_split(arguments.split)
    if dataset.class_map.digest != class_map.digest:
        split = split.relabelled(labels)
    model = model_of(config, num_classes=class_map.num_classes, pretrained=False)
    load_model_state(model, checkpoint, arguments.weights)
    return _Opened(model, checkpoint, split, class_map, labels)


def _require_within_budget(evaluation: Evaluation, config: Config, *, class_map: ClassMap, world: World) -> None:
    """Raise BadSampleError, on every rank, where more samples are bad than the config lets be void. No file is written then."""
    budget = bad_sample_budget_of(config)
    if len(evaluation.bad) > budget:
        raise world.told_by_main(budget_error(evaluation.bad, budget=budget, class_names=class_map.class_names))


def _post_hoc_shift(tau: float, checkpoint: Checkpoint, config: Config) -> Tensor:
    """−τ · log prior of the train split that the checkpoint learnt from."""
    if config.data.sampling_exponent < 1.0:
        raise CheckpointError(
            f"{checkpoint.path}: its run drew classes with data.sampling_exponent {config.data.sampling_exponent:g}, so its logits do "
            "not follow the classes' shares of the train samples; leave --logit-adjustment out"
        )
    if checkpoint.position.train_counts is None:
        raise CheckpointError(
            f"{checkpoint.path}: does not tell its train counts, which --logit-adjustment needs; it was written by an earlier "
            "version: resume the run for an epoch to have a checkpoint that does"
        )
    return -tau * log_prior(checkpoint.position.train_counts)


def _find_leak(split: Split, checkpoint: Checkpoint, *, allow_leak: bool) -> Identities:
    """What of the split the checkpoint was trained on; LeakError where that is something and not allowed. For the main process."""
    lineage = checkpoint.lineage()
    for line in unknown_lines(lineage):
        print(line, flush=True)
    leaked = lineage.among(split.identities)
    if len(leaked) and not allow_leak:
        before = " or what it began with" if lineage.ancestors else ""
        raise leak_error(leak_text(leaked, split, by=f"by {checkpoint.path}{before}"))
    return leaked


def _writer(path: Path, world: World, files: ExitStack) -> Callable[[str], Any]:
    """Where predictions go: a file beside, which takes its name when it is whole. Every rank gets one, the main writes."""
    if not world.is_main:
        return len
    try:
        beside = files.enter_context(replacing(path))
        file = files.enter_context(beside.open("w", encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: predictions cannot be written here: {error.strerror}; choose another place"
        ) from error
    return file.write


def _print_metrics(name: str, metrics: EvaluationMetrics, arguments: argparse.Namespace) -> None:
    print(
        f"{name} · {metrics.num_samples} samples · loss {metrics.loss:.4f} · top-1 {100 * metrics.top1:.2f} % · "
        f"top-5 {100 * metrics.top5:.2f} % · {classes_text(metrics)}"
        + (f" · logits less {metrics.logit_adjustment:g} log prior" if metrics.logit_adjustment else "")
        + (f" · classes that the dataset lacks: {metrics.other_classes}" if metrics.other_classes else ""),
        flush=True,
    )
    if metrics.leaked_samples:
        print(f"{name} · {clean_text(metrics)}", flush=True)
    for path in (arguments.json, arguments.predictions):
        if path:
            print(f"written: {path}", flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = CommandParser(
        prog="aplantida_dist.evaluate",
        description="Evaluate a checkpoint on a split, each sample exactly once, on as many processes as the launcher starts.",
        example=EXAMPLE,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN_DIR", help="the run folder that training wrote")
    parser.add_argument(
        "--checkpoint", default="best", metavar="best|last|DIR", help="which checkpoint (default: best)"
    )
    parser.add_argument(
        "--weights",
        choices=("raw", "ema"),
        default="raw",
        help="those that the optimizer moved (the default), or their average, where the run keeps one (ema.decay)",
    )
    parser.add_argument(
        "--data",
        type=place_of,
        required=True,
        metavar="DATASET",
        help="a dataset, a folder or an address, with the run's classes or a part of them",
    )
    parser.add_argument("--split", default="test", help="train, val or test (default: test)")
    parser.add_argument(
        "--allow-leak",
        action="store_true",
        help="go on although the checkpoint was trained on photographs of this split: shows the whole and its clean part",
    )
    parser.add_argument(
        "--logit-adjustment",
        type=positive,
        metavar="TAU",
        help="take TAU times the log of each class's share of the train samples off the logits (Menon et al. 2021): for "
        "models whose loss had no loss.logit_adjustment; loss and predictions are those of the shifted logits",
    )
    parser.add_argument(
        "--other-classes",
        choices=CHOICES,
        help="for a dataset with a part of the run's classes, which are matched by name: whether a hit must win among all "
        "classes of the run (count), or those that the dataset lacks are left out. Labels in the predictions are the run's",
    )
    parser.add_argument("--predictions", type=Path, metavar="FILE.jsonl", help="write one line a sample")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics as the history writes them")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="config values that replace the run's, such as data.num_workers=4"
    )
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run_command(main)
