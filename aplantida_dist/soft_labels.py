"""The command that stores a teacher's soft labels: `accelerate launch [...] -m aplantida_dist.soft_labels --run TEACHER --data DATASET --out FILE`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from aplantida_dist.checkpoint import load_model_state
from aplantida_dist.command import CommandParser, count, positive, run_command
from aplantida_dist.config import Config
from aplantida_dist.config_file import load_config
from aplantida_dist.data.address import place_of
from aplantida_dist.data.classmap import CLASSES_FILE, load_class_map
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.lineage import Identities
from aplantida_dist.lock import take_lock
from aplantida_dist.model import pixel_convention
from aplantida_dist.origin import unknown_lines
from aplantida_dist.recipe import cache_of, decided, evaluation_transform_of, model_of, normalize_of, reading_of
from aplantida_dist.run_folder import CONFIG_FILE, resolve_checkpoint
from aplantida_dist.signals import end_like_ctrl_c
from aplantida_dist.soft_label_file import (
    Preprocessing,
    SoftLabelError,
    SoftLabelFacts,
    open_soft_labels,
    write_soft_labels,
)
from aplantida_dist.soft_label_parts import SoftLabelParts
from aplantida_dist.soft_labelling import Labelling, write_parts_across_ranks
from aplantida_dist.world import World, open_world, told_once_a_node

EXAMPLE = """\
example:
  accelerate launch -m aplantida_dist.soft_labels --run runs/teacher --data shards/demo --split train --out teacher.soft
  accelerate launch -m aplantida_dist.train --config configs/demo.yaml --run-dir runs/student soft_labels.files=[teacher.soft]

The same command again goes on where it stopped, on any number of processes.
"""


def main() -> None:
    """Store what a checkpoint says of every sample of a split."""
    end_like_ctrl_c()
    with told_once_a_node():
        arguments = _parse_arguments()
        config = load_config(arguments.run / CONFIG_FILE, arguments.overrides)
    world = open_world(precision=config.train.precision, timeout_s=config.train.timeout_s)
    with world.watched():
        _label_across_ranks(arguments, config, world)
        world.close()


def _label_across_ranks(arguments: argparse.Namespace, config: Config, world: World) -> None:
    """Collective. Write what is missing of the soft labels."""
    labelling = world.agree_across_ranks(lambda: _open(arguments, config, world))
    world.require_equal_across_ranks("the soft labels to write", labelling.facts.model_dump_json())
    with ExitStack() as held:
        world.learn_from_main_across_ranks(lambda: _hold(held, arguments.out))
        _write(arguments.out, labelling, world)
    if world.is_main:
        _tell(arguments.out)


def _hold(held: ExitStack, path: Path) -> None:
    """Hold a file's name until the stack is closed: one command at a time writes its parts. For the main process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.enter_context(
            take_lock(
                path.with_name(f".{path.name}.lock"),
                doing="writes these soft labels",
                remedy="wait until it has ended, or choose another --out",
            )
        )
    except OSError as error:
        raise SoftLabelError(
            f"{path}: nothing can be written beside it: {error.strerror}; choose another --out"
        ) from error


def _write(path: Path, labelling: Labelling, world: World) -> None:
    """Collective. Make the parts that are not there yet, and the file of them all, unless it is there."""
    parts = SoftLabelParts(path.with_name(f"{path.name}.partial"), labelling.facts)
    if not world.learn_from_main_across_ranks(lambda: _is_written(path, labelling.facts)):
        first_part = world.learn_from_main_across_ranks(parts.begin)
        write_parts_across_ranks(labelling, parts, world=world, first_part=first_part)
        world.learn_from_main_across_ranks(lambda: _finish(path, parts, labelling.seen))


def _open(arguments: argparse.Namespace, config: Config, world: World) -> Labelling:
    """The checkpoint's model and the split, whose class map may be another: no label is read."""
    checkpoint = resolve_checkpoint(arguments.run, arguments.checkpoint)
    class_map = load_class_map(arguments.run / CLASSES_FILE)
    split = open_dataset(arguments.data, cache=cache_of(config)).open_split(arguments.split)
    model = model_of(config, num_classes=class_map.num_classes, pretrained=False)
    load_model_state(model, checkpoint)
    pixels = pixel_convention(model)
    transform = evaluation_transform_of(config, pixels)
    lineage = checkpoint.lineage()
    facts = SoftLabelFacts(
        teacher_run=str(arguments.run),
        teacher_path=str(checkpoint.path),
        teacher_digest=checkpoint.digest,
        lineage=lineage.facts(),
        class_names=class_map.class_names,
        temperature=arguments.temperature,
        num_kept=min(arguments.top, class_map.num_classes),
        split=split.name,
        manifest_digest=split.digest,
        num_samples=split.num_samples,
        identity_digest=split.identity_digest,
        preprocessing=Preprocessing(
            image_size=transform.image_size,
            crop_fraction=transform.crop_fraction,
            interpolation=transform.interpolation,
        ),
        micro_batch_size=decided(config.evaluation.micro_batch_size),
        precision=config.train.precision,
    )
    return Labelling(
        model=model,
        split=split,
        transform=transform,
        normalize=normalize_of(config, pixels, world),
        reading=reading_of(config, world),
        facts=facts,
        seen=lineage.identities,
    )


def _is_written(path: Path, facts: SoftLabelFacts) -> bool:
    """Whether the file is there already; SoftLabelError where it is another one. For the main process."""
    if not path.exists():
        return False
    if open_soft_labels(path).facts != facts:
        raise SoftLabelError(f"{path}: holds other soft labels already; delete it or choose another --out")
    return True


def _finish(path: Path, parts: SoftLabelParts, seen: Identities) -> None:
    """Put the parts together and delete them. For the main process."""
    write_soft_labels(path, parts.facts, parts=parts.read(), seen=seen)
    parts.remove()


def _lines(path: Path) -> Iterator[str]:
    """What the file holds, for the screen."""
    written = open_soft_labels(path)
    facts, (_, lineage) = written.facts, written.parentage()
    num_seen = len(lineage.among(np.array(written.arrays["identities"])))
    rest = float(written.arrays["rest"].mean(dtype=np.float64))
    yield (
        f"{path} · {facts.num_samples} samples of {facts.split}, top {facts.num_kept} of {len(facts.class_names)} classes at "
        f"temperature {facts.temperature:g}, no augmentation · {100 * rest:.2f} % of the probability is in the other classes"
    )
    yield f"by {facts.teacher_path}, which was trained on {num_seen} of these samples"
    yield from unknown_lines(lineage)
    yield f"written: {path}"


def _tell(path: Path) -> None:
    for line in _lines(path):
        print(line, flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = CommandParser(
        prog="aplantida_dist.soft_labels",
        description="Store a checkpoint's likeliest classes of every sample of a split, for a student to learn from.",
        example=EXAMPLE,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="TEACHER", help="the teacher's run folder")
    parser.add_argument(
        "--checkpoint", default="best", metavar="best|last|DIR", help="which checkpoint (default: best)"
    )
    parser.add_argument(
        "--data", type=place_of, required=True, metavar="DATASET", help="the dataset to label, a folder or an address"
    )
    parser.add_argument("--split", default="train", help="train, val or test (default: train)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--top", type=count, default=32, metavar="K", help="classes to keep of a sample (default: 32)")
    parser.add_argument(
        "--temperature",
        type=positive,
        default=3.0,
        metavar="T",
        help="what logits are divided by before the softmax, here and in the student (default: 3)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="config values that replace the run's, such as data.num_workers=4"
    )
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run_command(main)
