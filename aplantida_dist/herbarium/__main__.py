"""The command `python -m aplantida_dist.herbarium`: draw a demo dataset."""

from __future__ import annotations

from pathlib import Path

from aplantida_dist.command import CommandParser, count, run_command
from aplantida_dist.herbarium.collection import EVEN_SHARE, HeldOut, draw_herbarium

_EXAMPLE = """example:
  python -m aplantida_dist.herbarium --out pictures --species 12 --pictures 1800
  python shards/build.py --from-folder pictures --out shards/pictures
"""


def main() -> None:
    """Draw a herbarium as the command line asks."""
    args = _parser().parse_args()
    draw_herbarium(
        args.out,
        num_species=args.species,
        num_pictures=args.pictures,
        width=args.side,
        height=args.side,
        seed=args.seed,
        workers=args.workers,
        even_share=args.even_share,
        held_out=None if args.held_out is None else HeldOut(*args.held_out),
    )


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m aplantida_dist.herbarium",
        description="Draw the leaves of invented species: a folder of JPEG files a species, and metadata.jsonl.",
        example=_EXAMPLE,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="an empty or new folder")
    parser.add_argument("--species", type=count, default=12, help="how many species (default %(default)s)")
    parser.add_argument("--pictures", type=count, default=1800, help="how many pictures in all (default %(default)s)")
    parser.add_argument("--side", type=count, default=128, help="width and height in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other species (default %(default)s)")
    parser.add_argument("--workers", type=count, default=2, help="processes that draw (default %(default)s)")
    parser.add_argument(
        "--even-share",
        type=float,
        default=EVEN_SHARE,
        help="share of the pictures dealt evenly; the rest is long-tailed (default %(default)s)",
    )
    parser.add_argument(
        "--held-out",
        type=count,
        nargs=2,
        metavar=("VAL", "TEST"),
        help="put the pictures into train/ and draw so many more of every species into val/ and test/",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
