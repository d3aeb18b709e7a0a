"""The report: sources in, a folder with the plots and report.html out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aplantida_dist.analysis.page import Picture, page
from aplantida_dist.analysis.panels import panels_of
from aplantida_dist.analysis.plots import draw, draw_overview
from aplantida_dist.analysis.sources import read_sources
from aplantida_dist.analysis.theme import DARK, LIGHT
from aplantida_dist.analysis.verdict import Verdict
from aplantida_dist.analysis.verdicts import JudgedRun, compare, judge
from aplantida_dist.errors import UserError
from aplantida_dist.files import write_whole

PAGE_FILE = "report.html"
OVERVIEW_FILE = "overview.png"


@dataclass(frozen=True)
class Report:
    """What was found and where it was written. `together` holds the verdicts on several runs as a whole."""

    runs: tuple[JudgedRun, ...]
    together: tuple[Verdict, ...]
    page_path: Path
    overview_path: Path
    plot_paths: tuple[Path, ...]


def write_report(sources: Sequence[Path], *, out_dir: Path, num_classes: int | None = None) -> Report:
    """Read the histories, judge them, and write the plots, an overview and one self-contained page into `out_dir`.

    A source is a run folder, a history.jsonl or a training_history.json; `num_classes` is for those that do not tell it.
    A series that no source holds has no plot. Raises UserError for a source without a history and for an unwritable folder.
    """
    curves = read_sources(sources, num_classes=num_classes)
    runs = tuple(JudgedRun(found, judge(found)) for found in curves)
    together = compare(curves)
    panels = panels_of(curves)
    pictures = [Picture(panel.title, draw(panel, theme=LIGHT), draw(panel, theme=DARK)) for panel in panels]
    _make_folder(out_dir)
    plot_paths = tuple(out_dir / f"{panel.name}.png" for panel in panels)
    for path, picture in zip(plot_paths, pictures, strict=True):
        write_whole(path, picture.light)
    overview_path, page_path = out_dir / OVERVIEW_FILE, out_dir / PAGE_FILE
    title = curves[0].name if len(curves) == 1 else f"{len(curves)} runs compared"
    write_whole(overview_path, draw_overview(panels, title=title, theme=LIGHT))
    write_whole(page_path, page(runs, together=together, pictures=pictures).encode())
    return Report(runs, together, page_path, overview_path, plot_paths)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: could not be made: {error.strerror}; choose another folder with --out") from error
