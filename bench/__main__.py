"""Our speed beside our peers', interleaved in one run, as one table of ratios. Nothing here fails for being slow."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from aplantida_dist.command import CommandParser, count, run_command
from aplantida_dist.world import World, open_world
from bench.audit import bench_audit
from bench.augment import bench_augment
from bench.build import bench_build
from bench.decode import NUM_PICTURES, bench_decode
from bench.feed import bench_feed
from bench.finding import Finding
from bench.index import bench_index
from bench.lanes import bench_lanes
from bench.loader import bench_loader
from bench.loop import SMALL, Load, bench_loop
from bench.memory import bench_memory
from bench.parity import bench_parity
from bench.pictures import NUM_SHARDS, Pictures, prepare_pictures
from bench.plan import bench_plan
from bench.report import bench_report
from bench.scale import bench_scale
from bench.stop import bench_stop
from bench.table import machine_facts, to_text
from bench.totals import bench_totals

PARTS = ("decode", "loader", "augment", "loop", "totals", "plan", "lanes", "index", "audit", "build", "report", "stop")
SLOW_PARTS = ("feed", "memory", "parity", "scale")
CACHE_DIR = Path(__file__).parent / ".cache"
WIDTH, HEIGHT = 500, 375
PORTRAIT_WIDTH, PORTRAIT_HEIGHT = 400, 533
EXAMPLE = """\
example:
  python -m bench --only loader --repeats 3
  python -m bench --only feed --model vit_base_patch16_384 --image-size 384 --batch-size 64 --precision bf16 --workers 16

Decode is the train transform in one process, bytes to what is shipped, beside torchvision's (float32), timm's (uint8) and
a bare decode, and on pictures that were re-encoded with --max-side. One thread a process, all on the CPU. CPU time is user + system of this process and its workers; a ratio is ours / the
peer's, the median over the repeats. Every loader delivers the same pictures in batches of 64 at 224 px with the same crop,
flip and number of workers, kept for three epochs, from the page cache: the peers normalised float32 from their workers; ours uint8,
as a GPU is fed, which normalises, or (`normalised`) also float32, made in the main process. It is beside its transform alone in as
many processes, too, and beside as many threads of one process. Augment is each augmentation of the training alone, on decoded pictures of 224.
The index is of their shards, as if they were tars of others. Building is without its audit, from files in the page cache, in wall time: ours
digests, indexes and syncs what it writes; the peers do none of it, and are measured with a sync and `tar` also without.
The loop has mixup, clipping and EMA on both sides. Report is such steps with W&B online, to a stand-in of its server on
this machine, beside steps without; stop is what it costs at each step to ask all ranks whether one was told to stop,
beside the step. Feed is images/s of a training, read from shards, beside the same steps on batches that lie on the device, and beside
timm's parts with its reader on the same shards. Parity is no speed: it trains with ours and with timm's task, loader,
optimizer and schedule on the same shards, and tells how far apart they come out.
The first run draws the pictures (about a minute) and keeps them in bench/.cache.
"""


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(1)
    findings = [finding for part in options.only or PARTS for finding in _bench(part, options)]
    print(f"\n{to_text(findings)}\n\n{machine_facts()}")


def _bench(part: str, options: argparse.Namespace) -> list[Finding]:
    print(f"bench: {part} …", file=sys.stderr, flush=True)
    match part:
        case "loader":
            return bench_loader(_pictures(options), repeats=options.repeats)
        case "augment":
            return bench_augment(_pictures(options), repeats=options.repeats)
        case "decode":
            return _bench_decode(options)
        case "feed":
            return _bench_feed(options)
        case "index":
            return bench_index(_pictures(options), repeats=options.repeats)
        case "audit":
            return bench_audit(_pictures(options).folder, repeats=options.repeats)
        case "build":
            return bench_build(_pictures(options).folder, cache_dir=CACHE_DIR, repeats=options.repeats)
        case "lanes":
            return bench_lanes(repeats=options.repeats)
        case "loop":
            return bench_loop(world=_open_world(), repeats=options.repeats)
        case "memory":
            return bench_memory(CACHE_DIR, num_records=options.records)
        case "parity":
            return bench_parity(CACHE_DIR, world=_open_world(), num_seeds=options.seeds)
        case "report":
            return bench_report(repeats=options.repeats)
        case "scale":
            return [
                finding
                for classes_a_shard in (10, 100)
                for finding in bench_scale(CACHE_DIR, num_shards=options.shards, classes_a_shard=classes_a_shard)
            ]
        case "stop":
            return bench_stop(repeats=options.repeats)
        case "totals":
            return bench_totals(repeats=options.repeats)
        case _:
            return bench_plan(repeats=options.repeats)


def _bench_decode(options: argparse.Namespace) -> list[Finding]:
    """Landscape and portrait, drawn, or the photographs of a folder."""
    if options.photographs is not None:
        return bench_decode(options.photographs, repeats=options.repeats, what=options.photographs.name)
    portrait = prepare_pictures(
        CACHE_DIR, num_pictures=NUM_PICTURES, width=PORTRAIT_WIDTH, height=PORTRAIT_HEIGHT, workers=os.cpu_count() or 1
    )
    folders = {f"{WIDTH} × {HEIGHT}": _pictures(options), f"{PORTRAIT_WIDTH} × {PORTRAIT_HEIGHT}": portrait}
    return [
        finding
        for what, pictures in folders.items()
        for finding in bench_decode(pictures.folder, repeats=options.repeats, what=what)
    ]


def _bench_feed(options: argparse.Namespace) -> list[Finding]:
    """On a GPU where there is one; each worker of timm's reader needs a shard of its own."""
    world = open_world(precision=options.precision, timeout_s=600)
    pictures = _pictures(options, num_shards=max(NUM_SHARDS, options.workers))
    load = Load(options.model, options.image_size, num_classes=SMALL.num_classes, batch_size=options.batch_size)
    return bench_feed(pictures.split, load, world=world, num_workers=options.workers, repeats=options.repeats)


def _open_world() -> World:
    os.environ["ACCELERATE_USE_CPU"] = "true"  # it would take a GPU where there is one
    return open_world(precision="fp32", timeout_s=60)


def _pictures(options: argparse.Namespace, *, num_shards: int = NUM_SHARDS) -> Pictures:
    return prepare_pictures(
        CACHE_DIR,
        num_pictures=options.pictures,
        width=WIDTH,
        height=HEIGHT,
        workers=os.cpu_count() or 1,
        num_shards=num_shards,
    )


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m bench",
        description="Print our speed beside our peers', interleaved in one run; nothing fails for being slow.",
        example=EXAMPLE,
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=PARTS + SLOW_PARTS,
        help=f"run this part; give it again for another (default: all but {', '.join(SLOW_PARTS)})",
    )
    parser.add_argument(
        "--repeats", type=count, default=5, help="how often each is measured, or a multiple of it (default %(default)s)"
    )
    parser.add_argument("--pictures", type=count, default=1536, help="how many pictures are read (default %(default)s)")
    parser.add_argument(
        "--photographs", type=Path, metavar="DIR", help="the JPEG files that decode reads (default: drawn pictures)"
    )
    parser.add_argument(
        "--records",
        type=count,
        default=100_000,
        help="how many records memory builds, 2 at least (default %(default)s)",
    )
    parser.add_argument(
        "--shards", type=count, default=100_000, help="of how many shards scale makes a manifest (default %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=count, default=5, help="how many seeds parity trains, 2 at least (default %(default)s)"
    )
    feed = parser.add_argument_group("feed", "what it trains, on a GPU where there is one")
    feed.add_argument("--model", default=SMALL.model_name, help="a name of timm's (default %(default)s)")
    feed.add_argument("--image-size", type=count, default=SMALL.image_size, help="pixels (default %(default)s)")
    feed.add_argument("--batch-size", type=count, default=SMALL.batch_size, help="of a step (default %(default)s)")
    feed.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default %(default)s)")
    feed.add_argument("--workers", type=count, default=1, help="loader workers (default %(default)s)")
    return parser


if __name__ == "__main__":
    run_command(main)
