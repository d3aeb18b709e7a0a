"""The report is whole, needs nothing from elsewhere, escapes what it is given, and the command never shows a traceback."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from analysis_histories import INCIDENT, healthy_columns, rows_of, write_file, write_run
from PIL import Image

import aplantida_dist
from aplantida_dist import analyze
from aplantida_dist.analysis.report import Report, write_report
from aplantida_dist.command import run_command
from aplantida_dist.errors import UserError

EVIL = '<script>alert("x")</script>&\'$\\frac$ 植物 \U0001f33f'


class Balance(HTMLParser):
    """Counts tags, checks that they close in order, and gathers every address that the page names."""

    VOID = frozenset({"meta", "img", "source"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(report: Report) -> Balance:
    parser = Balance()
    parser.feed(report.page_path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


def assert_whole(report: Report) -> None:
    """Every picture is a PNG that decodes, and the page holds each one twice, for light and dark, and loads nothing."""
    for path in (report.overview_path, *report.plot_paths):
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 300
    page = parse(report)
    assert len(page.addresses) == 2 * len(report.plot_paths)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "script" not in page.seen
    assert "link" not in page.seen
    text = report.page_path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", text)


@pytest.mark.parametrize("epochs", [1, 15])
def test_a_run_of_any_length_has_a_whole_report(tmp_path: Path, epochs: int) -> None:
    """All seven plots, an overview, a page."""
    run_dir = write_run(
        tmp_path / "run", rows_of(healthy_columns(epochs=epochs, num_classes=10)), num_classes=10, config="seed: 0\n"
    )
    report = write_report([run_dir], out_dir=run_dir / "report")
    assert [path.name for path in report.plot_paths] == [
        "loss.png", "top1.png", "top5.png", "classes.png", "learning_rate.png", "throughput.png", "wait_fraction.png",
    ]  # fmt: skip
    assert_whole(report)
    text = report.page_path.read_text(encoding="utf-8")
    assert "seed: 0" in text
    assert "c" * 64 in text
    assert text.count("<tr") == epochs + 1


def test_a_long_history_has_a_whole_report(tmp_path: Path) -> None:
    """Hundreds of epochs: every one in the page's table."""
    source = write_file(tmp_path / "h.json", healthy_columns(epochs=400, num_classes=10))
    report = write_report([source], out_dir=tmp_path / "out", num_classes=10)
    assert_whole(report)
    assert report.page_path.read_text(encoding="utf-8").count("<tr") == 401


def test_a_series_that_nobody_wrote_has_no_plot(tmp_path: Path) -> None:
    """The first trainer's file has neither speed nor learning rate here."""
    report = write_report([write_file(tmp_path / "h.json", INCIDENT)], out_dir=tmp_path / "out", num_classes=7120)
    assert [path.stem for path in report.plot_paths] == ["loss", "top1", "top5"]
    assert_whole(report)
    assert "no batches reached the trainer" in report.page_path.read_text(encoding="utf-8")


def test_five_runs_are_compared_in_one_report(tmp_path: Path) -> None:
    """Ours and foreign ones, of different lengths, one of them broken."""
    sources = [
        write_run(
            tmp_path / f"run{i}", rows_of(healthy_columns(epochs=1 + 7 * i, num_classes=10, seed=i)), num_classes=10
        )
        for i in range(4)
    ]
    sources.append(write_file(tmp_path / "old" / "training_history.json", INCIDENT))
    report = write_report(sources, out_dir=tmp_path / "out")
    assert_whole(report)
    text = report.page_path.read_text(encoding="utf-8")
    assert "5 runs compared" in text
    assert all(f"<td>{name}</td>" in text for name in ("run0", "run1", "run2", "run3", "old"))
    assert "no batches reached the trainer (+1)" in text


@pytest.mark.parametrize(
    "losses",
    [
        [math.nan] * 3,
        [1.0, math.inf, 2.0],
        [3e38, 1e308, 1.0],
        [0.0, 0.0, 0.0],
        [5.0, 5.0, 5.0],
        [-1.0, -2.0, -3.0],
        [None, 1.0, None],
        [1e-12, 2e-12, 0.0],
    ],
)
def test_odd_numbers_are_drawn_all_the_same(tmp_path: Path, losses: list[float | None]) -> None:
    """NaN, infinities, zeros, huge, tiny and negative losses make a report."""
    source = write_file(
        tmp_path / "h.json", {"train_loss": losses, "val_loss": losses[::-1], "val_top1_acc": [math.nan, 250.0, -3.0]}
    )
    assert_whole(write_report([source], out_dir=tmp_path / "out", num_classes=5))


def test_names_and_configs_from_outside_are_escaped(tmp_path: Path) -> None:
    """A run called <script>, with letters that the font lacks and marks that matplotlib would typeset, stays text."""
    name = EVIL.replace("/", "_")
    losses = {"train_loss": [2.0, 1.0], "val_loss": [2.0, 1.5]}
    run_dir = write_run(
        tmp_path / "c" / name, rows_of(healthy_columns(epochs=2, num_classes=4)), config=f"name: {EVIL}\n"
    )
    sources = [run_dir, *(write_file(tmp_path / part / name / "training_history.json", losses) for part in "ab")]
    for chosen in (sources[:1], sources):
        report = write_report(chosen, out_dir=tmp_path / f"out{len(chosen)}")
        assert_whole(report)
        assert "&lt;script&gt;alert" in report.page_path.read_text(encoding="utf-8")
    broken = write_file(tmp_path / "h.json", {"train_loss": [1.0, "<script>"]})
    assert_whole(write_report([broken], out_dir=tmp_path / "out3"))


def test_a_name_that_turns_the_page_around_is_told_in_escapes(tmp_path: Path) -> None:
    """Quotes, a line break, a turn to right-to-left and a byte that is no text, in the folder's name; and in W&B's name, as text."""
    name = "a\"'><img src=x onerror=alert(1)>\n\u202e\u2067\udcff"
    config = f"report:\n  name: '{EVIL} \" onload=x'\n"
    run_dir = write_run(tmp_path / name, rows_of(healthy_columns(epochs=2, num_classes=4)), config=config)
    report = write_report([run_dir], out_dir=tmp_path / "out")
    assert_whole(report)
    text = report.page_path.read_text(encoding="utf-8")
    assert parse(report).seen.count("img") == len(report.plot_paths)
    assert not set(text) & {"\u202e", "\u2067"}
    assert "onerror=alert(1)&gt;\\n\\u202e\\u2067\\udcff</h1>" in text
    assert report.runs[0].curves.name.isprintable()


def test_the_same_history_makes_the_same_bytes(tmp_path: Path) -> None:
    """A report holds no clock and no chance: written twice, it is the same."""
    source = write_file(tmp_path / "h.json", {"val_loss": [3.0, 2.0]})
    a, b = (write_report([source], out_dir=tmp_path / name) for name in "ab")
    assert a.page_path.read_bytes() == b.page_path.read_bytes()
    assert a.overview_path.read_bytes() == b.overview_path.read_bytes()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    """A file in its place."""
    source = write_file(tmp_path / "h.json", INCIDENT)
    with pytest.raises(UserError, match="choose another folder with --out"):
        write_report([source], out_dir=source / "out")


def test_the_default_folder_is_beside_what_was_read(tmp_path: Path) -> None:
    """RUN_DIR/report, STEM_report beside a file, analysis_report for several."""
    source = write_file(tmp_path / "old" / "training_history.json", INCIDENT)
    assert analyze.default_out_dir([source.parent]) == source.parent / "report"
    assert analyze.default_out_dir([source]) == source.parent / "training_history_report"
    assert analyze.default_out_dir([source, source.parent]) == Path("analysis_report")


def test_the_screen_shows_epochs_best_verdicts_and_where_the_report_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And of a long history the beginning, the end and the best epoch."""
    columns = healthy_columns(epochs=200, num_classes=10)
    columns["val_top1_acc"][100] = columns["val_top5_acc"][100] = 99.0
    source = write_file(tmp_path / "run" / "training_history.json", columns)
    analyze.main([str(source.parent)])
    shown = capsys.readouterr().out
    assert "best epoch: 101, val top-1 99.00 %" in shown
    assert re.search(r"^\*  +101 ", shown, re.MULTILINE)
    assert "… 80 more" in shown
    assert "GOOD: healthy" in shown
    assert str(source.parent / "report" / "report.html") in shown
    assert all(len(line) <= 100 for line in shown.splitlines() if str(tmp_path) not in line)


@pytest.mark.parametrize(
    "arguments", [["nowhere"], ["."], ["h.txt"], ["h.json", "--num-classes", "0"], ["h.json", "--out", "h.txt"]]
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error on stderr, nothing on stdout."""
    write_file(tmp_path / "h.json", {"val_loss": [3.0, 2.0]})
    (tmp_path / "h.txt").write_text("not json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: analyze.main(arguments))
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1


def test_the_command_is_a_module(tmp_path: Path) -> None:
    """`python -m aplantida_dist.analyze` runs, and ends with code 2 and no traceback on a file that is no history."""
    (tmp_path / "h.json").write_text("not json")
    done = subprocess.run(
        [sys.executable, "-m", "aplantida_dist.analyze", "h.json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(aplantida_dist.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*h\.json: not readable as a history: .*\n", done.stderr)


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    """Of one run and of several."""
    with pytest.raises(SystemExit) as ended:
        analyze.main(["--help"])
    assert ended.value.code == 0
    assert "python -m aplantida_dist.analyze runs/demo" in capsys.readouterr().out
