"""The proof as a table: what `evaluate --json` wrote for each recipe and seed, as mean ± spread, and the differences paired by seed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from aplantida_dist.command import CommandParser, run_command
from aplantida_dist.errors import UserError
from aplantida_dist.files import read_json

_RESULT = re.compile(r"(?P<recipe>.+)\.seed_(?P<seed>\d+)\.json")
_REMEDY = "write it again with `python -m aplantida_dist.evaluate … --json RESULTS/RECIPE.seed_N.json`"
EXAMPLE = """\
example:
  sh launch/proof.sh long_tail
  python -m bench.proof runs/proof/long_tail/test --against cross_entropy --metrics macro_top1 few_top1

A cell is the mean over the seeds ± their standard deviation (n − 1), in percent; a difference is that of the same seed, from the
row named by --against. One seed has no spread.
"""


class ProofError(UserError):
    """Results that do not make a table."""


@dataclass(frozen=True)
class Results:
    """The metrics of a recipe, by seed: fractions in [0, 1]. Every recipe of a table has the same seeds."""

    recipe: str
    by_seed: dict[int, dict[str, float]]

    def values(self, metric: str) -> list[float]:
        """The metric of every seed, in the order of seeds. Raises ProofError where one does not hold it."""
        for seed, metrics in self.by_seed.items():
            if metric not in metrics:
                held = ", ".join(name for name, value in metrics.items() if isinstance(value, float))
                raise ProofError(f"{self.recipe}, seed {seed}: holds no {metric!r}; choose among {held}")
        return [self.by_seed[seed][metric] for seed in sorted(self.by_seed)]


def main() -> None:
    options = _parse_arguments()
    results = read_results(options.results)
    print(to_markdown(results, against=options.against, metrics=options.metrics))


def read_results(folder: Path) -> list[Results]:
    """Read every RECIPE.seed_N.json below a folder, recipes in the order of their names."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        parts = _RESULT.fullmatch(path.name)
        if parts is None:
            raise ProofError(f"{path}: is not named RECIPE.seed_N.json; rename it or take it away")
        found.setdefault(parts["recipe"], {})[int(parts["seed"])] = _metrics_of(path)
    if not found:
        raise ProofError(f"{folder}: holds no results; {_REMEDY}")
    results = [Results(recipe, by_seed) for recipe, by_seed in found.items()]
    _require_same_seeds(results)
    return results


def _metrics_of(path: Path) -> dict[str, float]:
    """The block of the one split that was evaluated."""
    content = read_json(path, what="evaluation", remedy=_REMEDY)
    if (
        not isinstance(content, dict)
        or len(content) != 1
        or not isinstance(block := next(iter(content.values())), dict)
    ):
        raise ProofError(f"{path}: expected the metrics of one split; {_REMEDY}")
    return block


def _require_same_seeds(results: Sequence[Results]) -> None:
    """Differences are paired by seed, so a recipe with other seeds cannot stand in the same table."""
    first = results[0]
    for other in results[1:]:
        if other.by_seed.keys() != first.by_seed.keys():
            raise ProofError(
                f"{other.recipe} has the seeds {sorted(other.by_seed)}, {first.recipe} {sorted(first.by_seed)}; "
                "run those that are missing with the same command again"
            )


def to_markdown(results: Sequence[Results], *, against: str, metrics: Sequence[str]) -> str:
    """The table: a row a recipe, the one that the others are compared with first; two columns a metric."""
    baseline = next((one for one in results if one.recipe == against), None)
    if baseline is None:
        raise ProofError(f"--against {against}: no such recipe; there are {', '.join(one.recipe for one in results)}")
    titles = [title for metric in metrics for title in (metric, "difference")]
    rows = [_row(one, baseline, metrics) for one in (baseline, *(one for one in results if one is not baseline))]
    seeds = ", ".join(str(seed) for seed in sorted(baseline.by_seed))
    head = [f"| seeds {seeds} | {' | '.join(titles)} |", f"|---|{'--:|' * len(titles)}"]
    return "\n".join(head + rows)


def _row(results: Results, baseline: Results, metrics: Sequence[str]) -> str:
    cells = [results.recipe.replace("_", " ")]
    for metric in metrics:
        ours, theirs = results.values(metric), baseline.values(metric)
        differences = [one - other for one, other in zip(ours, theirs, strict=True)]
        cells += [_cell(ours), "" if results is baseline else _cell(differences, sign="+")]
    return f"| {' | '.join(cells)} |"


def _cell(values: Iterable[float], *, sign: str = "") -> str:
    percents = [100.0 * value for value in values]
    text = f"{mean(percents):{sign}.1f}"
    return f"{text} ± {stdev(percents):.1f}" if len(percents) > 1 else text


def _parse_arguments() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m bench.proof",
        description="Print what evaluations of several recipes with several seeds came to, as a Markdown table.",
        example=EXAMPLE,
    )
    parser.add_argument("results", type=Path, metavar="RESULTS", help="a folder of RECIPE.seed_N.json")
    parser.add_argument(
        "--against", required=True, metavar="RECIPE", help="the recipe that the others are compared with"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["top1", "macro_top1"],
        metavar="METRIC",
        help="fractions of the evaluation's block (default: top1 macro_top1)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
