"""The command that says what a history means: a table of epochs, verdicts with evidence, plots and a page."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from aplantida_dist.analysis.report import Report, write_report
from aplantida_dist.analysis.table import as_text, best_line, epoch_table, run_table
from aplantida_dist.analysis.verdict import Verdict
from aplantida_dist.analysis.verdicts import JudgedRun, gravest
from aplantida_dist.analysis.wording import count_text
from aplantida_dist.command import CommandParser, count, run_command

SCREEN_COLUMNS = 100

EPOCHS_SHOWN = 40
"""A screen shows this many epochs of one run at most: the first half, the last half and the best; the page shows all."""

EPOCHS_SHOWN_BESIDE_OTHERS = 6
"""And this many of each of several runs, so that the comparison stays in sight."""

EXAMPLE = """\
example:
  python -m aplantida_dist.analyze runs/demo
  python -m aplantida_dist.analyze runs/a runs/b old/training_history.json --num-classes 7120 --out compared

A source is a run folder, its history.jsonl, or a training_history.json (columns, or a list of epochs; accuracies in
percent). The exit code is 0 whatever the verdicts say, and 2 for a source that holds no history.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Analyze the sources of the command line. Raises UserError for those that hold no history."""
    options = _parser().parse_args(arguments)
    sources: list[Path] = options.sources
    out_dir: Path = options.out or default_out_dir(sources)
    _show(write_report(sources, out_dir=out_dir, num_classes=options.num_classes))


def default_out_dir(sources: Sequence[Path]) -> Path:
    """RUN_DIR/report for a folder, STEM_report beside a file, analysis_report here for several sources."""
    if len(sources) > 1:
        return Path("analysis_report")
    source = sources[0]
    return source / "report" if source.is_dir() else source.with_name(f"{source.stem}_report")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m aplantida_dist.analyze",
        description="Say what training histories mean: a table of epochs, the best one, verdicts with evidence, plots and one HTML page.",
        example=EXAMPLE,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="RUN_DIR|training_history.json",
        help="one or several histories to read",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where plots and report.html go (default: RUN_DIR/report)"
    )
    parser.add_argument(
        "--num-classes",
        type=count,
        metavar="N",
        help="the number of classes, for histories that do not tell it themselves",
    )
    return parser


def _show(report: Report) -> None:
    for run in report.runs:
        _show_run(run, most=EPOCHS_SHOWN if len(report.runs) == 1 else EPOCHS_SHOWN_BESIDE_OTHERS)
    if len(report.runs) > 1:
        table = run_table([run.curves for run in report.runs], gravest=[gravest(run) for run in report.runs])
        print(f"== {len(report.runs)} runs compared\n\n{as_text(table, most=len(table.rows))}\n")
        for verdict in report.together:
            _show_verdict(verdict)
    print(f"report   {report.page_path}")
    print(f"overview {report.overview_path}")
    print(f"plots    {report.page_path.parent}/{{{','.join(path.stem for path in report.plot_paths)}}}.png")


def _show_run(run: JudgedRun, *, most: int) -> None:
    curves = run.curves
    classes = f" · {count_text(curves.num_classes, 'class', 'classes')}" if curves.num_classes else ""
    print(f"== {curves.name} · {count_text(len(curves.epochs), 'epoch')}{classes}\n")
    print(f"{as_text(epoch_table(curves), most=most)}\n\n{best_line(curves)}\n")
    for verdict in run.verdicts:
        _show_verdict(verdict)


def _show_verdict(verdict: Verdict) -> None:
    print(f"{verdict.severity.upper()}: {verdict.name}")
    for text in (verdict.evidence, verdict.meaning, verdict.remedy and f"What to do: {verdict.remedy}"):
        if text:
            print(textwrap.fill(text, SCREEN_COLUMNS, initial_indent="  ", subsequent_indent="  "))
    print()


if __name__ == "__main__":
    run_command(main)
