"""What the command line names: tars by brace lists, classes by names or numbers, and several sources as one."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pictures import digests_of, draw, fill, put

from aplantida_dist.data.classmap import ClassMap
from aplantida_dist.shards.audit import sample_key_of
from aplantida_dist.shards.builder import BuildError
from aplantida_dist.shards.class_names import ClassNamesError, read_class_names
from aplantida_dist.shards.folder import read_folder
from aplantida_dist.shards.joined import SourcesError, joined
from aplantida_dist.shards.jsonl import read_jsonl
from aplantida_dist.shards.placement import PlacementError
from aplantida_dist.shards.source import Source
from aplantida_dist.shards.stated_splits import StatedSplitsError
from aplantida_dist.shards.tar_urls import TarUrlError, expand_tar_urls
from aplantida_dist.shards.tars import TarsError, read_tars
from tests.tars import build_sources, build_tars, pack, read_dataset, sample

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("urls", "names"),
    [
        ("a-{000..002}.tar", ["a-000", "a-001", "a-002"]),
        ("{b,a-001}.tar", ["b", "a-001"]),
        ("a-*.tar", ["a-000", "a-001", "a-002"]),
        ("{b,a-00[12]}.tar", ["b", "a-001", "a-002"]),
        ("odd [x] %41 ü.tar", ["odd [x] %41 ü"]),
    ],
)
def test_lists_and_patterns_expand(tmp_path: Path, urls: str, names: list[str]) -> None:
    """Brace lists as webdataset reads them, then file patterns, sorted; a name that is there is never a pattern. file:// too."""
    for name in ("a-000", "a-001", "a-002", "b", "odd [x] %41 ü"):
        pack(tmp_path / f"{name}.tar", [])
    expected = tuple(tmp_path / f"{name}.tar" for name in names)
    assert expand_tar_urls(f"{tmp_path}/{urls}") == expected
    assert expand_tar_urls(f"file://{tmp_path}/{urls.replace('%', '%25')}") == expected


@pytest.mark.parametrize(
    ("urls", "says"),
    [
        ("pipe:cat {folder}/x.tar", "would run a command"),
        ("https://example.org/{{0..3}}.tar", "lies elsewhere"),
        ("s3://bucket/x.tar", "lies elsewhere"),
        ("gs://bucket/x.tar", "lies elsewhere"),
        ("file://host/x.tar", "names another machine"),
        ("{folder}/{{0..3.tar", "a brace without its partner"),
        ("{folder}/none.tar", "no such tar"),
        ("{folder}/none*.tar", "matches no file"),
        ("{folder}", "is a folder"),
        ("{folder}/{{x,x}}.tar", "names a tar twice"),
        ("{folder}/{{x,link}}.tar", "names a tar twice"),
        ("{folder}/x.tar.gz", "is compressed with gzip"),
        ("{folder}/hidden.tar", "is compressed with gzip"),
    ],
)
def test_what_is_no_tar_here_is_refused(tmp_path: Path, urls: str, says: str) -> None:
    """One line that says why; nothing is run and nothing is fetched."""
    content = pack(tmp_path / "x.tar", sample("a", 0)).read_bytes()
    (tmp_path / "link.tar").symlink_to(tmp_path / "x.tar")
    for name in ("x.tar.gz", "hidden.tar"):
        put(tmp_path / name, gzip.compress(content))
    with pytest.raises(TarUrlError, match=says) as raised:
        read_tars(urls.format(folder=tmp_path), class_names=None)
    assert "\n" not in str(raised.value)


def labelled(path: Path, labels: list[tuple[str | None, str | None]], *, first: int = 0) -> Path:
    """A tar of samples, each with this latin name and this .cls."""
    files = []
    for number, (latin_name, label) in enumerate(labels, start=first):
        files.append((f"{number}.jpg", draw(number)))
        if latin_name is not None:
            files.append((f"{number}.json", json.dumps({"latin_name": latin_name}).encode()))
        if label is not None:
            files.append((f"{number}.cls", label.encode()))
    return pack(path, files)


@pytest.mark.parametrize(
    ("latin_name", "label", "names", "expected"),
    [
        ("Acer", None, None, "Acer"),
        ("  Acer \n campestre", "3", None, "Acer campestre"),
        ("Acer", "Betula", None, "Acer"),
        (None, "Betula  pendula\n", None, "Betula pendula"),
        ("", "Betula", None, "Betula"),
        (None, "1", ("Acer", "Betula"), "Betula"),
        (None, " 0\n", ("Acer", "Betula"), "Acer"),
        ("Betula", "1", ("Acer", "Betula"), "Betula"),
    ],
)
def test_the_class_is_the_latin_name_else_the_label(
    tmp_path: Path, latin_name: str | None, label: str | None, names: Any, expected: str
) -> None:
    """A number is one of --class-names, any other text is the class itself."""
    source = read_tars(str(labelled(tmp_path / "x.tar", [(latin_name, label)])), class_names=names)
    assert [record.class_name for record in source.records] == [expected]
    assert source.class_names == (expected,)


@pytest.mark.parametrize(
    ("one", "two", "names", "says"),
    [
        (("Acer", "0"), (None, "7"), None, r"two\.tar:1\.jpg: its \.cls is 7 .* --class-names FILE"),
        (("Acer", "7"), ("Betula", "7"), None, r"class 7 is 'Betula' here and 'Acer' in one\.tar:0\.jpg"),
        (("Acer", "0"), ("Betula", "0"), ("Acer", "Betula"), "class 0 is 'Betula' here and 'Acer' in --class-names"),
        (("Acer", "0"), (None, "2"), ("Acer", "Betula"), "class 2, but --class-names has 0 to 1"),
        (("Acer", "0"), (None, "-1"), ("Acer", "Betula"), "class -1, but --class-names has 0 to 1"),
    ],
)
def test_numbers_without_a_name_or_with_two_are_an_error(
    tmp_path: Path, one: Any, two: Any, names: Any, says: str
) -> None:
    """A number means one class across all tars of a source, and both names are told where it does not."""
    labelled(tmp_path / "one.tar", [one])
    labelled(tmp_path / "two.tar", [two], first=1)
    with pytest.raises(TarsError, match=says):
        read_tars(f"{tmp_path}/{{one,two}}.tar", class_names=names)


def test_a_number_that_was_named_names_the_next(tmp_path: Path) -> None:
    """Where one sample says that 7 is Acer, 7 alone is Acer too; sources that count differently are given as several."""
    one = read_tars(str(labelled(tmp_path / "one.tar", [("Acer", "7"), (None, "7")])), class_names=None)
    two = read_tars(str(labelled(tmp_path / "two.tar", [("Betula", "7")], first=5)), class_names=None)
    assert [record.class_name for record in joined([one, two]).records] == ["Acer", "Acer", "Betula"]


def test_class_names_come_from_a_class_map_or_from_lines(tmp_path: Path) -> None:
    """classes.json with its digest, or one name a line; an empty line or a name that stands twice is an error with its line."""
    ClassMap(("Betula", "Acer")).save(tmp_path / "classes.json")
    assert read_class_names(tmp_path / "classes.json") == ("Betula", "Acer")
    assert read_class_names(put(tmp_path / "names.txt", "Betula\r\n Größe  x\n\n".encode())) == ("Betula", "Größe x")
    for content, says in (
        (b"a\n\nb\n", "line 2 is empty"),
        (b"crane\nb\ncrane\n", "lines 1 and 3"),
        (b"\xff", "cannot be read"),
    ):
        with pytest.raises(ClassNamesError, match=says):
            read_class_names(put(tmp_path / "names.txt", content))
    with pytest.raises(ClassNamesError, match="cannot be read"):
        read_class_names(tmp_path / "none.txt")


def test_samples_state_their_split_all_or_none(tmp_path: Path) -> None:
    """As records do: the split of the .json is kept; in some of them only, or a word that is none, it is an error."""
    words = ["train"] * 4 + ["validation"] * 2 + ["test"] * 2
    files = [file for n, word in enumerate(words) for file in sample(f"{n}", n, split=word)]
    account = build_tars(pack(tmp_path / "x.tar", files), tmp_path / "set")
    assert {m.split: m.num_samples for m in account.manifests} == {"train": 4, "val": 2, "test": 2}
    with pytest.raises(StatedSplitsError, match="8 records carry a split and 1 do not"):
        read_tars(str(pack(tmp_path / "y.tar", [*files, *sample("z", 20)])), class_names=None)
    with pytest.raises(StatedSplitsError, match=r"z\.tar:0\.jpg: split 'dev', expected one of train"):
        read_tars(str(pack(tmp_path / "z.tar", sample("0", 0, split="dev"))), class_names=None)


def test_tars_without_labels_or_samples_are_an_error(tmp_path: Path) -> None:
    """The reasons are told."""
    with pytest.raises(BuildError, match=r"not one of 2 tar samples can be used, first x\.tar:0\.jpg: "):
        build_tars(labelled(tmp_path / "x.tar", [(None, None)] * 2), tmp_path / "set")
    with pytest.raises(BuildError, match="not one of 0 tar samples can be used"):
        build_tars(pack(tmp_path / "empty.tar", []), tmp_path / "set")


def four_sources(home: Path) -> list[Source]:
    """Two folders of one name, records, and tars; picture 0 stands in all of them."""
    fill(home / "a" / "leaves", {"Acer": 6})
    fill(home / "b" / "leaves", {"Betula": 6}, first=10)
    put(home / "b" / "leaves" / "Acer" / "again.jpg", draw(0))
    put(home / "b" / "leaves" / "stray.txt", b"x")
    put(home / "b" / "leaves" / "metadata.jsonl", b'{"image_path": "gone.jpg"}\n')
    lines = [{"latin_name": "Cornus", "image_path": f"{n}.jpg"} for n in range(20, 26)] + [
        {"latin_name": "Acer", "image_path": "0.jpg"}
    ]
    for line in lines:
        put(home / "pictures" / line["image_path"], draw(int(line["image_path"][:-4])))
    put(home / "records.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    for tar in range(2):
        pack(
            home / "tars" / f"{tar}.tar",
            [file for n in range(6) for file in sample(f"{n}", 30 + 10 * tar + n, "Daphne")],
        )
    pack(home / "tars" / "2.tar", sample("x", 0))
    return [
        read_folder(home / "a" / "leaves"), read_folder(home / "b" / "leaves"),
        read_jsonl(home / "records.jsonl", home / "pictures"), read_tars(f"{home}/tars/*.tar", class_names=None),
    ]  # fmt: skip


def test_several_sources_make_one_dataset(tmp_path: Path) -> None:
    """All their pictures, once, under names that stay apart; of equal ones that of the first source stays; the sums add up."""
    account = build_sources(four_sources(tmp_path), tmp_path / "set")
    assert account.class_names == ("Acer", "Betula", "Cornus", "Daphne")
    assert {(one.source, one.reason, one.detail) for one in account.left_out} == {
        ("leaves#2:stray.txt", "outside_classes", ""),
        ("leaves#2:Acer/again.jpg", "duplicate", "same bytes as leaves:Acer/0.jpg"),
        ("records.jsonl:7", "duplicate", "same bytes as leaves:Acer/0.jpg"),
        ("tars:2.tar:x.jpg", "duplicate", "same bytes as leaves:Acer/0.jpg"),
    }
    assert (account.source_name, account.counted) == (
        "leaves + leaves#2 + records.jsonl + tars",
        "files and records and tar samples",
    )
    assert (account.num_files, account.num_samples) == (34, 30)
    assert account.metadata is not None
    assert account.metadata.unmatched == ((1, "leaves#2:gone.jpg"),)
    numbers = [first + n for first in (0, 10, 20, 30, 40) for n in range(6)]
    assert read_dataset(tmp_path / "set").keys() == {sample_key_of(draw(number)) for number in numbers}


def test_one_source_keeps_its_names(tmp_path: Path) -> None:
    """Joining one changes nothing."""
    source = four_sources(tmp_path)[0]
    assert joined([source]) is source


def test_sources_that_do_not_go_together_are_an_error(tmp_path: Path) -> None:
    """Splits stated by some only, the same tar twice, a dataset inside any of the sources."""
    sources = four_sources(tmp_path)
    fill(tmp_path / "split" / "train", {"Acer": 2}, first=90)
    fill(tmp_path / "split" / "val", {"Acer": 1}, first=95)
    with pytest.raises(
        SourcesError, match=r"split state the split of each picture and leaves, leaves, records\.jsonl, tars do not"
    ):
        joined([*sources, read_folder(tmp_path / "split")])
    with pytest.raises(SourcesError, match="hold the same tar"):
        joined([*sources, sources[-1]])
    with pytest.raises(PlacementError, match=r"lies inside .*pictures, or around it"):
        build_sources(sources, tmp_path / "pictures" / "set")
    with pytest.raises(PlacementError, match=r"lies inside .*0\.tar, or around it"):
        build_sources(sources[-1:], tmp_path / "tars")
    assert build_sources(sources[-1:], tmp_path / "tars" / "set").num_samples == 13


def run_build(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "shards" / "build.py", "--workers", "0", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_command_builds_from_several_sources(tmp_path: Path) -> None:
    """As a user types it, in any order; files that belong to a source pair with it in order, or serve all."""
    four_sources(tmp_path)
    labelled(tmp_path / "numbers.tar", [(None, "1"), (None, "0")], first=70)
    names = put(tmp_path / "names.txt", b"Acer\nBetula\n")
    before = digests_of(tmp_path / "tars")
    out, records, pictures = tmp_path / "set", tmp_path / "records.jsonl", tmp_path / "pictures"
    done = run_build(
        "--from-tars", f"{tmp_path}/tars/{{0..2}}.tar", "--from-folder", tmp_path / "a" / "leaves", "--from-jsonl", records,
        "--from-tars", tmp_path / "numbers.tar", "--image-dir", pictures, "--class-names", names, "--from-folder", tmp_path / "b" / "leaves",
        "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "36 tar samples and files and records = 32 samples written + 4 left out" in done.stdout
    assert "leaves:Acer/0.jpg" in (out / "report.md").read_text(), "of equal pictures that of the first source stays"
    assert digests_of(tmp_path / "tars") == before
    for arguments, says in (
        ([], "nothing to build from"),
        (["--from-folder", pictures, "--class-names", names], "--class-names belongs to --from-tars"),
        (["--from-jsonl", records] * 3 + ["--image-dir", pictures] * 2, "2 --image-dir for 3 --from-jsonl"),
    ):
        failed = run_build(*arguments, "--out", tmp_path / "other")
        assert (failed.returncode, failed.stderr.count("\n")) == (2, 1), failed.stderr
        assert says in failed.stderr
    assert "--from-tars URLS" in run_build("--help").stdout
